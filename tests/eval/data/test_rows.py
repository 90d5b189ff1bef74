"""Our own rows: what becomes of each field, and the errors of invalid ones."""

import base64
import json
import re

import PIL.Image
import pytest

from eval.data import fields
from eval.read_items import read_items
from eval.tasks import Task
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.text.messages import extract_media
from glm4v_jax.tiny import TINY_CHECKPOINT
from tests.eval.helpers_eval import png

TASK = Task("test", "exact_match")
ROW = {"question": "What?", "answer": "a"}
MARKED = {"question": "Is <image> like <image>?", "images": ["a.png", "b.png"], "answer": "yes"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png(80, 40, "red"))
    (tmp_path / "b.png").write_bytes(png(80, 40, "blue"))
    (tmp_path / "v.mp4").write_bytes(b"is not read")
    return tmp_path


def one(folder, row, task=TASK):
    path = folder / "data.jsonl"
    path.write_text(json.dumps(row))
    (item,) = read_items(task, [path])
    json.dumps([item.asked, dict(item.reference)])
    return item


def test_images_stand_before_the_question_or_at_their_markers(folder):
    item = one(folder, {"question": "What?", "image": "a.png", "video": "v.mp4", "answer": 3})
    assert [part["type"] for part in item.messages[0]["content"]] == ["image", "video", "text"]
    assert item.images == [str(folder / "a.png")]
    assert (item.id, item.question, item.reference["answer"]) == ("0", "What?", "3")
    assert item.place == f"{folder / 'data.jsonl'}:1"

    content = one(folder, MARKED).messages[0]["content"]
    assert [part.get("text", part.get("path")) for part in content] == [
        "Is ", str(folder / "a.png"), " like ", str(folder / "b.png"), "?",
    ]  # fmt: skip


def test_frames_of_a_video_may_be_paths_addresses_and_base64(folder):
    text = base64.b64encode(png()).decode()
    frames = ["a.png", "HTTP://host/1.png", (folder / "b.png").as_uri(), f"data:image/png;base64,{text}", text]
    (video, _) = one(folder, {**ROW, "video": frames}).messages[0]["content"]
    assert video["video"] == [str(folder / "a.png"), *frames[1:4], f"data:image/unknown;base64,{text}"]


def test_the_processor_takes_all_frames_at_the_rate_of_the_row(folder):
    text = base64.b64encode(png(80, 40)).decode()
    row = {**ROW, "video": ["a.png", (folder / "b.png").as_uri(), text, "b.png"]}
    items = [one(folder, {**row, **more}) for more in ({}, {"fps": 2}, {"fps": 0.5})]
    assert items[0].asked == items[1].asked != items[2].asked
    processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    for item, rate in ((items[0], 2), (items[2], 0.5)):
        _, (video,) = extract_media(item.messages, source="")
        features = processor.video_processor(videos=[[video]], return_metadata=True)
        (metadata,) = features["video_metadata"]
        assert (len(metadata.frames_indices), metadata.fps) == (4, rate)
        assert features["video_grid_thw"].tolist()[0][0] == 2  # of two frames each


def test_a_directory_of_frames_is_a_video(folder):
    (folder / "clip").mkdir()
    for index in range(4):
        PIL.Image.new("RGB", (56, 56), (index, 0, 0)).save(folder / f"clip/{index}.png")
    items = [one(folder, {**ROW, "video": "clip", **more}) for more in ({}, {"fps": 0.5})]
    names = [f"clip/{index}.png" for index in range(4)]
    lists = [one(folder, {**ROW, field: names, "fps": 0.5}) for field in ("video", "videos")]
    processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    for item, rate in zip([*items, *lists], (2, 0.5, 0.5, 0.5), strict=True):
        _, videos = extract_media(item.messages, source="")
        (metadata,) = processor.video_processor(videos=videos, return_metadata=True)["video_metadata"]
        assert (len(metadata.frames_indices), metadata.fps) == (4, rate)
    assert [item.asked["content"][0]["path"] for item in items] == ["clip"] * 2
    PIL.Image.new("RGB", (56, 56)).save(folder / "clip/0.png")
    assert one(folder, {**ROW, "video": "clip"}).asked == items[0].asked
    PIL.Image.new("RGB", (56, 56), (9, 9, 9)).save(folder / "clip/0.png")
    assert one(folder, {**ROW, "video": "clip"}).asked != items[0].asked


