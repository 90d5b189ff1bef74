"""Multiple choice and MMMU: by the rules as they are written down, and what they must not do."""

import pytest

from eval.metrics import METRICS
from eval.metrics.choices import infer
from eval.metrics.metric import Score
from eval.metrics.mmmu import chosen, open_readings
from glm4v_jax.errors import DataError

OPTIONS = {"A": "red", "B": "dark red", "C": "three cats", "D": "13"}
ITEM = {"options": OPTIONS, "answer": "B"}


class TestInfer:
    @pytest.mark.parametrize(
        ("answer", "letter"),
        [
            ("B", "B"),
            ("(B).", "B"),
            ("I am sure that it is B", "B"),
            # Too far from the end.
            ("B because I have seen it there", None),
            ("B or C", None),
            ("The answer is C, not B", "C"),
            ("It is 13", "D"),
            # As a part of "dark red", "red" is a second one.
            ("dark red", None),
            ("three cats" + " and more" * 20, None),
            ("Z", None),
            ("Cannot determine the answer, B", None),
            # An English "A" is a letter here.
            ("A dog runs", "A"),
        ],
    )
    def test_rules(self, answer, letter):
        assert infer(answer, OPTIONS) == letter


class TestMcq:
    def test_value_and_category(self):
        boxed = "<think>A or C</think><answer>So <|begin_of_box|>B<|end_of_box|>"
        assert METRICS["mcq"].score(boxed, ITEM) == (1.0, "B", {})
        assert METRICS["mcq"].score("C", ITEM) == (0.0, "C", {})
        assert METRICS["mcq"].score("None of them", ITEM) == (0.0, None, {})
        assert METRICS["mcq"].score("dark red", ITEM).value == 1
        assert METRICS["mcq-vlmevalkit"].score("dark red", ITEM) == (0.0, None, {})
        assert METRICS["mcq-vlmevalkit"].score(boxed, ITEM).value == 1

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            ({"answer": "B"}, "options: found nothing"),
            ({"answer": "E", "options": OPTIONS}, "answer: found 'E'; expected one of A, B, C, D"),
            ({"answer": "B", "options": "red"}, "options: found 'red'"),
        ],
    )
    def test_broken_items(self, item, message):
        with pytest.raises(DataError, match=message):
            METRICS["mcq"].score("B", item)

    def test_first_capital_of_videomme(self):
        assert METRICS["videomme-vlmevalkit"].score("The best answer is B", ITEM).value == 1
        assert METRICS["videomme-vlmevalkit"].score("Dogs, so B", ITEM).parsed == "D"
        assert METRICS["videomme"].score("Dogs, so B", ITEM).parsed == "B"
        assert METRICS["videomme-vlmevalkit"].score("nothing", ITEM).parsed is None


class TestAggregates:
    def test_circular(self):
        rotations = {1: [1, 1, 1, 1], 2: [1, 0, 1, 1], 3: [1, 1]}
        scores = [(ITEM | {"group": g}, Score(float(of), "B")) for g, values in rotations.items() for of in values]
        scores.append((ITEM, Score(0.0, None)))
        assert METRICS["mmbench"].aggregate(scores) == pytest.approx(
            {"score": 0.5, "rotations": 9 / 11, "incomplete": 0.5}
        )

    def test_buckets(self):
        rows = [("short", "Sports", False, 1.0), ("short", "Sports", True, 0.0), ("long", "Law", True, 1.0)]
        scores = [
            ({"duration": duration, "domain": domain, "subtitles": subtitles}, Score(of, "A"))
            for duration, domain, subtitles, of in rows
        ]
        assert METRICS["videomme"].aggregate(scores) == {
            "score": pytest.approx(2 / 3),
            "duration/long": 1.0,
            "duration/short": 0.5,
            "domain/Law": 1.0,
            "domain/Sports": 0.5,
            "subtitles/False": 1.0,
            "subtitles/True": 0.5,
            "duration, subtitles/long, with": 1.0,
            "duration, subtitles/short, with": 0.0,
            "duration, subtitles/short, without": 1.0,
        }


class TestMmmuChoice:
    @pytest.mark.parametrize(
        ("answer", "letter"),
        [
            ("B", "B"),
            ("(B) dark red", "B"),
            ("A is wrong, (B) is right", "B"),
            ("(A) or (C)", "C"),
            ("I take B", "B"),
            ("C or B", "B"),
            ("It is B. That is all", "B"),
            ("I see three cats in the picture", "C"),
            # Five words or fewer.
            ("I see three cats", None),
            ("The last named is red, not 13 of them", "D"),
            ("", None),
            ("no", None),
        ],
    )
    def test_order_of_forms(self, answer, letter):
        assert chosen(answer, OPTIONS) == letter

    def test_no_guess(self):
        for _ in range(20):
            assert METRICS["mmmu"].score("I do not know", ITEM) == (0.0, None, {})


class TestMmmuOpen:
    @pytest.mark.parametrize(
        ("answer", "readings"),
        [
            ("12.346", {12.35}),
            ("So the answer is 12", {12.0}),
            ("x = 3.14159", {3.14}),
            # The official expressions find 234 and 3 as well.
            ("It is 1,234 dollars.", {"1,234 dollars", 1234.0, 234.0}),
            ("It is 2e3", {2000.0, 3.0}),
            ("The result is blue\nand so on", {"blue", "on"}),
            ("a", {" a", "a "}),
        ],
    )
    def test_readings(self, answer, readings):
        assert open_readings(answer) == readings

    @pytest.mark.parametrize(
        ("text", "answer", "expected"),
        [
            ("The answer is 12.344", "12.34", 1),
            ("The answer is 12.346", "12.34", 0),
            ("It is a sapphire blue", "Sapphire", 1),
            ("<think>3</think><answer>So <|begin_of_box|>$5<|end_of_box|>", "5", 1),
            ("about 1,000", "1000", 1),
            # A single letter has to stand alone on one side.
            ("the cat", "a", 0),
            ("a cat", "a", 1),
        ],
    )
    def test_values(self, text, answer, expected):
        assert METRICS["mmmu"].score(text, {"answer": answer, "type": "open"}).value == expected

    def test_several_right_answers(self):
        assert METRICS["mmmu"].score("It is 7", {"answers": ["six", "7"]}).value == 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"answer": "B", "type": "multiple-choice"}, "options: found nothing"),
        (ITEM | {"answer": "red"}, "answer: found 'red'"),
    ],
)
def test_mmmu_broken_items(item, message):
    with pytest.raises(DataError, match=message):
        METRICS["mmmu"].check(item)


def test_mmmu_aggregate():
    rows = [
        ({"id": "validation_Accounting_1"}, 1.0),
        ({"id": "validation_Accounting_2"}, 0.0),
        ({"subject": "Basic Medical Science"}, 1.0),
        ({"id": "dev_Art_Theory_12"}, 1.0),
        ({"id": "x"}, 0.0),
    ]
    assert METRICS["mmmu"].aggregate([(item, Score(of, "x")) for item, of in rows]) == {
        "score": 0.6,
        "domain/Art and Design": 1.0,
        "domain/Business": 0.5,
        "domain/Health and Medicine": 1.0,
        "subject/Accounting": 0.5,
        "subject/Art_Theory": 1.0,
        "subject/Basic_Medical_Science": 1.0,
    }
