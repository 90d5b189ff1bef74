"""Records by their number: from any file, in any order, each with its place."""

import json
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest

from glm4v_jax.errors import DataError
from glm4v_jax.inputs.text.messages import extract_media
from train.data.records import Record, read_records

OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def row(n, **fields):
    messages = [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]
    return {"messages": messages} | fields


def shown(path):
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]
    return {"messages": messages, "images": [path]}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def answer(record):
    return record.messages[-1]["content"][0]["text"]


def test_records_of_several_files_are_one_sequence(tmp_path):
    first = write(tmp_path / "a.jsonl", [row(n) for n in range(3)])
    second = write(tmp_path / "b.json", [row(n) for n in range(3, 5)])
    records = read_records([second, first])
    assert len(records) == 5
    assert [answer(record) for record in records] == [f"answer {n}" for n in (3, 4, 0, 1, 2)]
    assert [records[i].source for i in (1, 2, -1)] == [f"{second}[1]", f"{first}:1", f"{first}:3"]
    assert records.place(4) == f"{first}:3"
    assert [record.source for record in records[1:3]] == [f"{second}[1]", f"{first}:1"]
    assert answer(read_records(tmp_path)[3]) == "answer 3"
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"record {index} of 5"):
            records[index]


def test_the_digest_covers_all_of_small_data_and_samples_of_large(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    line = json.dumps(row(0)) + "\n"
    text = line * (4 * 2**20 // len(line))
    found = []
    for limit in (2**28, 2**20):
        monkeypatch.setattr("train.data.records._HASHED", limit)
        for changed in (text, text[:1_030_000] + "X" + text[1_030_001:]):  # between two samples
            path.write_text(changed)
            found.append(read_records(path).fingerprint())
    assert found[0] != found[1] and found[2] == found[3]


def test_a_record_has_messages_losses_and_its_place(tmp_path):
    path = write(tmp_path / "data.jsonl", [shown("a.png")])
    (record,) = read_records(str(path))
    assert record == Record(
        (
            {
                "role": "user",
                "content": [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "!"}]},
        ),
        (False, True),
        f"{path}:1",
    )
    assert extract_media(record.messages, "'image'") == ([str(tmp_path / "a.png")], [])


@hypothesis.given(st.permutations(range(12)))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=20)
def test_pickled_records_read_the_same_in_any_order(tmp_path, order):
    if not (tmp_path / "c.json").exists():
        write(tmp_path / "a.jsonl", [row(n) for n in range(5)])
        write(tmp_path / "b.jsonl", [row(5)])
        write(tmp_path / "c.json", [row(n) for n in range(6, 12)])
    records = pickle.loads(pickle.dumps(read_records(tmp_path)))
    assert [answer(records[n]) for n in order] == [f"answer {n}" for n in order]