def test_fields_reach_the_metric_and_the_template(folder):
    task = Task("test", "mcq", prompt="{{ hint }}: {{ question }} {{ options.B }}")
    row = {"question": "Which?", "hint": "Look", "options": ["red", "blue"], "answer": "B", "group": "art", "level": 2}
    item = one(folder, row, task)
    assert item.question == "Look: Which? blue"
    assert item.group == "art"
    assert item.reference == {"hint": "Look", "options": {"A": "red", "B": "blue"}, "answer": "B", "level": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"images": "a.png"}, {"images": "['a.png']"}, {"images": ["a.png", None]}, {"image": "a.png", "images": [""]},
        {"image": "a.png", "video": {"bytes": None, "path": None}, "videos": "[]"},
    ],
)  # fmt: skip
def test_images_may_be_one_or_spelled_and_empty_ones_are_skipped(folder, fields):
    assert one(folder, {"question": "What?", "answer": 3, **fields}).images == [str(folder / "a.png")]


@pytest.mark.parametrize("size", [{}, {"width": 1000, "height": 1000}])
def test_boxes_are_in_pixels_of_the_first_image_unless_there_is_a_size(folder, size):
    row = {"question": "it", "image": "a.png", "boxes": [[8, 4, 40, 20]], **size}
    reference = one(folder, row, Task("test", "refcoco")).reference
    assert {"width": 80, "height": 40, **size}.items() <= reference.items()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "a"}, r"question: found nothing; expected the field beside answer"),
        ({"question": " ", "answer": "a"}, r"question: found ' '; expected text"),
        ({"question": "What?"}, r"answer or answers or boxes: found nothing"),
        ({**ROW, "answer": ["a"]}, r"answer: found a list; expected text or a number"),
        ({**ROW, "answers": []}, r"answers: found an empty list"),
        ({**ROW, "answers": [None]}, r"answers: found null; expected a list of texts"),
        ({**ROW, "options": "red"}, r"options: found 'red'; expected a list"),
        ({**ROW, "options": []}, r"options: found 0 options; expected 1 to 26"),
        ({"question": "What?", "boxes": [[1, 2, 3]]}, r"boxes: found \[1, 2, 3\]; expected four numbers"),
        ({"question": "What?", "boxes": 3}, r"boxes: found the number 3; expected a list"),
        ({**ROW, "id": 1.5}, r"id: found the number 1.5"),
        ({**ROW, "group": 3}, r"group: found the number 3"),
        ({**ROW, "image": "c.png"}, r"c\.png: found no such file"),
        ({**ROW, "image": 3}, r"image: found the number 3"),
        ({**ROW, "images": 3}, r"images: found the number 3"),
        ({**ROW, "image": "v.mp4"}, r"v\.mp4: found no readable image"),
        ({**ROW, "video": "w.mp4"}, r"video: found .*w\.mp4, no such file"),
        ({**ROW, "video": ["a.png", "c.png"]}, r"video: found .*c\.png, no such file"),
        ({**ROW, "video": ["file:///c/c.png"]}, r"video: found file:///c/c\.png, no such file"),
        ({**ROW, "video": "file:///c/w.mp4"}, r"video: found file:///c/w\.mp4, no such file"),
        ({**ROW, "video": ["file://c/c.png"]}, r"found the machine 'c'"),
        ({**ROW, "video": ["a.png"], "fps": 0}, r"fps: found the number 0; expected a number above 0"),
        ({**ROW, "video": ["a.png"], "fps": "2"}, r"fps: found '2'; expected a number above 0"),
        ({**MARKED, "images": ["a.png"]}, r"question: found 2 <image> for 1 image; expected as many"),
        ([1], r"found a list; expected an object"),
    ],
)
def test_an_invalid_row_is_an_error_with_place_and_field(folder, row, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}/data\.jsonl:1: .*{message}"):
        one(folder, row)


def test_lists_in_text_are_read_and_nothing_is_evaluated():
    assert fields.literal_list("['a', \"b, c\"]") == ["a", "b, c"]
    for harmless in ("[Yes, No]", "[" * 1000, "[1, 2", "__import__('os')", "['a'] + 1", "{'a': 1}", " text"):
        assert fields.literal_list(harmless) == harmless
    assert fields.texts({"a": "[1, 2]"}, "a") == ["[1, 2]"]
    assert fields.texts({"a": "[1, 2]"}, "a", is_literal=True) == ["1", "2"]
