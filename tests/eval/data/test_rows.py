"""Our own rows and the files they stand in: what becomes of them, and what is said of broken ones."""

import base64
import csv
import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from eval.data import fields
from eval.data.questions import Origin, Question, digest, make_item
from eval.tables import open_table
from eval.tasks import Task, read_items
from glm4v_jax.errors import ConfigError, DataError, ListedError
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.text.messages import extract_media
from glm4v_jax.tiny import TINY_CHECKPOINT

TASK = Task("test", "exact_match")
MARKED = {"question": "Is <image> like <image>?", "images": ["a.png", "b.png"], "answer": "yes"}


def png(width=8, height=4, colour="red"):
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png(80, 40))
    (tmp_path / "b.png").write_bytes(png(20, 10, "blue"))
    (tmp_path / "v.mp4").write_bytes(b"not looked into")
    return tmp_path


def write(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(folder, row, task=TASK):
    (item,) = read_items(task, [write(folder, [row])])
    return item


def test_pictures_stand_before_the_question_or_where_it_says(folder):
    item = one(folder, {"question": "What?", "image": "a.png", "video": "v.mp4", "answer": 3})
    assert [part["type"] for part in item.messages[0]["content"]] == ["image", "video", "text"]
    assert item.pictures == [str(folder / "a.png")]
    assert (item.id, item.question, item.reference["answer"]) == ("0", "What?", "3")
    assert item.place == f"{folder / 'data.jsonl'}:1"

    content = one(folder, MARKED).messages[0]["content"]
    assert [part.get("text", part.get("path")) for part in content] == [
        "Is ", str(folder / "a.png"), " like ", str(folder / "b.png"), "?",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", [None, 15])
def test_of_a_table_no_more_is_read_than_is_asked_for(tmp_path, broken):
    """40 pictures of 192 KiB in one row group; then a second group that cannot be read."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    file = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(file, "PNG", compress_level=0)
    rows = [{"question": str(n), "answer": "7", "image": file.getvalue() + rng.bytes(9)} for n in range(40)]
    path = tmp_path / "data.parquet"
    options = {"use_dictionary": False, "data_page_size": 1 << 16, "write_batch_size": 1, "compression": "none"}
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=broken or 40, **options)
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        (item,) = read_items(TASK, [path], limit=1)
        assert item.pictures == [rows[0]["image"]]
        assert pool.max_memory() < 0.5 * path.stat().st_size
    finally:
        pa.set_memory_pool(before)
    if broken:
        column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
        content = bytearray(path.read_bytes())
        content[column.data_page_offset : column.data_page_offset + 16] = b"\xff" * 16
        path.write_bytes(content)
        assert len(read_items(TASK, [path], limit=8)) == 8
        with pytest.raises(DataError, match=r"data\.parquet\[8\]: cannot be read from here on"):
            read_items(TASK, [path])


def test_what_is_asked_does_not_depend_on_where_the_files_are(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "a.png").write_bytes(png(80, 40))
    row = {"id": "x", "question": "What?", "image": "a.png", "answer": "a"}
    assert one(folder, row).asked == one(other, row).asked
    assert one(folder, row).asked != one(folder, {**row, "question": "Who?"}).asked
    system = Task("test", "exact_match", system="Be brief.")
    assert one(folder, row).asked != one(folder, row, system).asked
    assert one(folder, row, system).messages[0]["role"] == "system"
    inside = {**row, "image": base64.b64encode(png()).decode()}
    changed = {**row, "image": base64.b64encode(png(colour="blue")).decode()}
    assert one(folder, inside).asked == one(other, inside).asked != one(folder, changed).asked
    json.dumps(one(folder, inside).asked)


def test_frames_of_a_video_may_be_anywhere(folder):
    """In files, whatever names them, in the net, and in the row itself."""
    text = base64.b64encode(png()).decode()
    frames = ["a.png", "HTTP://host/1.png", (folder / "b.png").as_uri(), f"data:image/png;base64,{text}", text]
    (video, _) = one(folder, {"question": "What?", "video": frames, "answer": "a"}).messages[0]["content"]
    inside = f"base64,{text}"
    assert video["video"] == [str(folder / "a.png"), *frames[1:4], f"data:image/unknown;{inside}"]


def test_frames_of_a_video_are_a_video_to_the_processor(folder):
    """All of them, at 2 a second or as many as the row says, which makes another prompt."""
    (folder / "b.png").write_bytes(png(80, 40, "blue"))
    text = base64.b64encode(png(80, 40)).decode()
    row = {"question": "What?", "answer": "a", "video": ["a.png", (folder / "b.png").as_uri(), text, "b.png"]}
    items = [one(folder, {**row, **more}) for more in ({}, {"fps": 2}, {"fps": 0.5})]
    assert items[0].asked == items[1].asked != items[2].asked
    processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    for item, rate in ((items[0], 2), (items[2], 0.5)):
        _, (video,) = extract_media(item.messages, source="")
        features = processor.video_processor(videos=[[video]], return_metadata=True)
        (metadata,) = features["video_metadata"]
        assert (len(metadata.frames_indices), metadata.fps) == (4, rate)
        assert features["video_grid_thw"].tolist()[0][0] == 2  # of two frames each


@pytest.mark.parametrize("scheme", ["path", "file"])
def test_a_changed_file_makes_another_prompt(folder, tmp_path_factory, scheme):
    """A picture, a video, and the frames of one."""

    def asked(folder):
        named = [name if scheme == "path" else (folder / name).as_uri() for name in ("a.png", "v.mp4", "b.png")]
        rows = [{"image": named[0]}, {"video": named[1]}, {"video": [named[0], named[2]]}]
        items = [one(folder, {"question": "What?", "answer": "a", **row}) for row in rows]
        json.dumps([item.asked for item in items])
        return [item.asked for item in items]

    before = asked(folder)
    assert asked(folder) == before
    other = tmp_path_factory.mktemp("other")
    for name in ("a.png", "b.png", "v.mp4"):
        (other / name).write_bytes((folder / name).read_bytes())
    # An address has the folder in it; of frames only what they show is told.
    assert [a == b for a, b in zip(asked(other), before, strict=True)] == [scheme == "path", scheme == "path", True]
    (folder / "a.png").write_bytes(png(80, 40, "green"))
    (folder / "v.mp4").write_bytes(b"another film")
    first = asked(folder)
    assert not any(a == b for a, b in zip(first, before, strict=True))
    (folder / "b.png").write_bytes(png(20, 10, "green"))
    assert [a == b for a, b in zip(asked(folder), first, strict=True)] == [True, True, False]


def test_fields_reach_the_metric_and_the_template(folder):
    task = Task("test", "mcq", prompt="{{ hint }}: {{ question }} {{ options.B }}")
    row = {"question": "Which?", "hint": "Look", "options": ["red", "blue"], "answer": "B", "group": "art", "level": 2}
    item = one(folder, row, task)
    assert item.question == "Look: Which? blue"
    assert item.group == "art"
    assert item.reference == {"hint": "Look", "options": {"A": "red", "B": "blue"}, "answer": "B", "level": 2}


def test_boxes_are_of_the_first_picture(folder):
    task = Task("test", "refcoco")
    row = {"question": "it", "image": "a.png", "boxes": [[8, 4, 40, 20]]}
    reference = one(folder, row, task).reference
    assert (reference["width"], reference["height"]) == (80, 40)
    thousandths = one(folder, {**row, "width": 1000, "height": 1000}, task).reference
    assert (thousandths["width"], thousandths["height"]) == (1000, 1000)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": "a"}, r"field 'question': missing in the row, which has 'answer'"),
        ({"question": " ", "answer": "a"}, r"field 'question': found ' ', expected text"),
        ({"question": "What?"}, r"field 'answer' or 'answers' or 'boxes': missing"),
        ({"question": "What?", "answer": ["a"]}, r"field 'answer': found a list, expected text or a number"),
        ({"question": "What?", "answers": []}, r"field 'answers': found an empty list"),
        ({"question": "What?", "answers": [None]}, r"field 'answers': found null in it"),
        ({"question": "What?", "answer": "a", "options": "red"}, r"field 'options': found 'red', expected a list"),
        ({"question": "What?", "answer": "a", "options": []}, r"field 'options': found 0 options, expected 1 to 26"),
        ({"question": "What?", "boxes": [[1, 2, 3]]}, r"field 'boxes': found \[1, 2, 3\], expected four numbers"),
        ({"question": "What?", "boxes": 3}, r"field 'boxes': found the number 3, expected a list"),
        ({"question": "What?", "answer": "a", "id": 1.5}, r"field 'id': found the number 1.5"),
        ({"question": "What?", "answer": "a", "group": 3}, r"field 'group': found the number 3"),
        ({"question": "What?", "answer": "a", "image": "c.png"}, r"c\.png: no such file"),
        ({"question": "What?", "answer": "a", "image": 3}, r"field 'image': found the number 3"),
        ({"question": "What?", "answer": "a", "images": "a.png"}, r"field 'images': found a string, expected a list"),
        ({"question": "What?", "answer": "a", "image": "v.mp4"}, r"v\.mp4: is not a readable picture"),
        ({"question": "What?", "answer": "a", "video": "w.mp4"}, r"video: found .*w\.mp4', but there is no such file"),
        ({"question": "What?", "answer": "a", "video": ["a.png", "c.png"]}, r"video: found .*c\.png', but there is no"),
        ({"question": "What?", "answer": "a", "video": ["file:///c/c.png"]}, r"video: found 'file:///c/c\.png', but"),
        ({"question": "What?", "answer": "a", "video": "file:///c/w.mp4"}, r"video: found 'file:///c/w\.mp4', but"),
        ({"question": "What?", "answer": "a", "video": ["file://c/c.png"]}, r"names the machine 'c'"),
        ({"question": "What?", "answer": "a", "video": ["a.png"], "fps": 0}, r"field 'fps': found the number 0, exp"),
        ({"question": "What?", "answer": "a", "video": ["a.png"], "fps": "2"}, r"field 'fps': found a string, expect"),
        ({**MARKED, "images": ["a.png"]}, r"field 'question': found 2 <image> for 1 images, expected as many"),
        ([1], r"found a list, expected an object"),
    ],
)
def test_what_is_wrong_with_a_row_is_named_with_its_place(folder, row, says):
    path = write(folder, [row])
    with pytest.raises(Exception, match=rf"^{re.escape(str(path))}:1: .*{says}") as error:
        read_items(TASK, [path])
    assert isinstance(error.value, ValueError)


def test_several_wrong_rows_are_told_at_once_and_the_metric_is_asked(folder):
    good = {"question": "What?", "answer": "a"}
    path = write(folder, [good, {"question": "Who?"}, good, {"answer": "a"}, *[{}] * 30])
    with pytest.raises(ListedError) as error:
        read_items(TASK, [path])
    lines = error.value.lines
    assert "found 32 wrong rows, expected none" in lines[0]
    assert lines[1].startswith(f"{path}:2: ") and lines[2].startswith(f"{path}:4: ")
    assert lines[-1] == "and 12 more"
    with pytest.raises(DataError, match=r"data\.jsonl:1: options: missing"):
        read_items(Task("test", "mcq"), [write(folder, [good])])


def test_ids_are_different(folder):
    rows = [{"id": name, "question": "What?", "answer": "a"} for name in (1, "2", "1")]
    path = write(folder, rows)
    with pytest.raises(DataError, match=rf"{path}:3: field 'id': found '1', which is also at {path}:1"):
        read_items(TASK, [path])


def test_the_first_items_only(folder):
    rows = [{"question": str(number), "answer": "a"} for number in range(9)]
    paths = [write(folder, rows, "1.jsonl"), write(folder, [*rows, {}], "2.jsonl")]
    items = read_items(TASK, paths, limit=12)
    assert [item.question for item in items] == [*"012345678", *"012"]
    assert [item.id for item in items] == [str(number) for number in range(12)]


def test_templates_name_what_is_not_there(folder):
    path = write(folder, [{"question": "What?", "answer": "a"}])
    with pytest.raises(DataError, match=r"1: prompt: 'hint' is undefined; the row has question, answer"):
        read_items(Task("test", "exact_match", prompt="{{ hint }}"), [path])
    with pytest.raises(ConfigError, match=r"prompt: found '{{ hint', expected a jinja2 template"):
        read_items(Task("test", "exact_match", prompt="{{ hint"), [path])
    with pytest.raises(DataError, match=r"prompt: .*unsafe"):  # templates of others run in a sandbox
        read_items(Task("test", "exact_match", prompt="{{ question.__class__.__mro__ }}"), [path])
    with pytest.raises(DataError, match=r"1: prompt: can only concatenate"):
        read_items(Task("test", "exact_match", prompt="{{ question + 1 }}"), [path])


def test_markers_by_number():
    pictures = [{"type": "image", "image": png(colour=colour)} for colour in ("red", "blue")]
    question = Question("x", {"question": "<image 2> or <image 1>, <image 2>"}, {}, pictures, is_marked=True)
    item = make_item(question, "{{ question }}", None, "", "here")
    assert item.pictures == [pictures[1]["image"], pictures[0]["image"], pictures[1]["image"]]
    for marker in ("<image 3>", "<image 0>", "<video>"):
        lacking = Question("x", {"question": marker}, {}, pictures, is_marked=True)
        with pytest.raises(DataError, match=rf"found {marker}, but the row has"):
            make_item(lacking, "{{ question }}", None, "", "here")


def test_a_digest_tells_pixels_apart():
    frames = [np.zeros((2, 3, 3), np.uint8), np.ones((2, 3, 3), np.uint8)]
    assert digest(frames) == digest([frame.copy() for frame in frames]) != digest(frames[::-1])
    assert digest(np.zeros((2, 3, 3), np.uint8)) != digest(np.zeros((3, 2, 3), np.uint8))
    picture = PIL.Image.new("RGB", (3, 2))
    assert digest(picture) == digest(np.asarray(picture))


def test_json_objects_of_rows(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"dataset_name": "x", "data": [{"n": 1}, [2]]}))
    rows = open_table(path)
    assert (len(rows), rows[0], rows.place(1)) == (2, {"n": 1}, f"{path}: data[1]")
    with pytest.raises(DataError, match="found a list, expected an object"):
        rows[1]
    path.write_text(json.dumps({"1": {"n": 1}, "2": {"n": 2}}, indent=1))
    rows = open_table(path)
    assert (len(rows), rows[1], rows.place(1)) == (2, {"n": 2}, f"{path}: '2'")
    path.write_text('{"n": 1}\n{"n": 2}\n')
    assert len(open_table(path)) == 2
    path.write_text('[{"n": 1}]')
    assert open_table(path)[0] == {"n": 1}
    for content, says in (("[]", "found no row"), ('{\n"n": 0}', "expected a list"), ("{", "not JSON")):
        path.write_text(content)
        with pytest.raises(DataError, match=says):
            open_table(path)
    with pytest.raises(DataError, match=r"found a file of kind \.csv, expected \.json, \.jsonl, \.parquet, \.tsv"):
        open_table(tmp_path / "data.csv")


def test_a_list_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_text('[{"n": 1}, [2]]')
    read, parse = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(text) or parse(text))
    rows = open_table(path)
    assert (len(rows), rows[0], rows.place(1)) == (2, {"n": 1}, f"{path}[1]")
    assert len(read) == 1
    with pytest.raises(DataError, match="found a list, expected an object"):
        rows[1]


def test_tsv_with_shared_pictures(tmp_path):
    image = base64.b64encode(png(64, 64)).decode()
    path = tmp_path / "data.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows(
            [["index", "image", "question", "hint"], [7, image, 'two\nlines, "quoted"', ""], [8, "7", "What?", "h"]]
        )
    limit = csv.field_size_limit()
    rows = open_table(path)
    assert csv.field_size_limit() == limit
    assert rows[0] == {"index": "7", "image": image, "question": 'two\nlines, "quoted"'}
    assert rows[1] == {"index": "8", "image": image, "question": "What?", "hint": "h"}
    assert [rows.place(index) for index in range(2)] == [f"{path}:3", f"{path}:4"]
    path.write_text("a\tb\n1\t2\t3\n")
    with pytest.raises(DataError, match=r"data\.tsv:2: found 3 cells, expected 2 as in the first line"):
        open_table(path)
    path.write_text("a\tb\n")
    with pytest.raises(DataError, match="found no row"):
        open_table(path)
    path.write_bytes(b"a\tb\n\xff\t1\n")
    with pytest.raises(DataError, match="is no readable tsv file"):
        open_table(path)


def test_lists_in_text_are_read_and_nothing_is_run():
    assert fields.literal_list("['a', \"b, c\"]") == ["a", "b, c"]
    for harmless in ("[Yes, No]", "[" * 1000, "[1, 2", "__import__('os')", "['a'] + 1", "{'a': 1}", " text"):
        assert fields.literal_list(harmless) == harmless
    assert fields.texts({"a": "[1, 2]"}, "a") == ["[1, 2]"]
    assert fields.texts({"a": "[1, 2]"}, "a", is_literal=True) == ["1", "2"]


def test_names_of_rows_and_splits(tmp_path):
    origin = Origin(tmp_path / "testA-00000-of-00002.parquet", 3, 5)
    assert (origin.name, origin.split) == ("testA-00000-of-00002:3", "testA")
