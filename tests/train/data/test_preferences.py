"""Rows with a preferred and a rejected answer: every layout gives both conversations, and what differs is learned."""

import json

import PIL.Image
import pytest

from glm4v_jax.errors import DataError
from train.commands import main
from train.data.check import check
from train.data.preferences import pair_of
from train.data.records import Records, read_records

IMAGE = [{"type": "image"}, {"type": "text", "text": "Which?"}]
ASKED, SAID = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "seven"}
LAYOUTS = {
    # LLaMA-Factory: data/dpo_zh_demo.json, rlhf_v.json
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>Which?"}], "images": ["a.png"],
        "chosen": {"from": "gpt", "value": "seven"}, "rejected": {"from": "gpt", "value": "one"},
    },
    "alpaca": {"instruction": "Which?", "input": "", "chosen": "seven", "rejected": "one", "images": ["a.png"]},
    "openai": {
        "messages": [{"role": "user", "content": "<image>Which?"}], "images": ["a.png"],
        "chosen": SAID, "rejected": {"role": "assistant", "content": "one"},
    },
    # ms-swift: Customization/Custom-dataset
    "swift": {"messages": [ASKED, SAID], "rejected_response": "one", "images": ["a.png"]},
    "swift messages": {
        "messages": [ASKED, SAID], "images": ["a.png"],
        "rejected_messages": [ASKED, {"role": "assistant", "content": "one"}],
    },
    "swift query": {"query": "Which?", "response": "seven", "rejected_response": "one", "images": ["a.png"]},
    # TRL: dataset_formats
    "trl text": {"prompt": "Which?", "chosen": "seven", "rejected": "one", "images": ["a.png"]},
    "trl explicit": {
        "prompt": [{"role": "user", "content": IMAGE}], "images": ["a.png"],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "seven"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "one"}]}],
    },
    "trl implicit": {
        "chosen": [{"role": "user", "content": IMAGE}, SAID], "images": ["a.png"],
        "rejected": [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": "one"}],
    },
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    PIL.Image.new("RGB", (56, 56)).save(tmp_path / "a.png")

    def read(*rows):
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return read_records(tmp_path / "data.jsonl", is_preference=True)

    return read


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_two_conversations(read, tmp_path, row):
    (record,) = read(row)
    for found, answer in ((record, "seven"), (record.rejected, "one")):
        asked, said = found.messages
        assert [item["type"] for item in asked["content"]] == ["image", "text"]
        assert asked["content"][0]["path"] == str(tmp_path / "a.png") and asked["content"][1]["text"] == "Which?"
        assert said == {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        assert read(row).format(0) in ("sharegpt", "alpaca", "openai", "swift", "hf")
        assert found.losses == (False, True) and found.source.endswith(":1")


def test_only_what_differs_is_learned(read):
    """Earlier answers, which both conversations have, are not."""
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, ASKED]
    (record,) = read({"messages": [*earlier, SAID], "rejected_response": "one"})
    assert record.losses == record.rejected.losses == (False, False, False, True)


def test_a_dataset_info_names_the_fields(read, tmp_path):
    row = {"asked": "Which?", "good": "seven", "bad": "one"}
    info = {
        "file_name": "data.jsonl",
        "ranking": True,
        "columns": {"prompt": "asked", "chosen": "good", "rejected": "bad"},
    }
    read(row)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": info}))
    (record,) = read_records(f"{tmp_path}/dataset_info.json:mine", is_preference=True)
    assert [one.messages[-1]["content"][0]["text"] for one in (record, record.rejected)] == ["seven", "one"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED, SAID]}, "chosen: found none; expected an answer, of preference data"),
        ({**LAYOUTS["swift"], "rejected_images": ["a.png"]}, "rejected_images: found some; expected none"),
        ({"prompt": "a", "chosen": "b"}, "rejected: found none; expected an answer"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected: found the number 3; expected text or messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected: found the same answer as the chosen one"),
        ({"messages": [ASKED, SAID], "rejected_response": ["one"]}, "rejected_response: found .*; expected a string"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(read, row, message):
    with pytest.raises(DataError, match=rf"data\.jsonl:1: {message}"):
        read(row)[0]


def test_a_check_counts_both_answers(read, tmp_path, capsys):
    good = {"prompt": "Which?", "chosen": "seven", "rejected": "one"}
    report = check(read(good, {"prompt": "Which?", "chosen": "seven"}))
    assert report.lengths == [2 * len("Which?") + len("seven") + len("one")]
    assert report.bad == 1 and "rejected: found none" in report.problems[0].reason
    assert main(["check", "--preference", str(tmp_path / "data.jsonl")]) == 1
    assert "1 bad" in capsys.readouterr().out


def test_data_sets_that_are_joined_stay_preferences(read):
    (record,) = Records.joined([read(LAYOUTS["alpaca"])])
    assert record.rejected is not None


@pytest.mark.parametrize(
    ("name", "found"), [("swift", "found"), ("swift messages", "found"), ("alpaca", "chosen: found")]
)
def test_supervised_training_refuses_preferences(tmp_path, read, name, found):
    read(LAYOUTS[name])
    with pytest.raises(DataError, match=rf"{found} preferences; expected .*a job with \[preference\]"):
        read_records(tmp_path / "data.jsonl")[0]


def test_a_row_is_not_changed():
    row = {"messages": [ASKED], "chosen": SAID, "rejected": SAID}
    before = json.dumps(row)
    pair_of(row)
    assert json.dumps(row) == before
