"""Rows as problems: references from their fields or their last message, domains, keys; and what is wrong with a row."""

import json

import PIL.Image
import pytest

from glm4v_jax.errors import DataError
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.tiny import TINY_CHECKPOINT
from train.rl.problems import check_lengths, read_problems


@pytest.fixture
def read(tmp_path):
    """(rows, domains) -> problems of a file with them, beside an image of 40 x 20 pixels."""
    PIL.Image.new("RGB", (40, 20)).save(tmp_path / "a.png")

    def read(*rows, domains=("it",), name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_problems([str(path)], domains)

    return read


ASKED = [{"role": "user", "content": "<image>Which?"}]
SAID = {"role": "assistant", "content": "<think>x</think><answer>It is <|begin_of_box|>7<|end_of_box|>.</answer>"}
BOX = {"role": "assistant", "content": "<answer><|begin_of_box|>[[100,200,300,400]]<|end_of_box|></answer>"}


@pytest.mark.parametrize(
    ("row", "item"),
    [
        ({"messages": ASKED, "images": ["a.png"], "answer": 7}, {"answer": 7}),
        ({"messages": ASKED, "images": ["a.png"], "answers": ["7", "8"]}, {"answers": ["7", "8"]}),
        ({"messages": ASKED, "images": ["a.png"], "solution": "<answer> 7 </answer>"}, {"answer": "7"}),
        ({"messages": [*ASKED, SAID], "images": ["a.png"]}, {"answer": "7"}),
        ({"messages": [*ASKED, SAID], "images": ["a.png"], "answer": "8"}, {"answer": "8"}),
        ({"messages": [*ASKED, {"role": "assistant", "content": "7"}], "images": ["a.png"]}, {"answer": "7"}),
        (
            {"messages": ASKED, "images": ["a.png"], "boxes": [[1, 2, 3, 4]]},
            {"boxes": [[1, 2, 3, 4]], "width": 40, "height": 20},
        ),
        (
            {"messages": ASKED, "images": ["a.png"], "boxes": [[1, 2, 3, 4]], "width": 9, "height": 8},
            {"boxes": [[1, 2, 3, 4]], "width": 9, "height": 8},
        ),
        (
            {"messages": [*ASKED, BOX], "images": ["a.png"]},
            {"answer": "[[100,200,300,400]]", "boxes": [[100, 200, 300, 400]], "width": 1000, "height": 1000},
        ),
        ({"messages": ASKED, "images": ["a.png"], "answer": "B", "options": ["r", "b"]}, None),
        ({"conversations": [{"from": "human", "value": "<image>Which?"}], "images": ["a.png"], "answer": 7}, None),
        ({"conversations": [{"from": "human", "value": "<image>Which?"}], "image": "a.png", "answer": 7}, None),
        ({"problem": "<image>Which?", "images": ["a.png"], "solution": "7", "answer": "7"}, {"answer": "7"}),
        ({"question": "<image>Which?", "images": ["a.png"], "answer": "7"}, {"answer": "7"}),
        ({"query": "<image>Which?", "images": ["a.png"], "response": "7"}, {"answer": "7"}),
        ({"prompt": ASKED, "images": ["a.png"], "answer": "7"}, {"answer": "7"}),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}],
                "images": ["a.png"],
                "answer": "7",
            },
            {"answer": "7"},
        ),
        (
            {
                "messages": [*ASKED, {"role": "assistant", "content": "<bbox>"}],
                "images": ["a.png"],
                "objects": {"ref": [], "bbox": [[10, 5, 20, 10]]},
            },
            {"answer": "[250,250,500,500]", "boxes": [[250, 250, 500, 500]], "width": 1000, "height": 1000},
        ),
    ],
)  # fmt: skip
def test_a_row_is_a_prompt_with_a_reference(read, tmp_path, row, item):
    problems = read(row)
    (problem,) = problems
    assert item is None or problem.item == item
    image = {"type": "image", "path": str(tmp_path / "a.png")}
    assert problem.messages == ({"role": "user", "content": [image, {"type": "text", "text": "Which?"}]},)
    assert problem.source == f"{tmp_path / 'data.jsonl'}:1" and problem.domain == "it" and problem.level is None


def test_a_dataset_info_names_the_fields(tmp_path):
    row = {"turns": [{"who": "me", "what": "How many?"}], "answer": 7, "domain": "it"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "you"}
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "turns"}, "tags": tags}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    (problem,) = read_problems([f"{tmp_path}/dataset_info.json:mine"], ["it", "other"])
    assert problem.item == {"answer": 7} and problem.messages[0]["content"][0]["text"] == "How many?"


def test_domains_levels_and_keys_are_of_the_row(read):
    rows = [{"query": f"{number}?", "response": "7", "domain": "it", "level": 3, "key": number} for number in range(2)]
    problems = read(*rows, {"query": "2?", "response": "7"}, {"query": "2?", "response": "7"})
    assert problems.keys[:2] == ["0", "1"] and problems.levels == ["3", "3", None, None]
    assert problems.keys[3] == f"{problems.keys[2]}#2"
    assert [example.item for example in problems.examples()] == [{"answer": "7"}] * 4


def test_a_derived_key_is_of_the_content_and_not_of_its_place(read):
    row = {"messages": ASKED, "images": ["a.png"], "answer": 7}
    first, second = read(row), read({"query": "a", "response": "b"}, row, name="other.jsonl")
    assert first.keys[0] == second.keys[1]
    assert read({**row, "answer": 8}).keys != first.keys


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"query": "Which?", "response": "7", "domain": "ti"},
            "domain: found 'ti'; expected one of it, them, which",
        ),
        ({"query": "Which?", "response": "7"}, "domain: found none; expected one of it, them"),
        ({"query": "Which?", "response": "7", "domain": ["it"]}, r"domain: found \['it'\]; expected one of it, them"),
        (
            {"messages": ASKED[:1], "images": ["a.png"], "domain": "it"},
            "answer: found none; expected one of answer, answers, solution, boxes, or an an",
        ),
        ({"query": "Which?", "response": "<think>x</think>", "domain": "it"}, "answer: found an empty one"),
        ({"query": "Which?", "response": "x", "boxes": [[1, 2, 3, 4]], "domain": "it"}, "width, height: found none"),
        ({"messages": ASKED, "answer": "7", "domain": "it"}, "images: found 0 for 1 <image> marker"),
        ({"messages": ASKED, "images": ["b.png"], "boxes": [], "domain": "it"}, "b.png"),
        ({"query": "Which?", "response": "7", "domain": "it", "key": "a"}, "key: found 'a' as in .*:1; expected"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_place(read, row, message):
    good = {"query": "Which?", "response": "7", "domain": "it", "key": "a"}
    with pytest.raises(DataError, match=f"data.jsonl:2: .*{message}") as error:
        read(good, row, domains=("it", "them"))
    assert str(error.value).count("data.jsonl:2") == 1


def test_checking_lengths_says_how_far_it_is(read):
    asked = [{"role": "user", "content": "<image>" + "Which? " * 99}]
    problems = read(*({"messages": one, "images": ["a.png"], "answer": 7} for one in (ASKED, asked)))
    processor, told = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT), []
    with pytest.raises(DataError, match=r"data.jsonl:2: found a prompt of at least \d+ tokens; expected at most 64"):
        check_lengths(problems, processor, 64, lambda *done: told.append(done))
    assert told == [(0, 2), (1, 2), (2, 2)]
