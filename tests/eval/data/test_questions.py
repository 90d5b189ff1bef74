"""From a question and a template to an item: prompts that are equal, those that are not, and markers by number."""

import json

import numpy as np
import PIL.Image
import pytest

from eval.data.questions import Origin, Question, digest, make_item
from glm4v_jax.errors import DataError
from tests.eval.helpers_eval import png


def asked(folder, *media, text="What?", system=None):
    item = make_item(Question("x", {"question": text}, {}, media), "{{ question }}", system, folder, "here")
    json.dumps(item.asked)
    return item.asked


def image(source):
    return {"type": "image", "url" if ":" in source else "path": source}


def test_the_prompt_includes_the_text_and_the_system_message():
    assert asked(".") == asked("elsewhere")
    assert len({json.dumps(one) for one in (asked("."), asked(".", text="Who?"), asked(".", system="Be brief."))}) == 3
    item = make_item(Question("x", {"question": "What?"}, {}), "{{ question }}", "Be brief.", ".", "here")
    assert [message["role"] for message in item.messages] == ["system", "user"]


def test_the_prompt_includes_images_in_memory_by_content():
    red, blue = ({"type": "image", "image": png(colour=colour)} for colour in ("red", "blue"))
    assert asked(".", red) == asked("elsewhere", red) != asked(".", blue)


@pytest.mark.parametrize("scheme", ["path", "file"])
def test_the_prompt_includes_files_by_content_wherever_they_are(tmp_path, scheme):
    """An image, a video, and the frames of one."""
    content = {"a.png": png(80, 40, "red"), "v.mp4": b"one video", "b.png": png(20, 10, "blue")}
    here, there = tmp_path / "here", tmp_path / "there"

    def prompts(folder, **changed):
        folder.mkdir(exist_ok=True)
        for name, data in {**content, **changed}.items():
            (folder / name).write_bytes(data)
        a, v, b = (name if scheme == "path" else (folder / name).as_uri() for name in content)
        video = {"type": "video", "path" if scheme == "path" else "url": v}
        return [asked(folder, one) for one in (image(a), video, {"type": "video", "video": [a, b]})]

    def equal(first, second):
        return [a == b for a, b in zip(first, second, strict=True)]

    before = prompts(here)
    assert prompts(here) == before
    # An address includes the folder; of frames only the digests count.
    assert equal(prompts(there), before) == [scheme == "path", scheme == "path", True]
    changed = {"a.png": png(80, 40, "green"), "v.mp4": b"another video"}
    assert equal(after := prompts(here, **changed), before) == [False] * 3
    assert equal(prompts(here, **changed, **{"b.png": png(20, 10, "green")}), after) == [True, True, False]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{{ hint }}", r"prompt: found an error \('hint' is undefined\); expected a template over question"),
        # Templates of others run in a sandbox.
        ("{{ question.__class__.__mro__ }}", "prompt: .*unsafe"),
        ("{{ question + 1 }}", "prompt: .*can only concatenate"),
    ],
)
def test_errors_of_templates_name_the_fields(prompt, message):
    with pytest.raises(DataError, match=message):
        make_item(Question("x", {"question": "What?"}, {}), prompt, None, ".", "here")


def test_markers_with_numbers_show_images_again():
    red, blue = ({"type": "image", "image": png(colour=colour)} for colour in ("red", "blue"))
    question = Question("x", {"question": "<image 2> or <image 1>, <image 2>"}, {}, [red, blue], is_marked=True)
    item = make_item(question, "{{ question }}", None, "", "here")
    assert item.images == [blue["image"], red["image"], blue["image"]]


@pytest.mark.parametrize("marker", ["<image 3>", "<image 0>", "<video>"])
def test_a_marker_without_an_image_is_an_error(marker):
    images = [{"type": "image", "image": png()}] * 2
    with pytest.raises(DataError, match=f"prompt: found {marker} with [02] (image|video)s in the row"):
        make_item(Question("x", {"question": marker}, {}, images, is_marked=True), "{{ question }}", None, "", "here")


def test_digests_are_of_pixels_and_their_shape():
    frames = [np.zeros((2, 3, 3), np.uint8), np.ones((2, 3, 3), np.uint8)]
    assert digest(frames) == digest([frame.copy() for frame in frames]) != digest(frames[::-1])
    assert digest(np.zeros((2, 3, 3), np.uint8)) != digest(np.zeros((3, 2, 3), np.uint8))
    picture = PIL.Image.new("RGB", (3, 2))
    assert digest(picture) == digest(np.asarray(picture))


def test_rows_and_splits_are_named_after_the_file(tmp_path):
    origin = Origin(tmp_path / "testA-00000-of-00002.parquet", 3, 5)
    assert (origin.name, origin.split) == ("testA-00000-of-00002:3", "testA")