def test_parquet_tables_may_hold_image_bytes(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    rows = [row(0, images=[]), row(1, images=None), shown({"bytes": b"abc", "path": "a.png"})]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    records = read_records(path)
    assert [len(record.media("image")) for record in records] == [0, 0, 1]
    assert records[2].media() == [{"type": "image", "image": b"abc"}]
    assert records[2].source == f"{path}[2]"


def test_a_bad_row_is_named_and_does_not_affect_others(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join([json.dumps(row(0)), "", "{", json.dumps(shown("a.png") | {"images": []}), json.dumps(row(1))])
    )
    records = read_records(path)
    assert len(records) == 4
    with pytest.raises(DataError, match=r"data\.jsonl:3: found invalid JSON"):
        records[1]
    with pytest.raises(DataError, match=r"data\.jsonl:4: images: found 0 for 1 <image> marker"):
        records[2]
    assert answer(records[3]) == "answer 1"


def test_a_box_in_a_missing_image_is_a_bad_row(tmp_path):
    objects = {"ref": [], "bbox": [[1, 2, 3, 4]]}
    one = shown("none.png") | {"objects": objects}
    one["messages"][1]["content"] = "<bbox>"
    path = write(tmp_path / "data.json", [one])
    with pytest.raises(DataError, match=r"data\.json\[0\]: .*none\.png: found no such file"):
        read_records(path)[0]


def test_boxes_read_the_size_from_the_file(tmp_path):
    skimage_data = pytest.importorskip("skimage.data")
    import PIL.Image

    PIL.Image.fromarray(skimage_data.coffee()).save(tmp_path / "cup.png")
    one = shown("cup.png") | {"objects": {"ref": [], "bbox": [[150, 100, 450, 300]]}}
    one["messages"][1]["content"] = "<bbox>"
    # 600 x 400 pixels.
    assert answer(read_records(write(tmp_path / "data.json", [one]))[0]) == "[250,250,750,750]"


def test_relative_paths_are_joined_to_media_dir(tmp_path):
    path = write(tmp_path / "data.jsonl", [shown("a.png"), shown("/b.png"), shown("https://h/c.png")])
    items = [record.media()[0] for record in read_records(path, media_dir="/pictures")]
    assert [item.get("path", item.get("url")) for item in items] == ["/pictures/a.png", "/b.png", "https://h/c.png"]


def test_a_given_format_is_not_detected(tmp_path):
    one = {"messages": row(0)["messages"], "images": ["a.png"]}
    path = write(tmp_path / "data.json", [one])
    with pytest.raises(DataError, match="found 1 for 0 <image> markers"):
        read_records(path, format="openai")[0]
    for records, name in ((read_records(path), "openai"), (read_records(path, format="hf"), "hf")):
        assert records[0].media() == [{"type": "image", "path": str(tmp_path / "a.png")}]
        assert records.format(0) == name
    with pytest.raises(DataError, match="format: found 'csv'; expected one of openai, sharegpt"):
        read_records(path, format="csv")


def test_missing_files_are_errors(tmp_path):
    with pytest.raises(DataError, match="source: found no file"):
        read_records([])
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.jsonl")


# Entries as LLaMA-Factory's data/README.md has them.


@pytest.fixture
def described(tmp_path):
    write(
        tmp_path / "dataset_info.json",
        {
            "mllm_demo": {
                "file_name": "demo/mllm.json",
                "formatting": "sharegpt",
                "columns": {"messages": "messages", "images": "images"},
                "tags": OPENAI_TAGS,
            },
            "alpaca_own": {
                "file_name": "own.jsonl",
                "columns": {"prompt": "q", "query": "more", "response": "a", "system": "sys", "history": "before"},
            },
            "chats": {
                "file_name": "chats",
                "formatting": "sharegpt",
                "columns": {"messages": "talk", "images": "pictures", "system": "sys"},
                "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "me", "assistant_tag": "you"},
            },
            "hub": {"hf_hub_url": "somebody/something"},
            "preferences": {"file_name": "p.json", "ranking": True},
            "wrong": {"file_name": "own.jsonl", "formatting": "chatml"},
            "tagged": {
                "file_name": "demo/mllm.json",
                "formatting": "openai",
                "columns": {"messages": "messages", "images": "images"},
                "tags": OPENAI_TAGS,
            },
            "untagged": {"file_name": "demo/mllm.json", "formatting": "openai", "columns": {"images": "images"}},
            "lacking": {
                "file_name": "lacking.json",
                "formatting": "openai",
                "columns": {"images": "images"},
                "tags": {},
            },
            "unknown": {"file_name": "own.jsonl", "columns": {"question": "q"}},
            "untyped": {"file_name": "own.jsonl", "columns": ["q"]},
            "chosen": {"file_name": "own.jsonl", "columns": {"chosen": "c"}},
        },
    )
    write(tmp_path / "demo" / "mllm.json", [shown("mllm_demo_data/1.jpg")])
    write(tmp_path / "lacking.json", [row(0, images=["a.png"])])
    before = [["b", "c"]]
    unnamed = {"system": "t", "history": [["u", "v"]], "tools": "w", "images": ["x.png"]}
    own = {"q": "one", "more": "two", "a": "three", "sys": "s", "before": before}
    write(tmp_path / "own.jsonl", [own | unnamed])
    talk = [{"who": "me", "said": "<image>?"}, {"who": "you", "said": "!"}]
    write(tmp_path / "chats" / "x.jsonl", [{"talk": talk, "pictures": "cat.png", "images": ["dog.png"], "sys": "s"}])
    return tmp_path


def test_dataset_info_names_the_columns(described):
    (record,) = read_records(f"{described}/dataset_info.json:mllm_demo")
    # LLaMA-Factory's paths are relative to its directory of data.
    assert record.media() == [{"type": "image", "path": str(described / "mllm_demo_data/1.jpg")}]
    for name in ("tagged", "untagged"):
        assert list(read_records(f"{described}/dataset_info.json:{name}")) == [record]
    with pytest.raises(DataError, match="images: found 1 for 0 <image> markers"):
        read_records(f"{described}/dataset_info.json:lacking")[0]
    (record,) = read_records(f"{described}/dataset_info.json:alpaca_own")
    texts = [message["content"][0]["text"] for message in record.messages]
    assert texts == ["s", "b", "c", "one\ntwo", "three"]
    assert record.losses == (False, False, True, False, True)
    (record,) = read_records(described / "dataset_info.json:chats")
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant"]
    assert record.media() == [{"type": "image", "path": str(described / "cat.png")}]
    assert record.source == f"{described / 'chats' / 'x.jsonl'}:1"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (":hub", "dataset_info.json:hub: file_name: found none; expected a file: nothing is downloaded"),
        (":preferences", "found preferences; expected .*, or a job with .preference."),
        (":wrong", "formatting: found 'chatml'; expected one of alpaca, sharegpt, openai"),
        (":unknown", "columns.question: found an unknown field; expected some of .*prompt, query"),
        (":untyped", "columns: found a list; expected an object of strings"),
        (":chosen", "found preferences; expected conversations"),
        (":none", "found the name 'none'; expected .*dataset_info.json:NAME with one of mllm_demo, alpaca_own"),
        ("", "found no name of a data set; expected .*dataset_info.json:NAME with one of"),
    ],
)
def test_invalid_data_sets_are_named(described, name, says):
    with pytest.raises(DataError, match=says):
        read_records(f"{described}/dataset_info.json{name}")


def test_a_directory_with_several_data_sets_needs_a_name(described):
    with pytest.raises(DataError, match="found no name of a data set"):
        read_records(described)
    only = {"it": {"file_name": "own.jsonl", "columns": {"prompt": "q", "response": "a"}}}
    write(described / "dataset_info.json", only)
    # What no column names is not read.
    (record,) = read_records(described)
    assert [message["content"][0]["text"] for message in record.messages] == ["one", "three"]


@pytest.mark.parametrize(("content", "found"), [("[", "invalid JSON"), ("[]", "a list; expected an object")])
def test_an_invalid_dataset_info_is_named(tmp_path, content, found):
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(DataError, match=found):
        read_records(tmp_path)


def test_a_directory_that_datasets_saved_is_data_and_its_caches_are_not(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.ipc

    write(tmp_path / "dataset_info.json", {"features": {}, "citation": ""})
    write(tmp_path / "state.json", {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    table = pa.Table.from_pylist([shown({"bytes": b"abc", "path": None})])
    for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
        with pyarrow.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    (record,) = read_records(tmp_path)
    assert record.media() == [{"type": "image", "image": b"abc"}]
