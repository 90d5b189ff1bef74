"""From raw text to answers: every form of them, and nothing that breaks the parsers or takes them long."""

import ast
import builtins
import math
import random
import time
from pathlib import Path

import pytest

import eval as package
from eval.parse_answer import answer_text, boxes, choice, final_answer, number, numbers, points, to_pixels
from glm4v_jax.errors import DataError
from glm4v_jax.generate.text.thinking import TAGS

OPTIONS = {"A": "red", "B": "dark red", "C": "3", "D": "13"}


@pytest.mark.parametrize(
    "text",
    [
        "7", " 7\n", "<think>8</think>\n<answer>It is <|begin_of_box|> 7 <|end_of_box|>.</answer>",
        "<think>8</think>\n<answer>It is <|begin_of_box|>7", "<think>8</think><answer>7</answer>",
        "<think>8</think><answer>7", "<think>8</think>7", "8</think>7",
        "<answer><|begin_of_box|><|end_of_box|>7</answer>",
        "<|begin_of_box|>7<|end_of_box|>, not <|begin_of_box|>8<|end_of_box|>",
        "so \\boxed{7}.", "<|begin_of_box|>\\boxed{7}<|end_of_box|>", "\\boxed{7",
    ],
)  # fmt: skip
def test_the_final_answer_is_the_box_else_the_answer_else_the_text(text):
    assert final_answer(text) == "7"


def test_a_latex_box_may_have_braces():
    assert final_answer("\\boxed{\\frac{1}{2}} or \\boxed{3}") == "\\frac{1}{2}"


@pytest.mark.parametrize(
    "text", ["", " \n", "<think>7", "<think>7</think>", "<answer></answer>", "<answer><|begin_of_box|>", "\\boxed{ }"]
)
def test_without_an_answer_it_is_none(text):
    assert final_answer(text) is None


def test_the_answer_text_is_all_of_the_answer():
    assert answer_text("<think>8</think><answer>It is <|begin_of_box|>7<|end_of_box|>.") == "It is 7."
    assert answer_text("<think>8") is None


LETTERS = {
    "B": (
        "B", "b", "(B)", "**B.**", "$B$", "Ｂ", "\\boxed{\\text{B}}", "(B) dark red", "B. red", "**B**: red",
        "<think>A</think><answer>C, or rather <|begin_of_box|>B<|end_of_box|>", "The answer is B.",
        "The answer is (b).", "Answer: **B**", "答案是B", "答案：B。", "Dark  RED.", "I think it must be B",
    ),
    "A": ("It is A",),
    "C": ("Option B fits, so the answer is C",),
    "D": ("It says 13 there",),
    None: (
        "A dog? I take B, I think", "The answer is a dog", "A is what I see", "A or B", "3 or 13", "E", "Blue",
        "1313", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("letter", "text"), [(letter, text) for letter, texts in LETTERS.items() for text in texts])
def test_the_letter_of_a_choice(letter, text):
    assert choice(text, OPTIONS) == letter


def test_options_may_be_a_list_or_have_small_letters():
    assert choice("B", ["x", "y"]) == "B"
    assert choice("(B)", {"a": "x", "b": "y"}) == "b"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("-7", -7), ("−7", -7), ("+7", 7), ("1,234,567.5", 1234567.5), ("$3.50 each", 3.5), ("50%", 50),
        ("2.5e-3", 0.0025), (".5", 0.5), ("12.", 12), ("3/4", 0.75), ("3 / 4 = 0.75", 0.75), ("５０", 50), ("5度", 5),
        ("<think>8</think><answer>It is <|begin_of_box|>7 cm<|end_of_box|>", 7), ("\\boxed{\\text{7}}", 7),
        ("7 of A4 paper", 7),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text", ["", "seven", "from 1 to 3", "12,5", "1.2.3", "2007-2008", "1/0", "1e999", "9" * 5000, "nan", "inf", "x2"]
)
def test_no_number_or_several_are_none(text):
    assert number(text) is None


def test_numbers_are_in_the_order_written():
    assert numbers("[2007, 2008], -1 and 1,5") == [2007, 2008, -1, 1, 5]


class TestCoordinates:
    @pytest.mark.parametrize("text", ["[[1,2,3,4]]", "(1, 2, 3, 4)", "<1 2 3 4>", "{1;2;3;4}", "【1，2，3，4】"])
    def test_boxes_have_brackets_of_any_style(self, text):
        assert boxes(text) == [(1, 2, 3, 4)]

    def test_several_boxes_and_points(self):
        assert boxes("[[1,2,3,4],[5,6,7,8]]") == [(1, 2, 3, 4), (5, 6, 7, 8)]
        assert points("(1, 2) then [3, 4]") == [(1, 2), (3, 4)]

    def test_the_scale_limits_coordinates(self):
        assert boxes("[0.1, 0.2, 0.3, 1]", scale="unit") == [(0.1, 0.2, 0.3, 1.0)]
        assert boxes("[1, 2, 3, 4]", scale="unit") is None
        assert boxes("[1, 2, 1500, 900]") is None
        assert boxes("[1, 2, 1500, 900]", scale="pixel") == [(1, 2, 1500, 900)]
        assert points("[1500, 2]", scale="pixel") == [(1500, 2)]

    @pytest.mark.parametrize("text", ["", "nowhere", "[1, 2, 3]", "<think>[1,2,3,4]"])
    def test_without_coordinates_it_is_none(self, text):
        assert boxes(text) is None
        assert points("1, 2") is None

    def test_coordinates_become_pixels(self):
        assert to_pixels([(500, 0, 250, 1000)], 200, 100) == [(50, 0, 100, 100)]
        assert to_pixels([(1000, 500)], 200, 100) == [(200, 50)]
        assert to_pixels([(0.5, 0.25, 1, 1)], 200, 100, "unit") == [(100, 25, 200, 100)]
        assert to_pixels([(10, 20, 3000, 40)], 200, 100, "pixel") == [(10, 20, 200, 40)]
        # Not rounded: a third of the way is a third of the way.
        assert to_pixels([(333, 0, 666, 1)], 100, 100)[0][0] == pytest.approx(33.3)

    @pytest.mark.parametrize("size", [(0, 10), (10, -1), (math.nan, 1)])
    def test_an_empty_image_is_an_error(self, size):
        with pytest.raises(DataError, match="width, height: found"):
            to_pixels([], *size)


_WORDS = [r"\boxed{", r"\text{", r"[[1,2,3,4]]", r"1,234", r"1e9", r"3/0", r"A", r"B.", r"option", r"答案", r"red"]
PIECES = [*TAGS, *_WORDS, "answer is", "x=1, y=2", *"[](){}<>٣² \n,.-%𝟏\x00é'"]

LONGER = ["1,", "1.", "1,111", "1, ", "[1,1,1,", "(1 ", "1/1/", "1e", "-1-", "A B ", "red ", "answer is ", "option"]
LONGER += ["\\boxed{", "\\text{", *TAGS]


def read_all(text):
    return (
        final_answer(text),
        answer_text(text),
        choice(text, OPTIONS),
        number(text),
        boxes(text),
        boxes(text, "unit"),
        points(text, "pixel"),
    )


class TestHostileText:
    def test_any_text_is_parsed_or_none(self, monkeypatch):
        rng = random.Random(0)
        texts = ["".join(rng.choice(PIECES) for _ in range(rng.randrange(30))) for _ in range(10_000)]
        with monkeypatch.context() as patch:
            for name in ("eval", "exec"):
                patch.setattr(builtins, name, None)
            answers = [read_all(text) for text in texts]
        for final, _, letter, value, *found in answers:
            assert final is None or final == final.strip() != ""
            assert letter is None or letter in OPTIONS
            assert value is None or math.isfinite(value)
            assert all(coordinates is None or coordinates for coordinates in found)

    @pytest.mark.parametrize("piece", [*"[(<{1.,- A\\'\"eE$*", *LONGER])
    def test_time_is_bounded(self, piece):
        # Quadratic time would be a hundred times as long for the longer one, and minutes at this length.
        for length, seconds in ((5_000, 0.25), (50_000, 2.0)):
            text = (piece * length)[:length]
            start = time.process_time()
            read_all(text)
            assert time.process_time() - start < seconds

    def test_nothing_is_evaluated(self):
        for path in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("eval", "exec", "compile"), path
