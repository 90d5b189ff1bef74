"""Images and videos of rows: every spelling as one kind of item, and the sizes of images."""

import base64
import io

import numpy as np
import PIL.Image
import pytest

from glm4v_jax.data.media import image_size, is_empty, located, media_item
from glm4v_jax.errors import MediaError


def image(path):
    return {"type": "image", "path": path}


def png(width, height):
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_base64_bytes_and_objects_are_not_changed():
    data = png(64, 64)
    encoded = base64.b64encode(data).decode()
    assert media_item("image", encoded, "images[0]") == {"type": "image", "url": f"data:image/unknown;base64,{encoded}"}
    assert media_item("image", data, "images[0]")["image"] is data
    image = PIL.Image.new("RGB", (4, 4))
    assert media_item("image", image, "images[0]")["image"] is image
    array = np.zeros((4, 4, 3), np.uint8)
    assert media_item("image", {"image": array}, "images[0]")["image"] is array
    # Long paths are paths.
    assert "path" in media_item("image", "images/" * 30 + "a.png", "images[0]")


def test_fields_of_tables_may_hold_nothing():
    for value in (None, "", " ", "[]", "{}", "null", [], [None], ["", None], {"bytes": None, "path": None}):
        assert is_empty(value), value
    for value in ("a.png", ["a.png", None], {"bytes": b"abc", "path": None}, b"abc", 0, False, np.zeros((2, 2, 3))):
        assert not is_empty(value), value


def test_sizes_are_those_of_the_image_as_it_is_oriented(tmp_path):
    skimage_data = pytest.importorskip("skimage.data")
    cat = PIL.Image.fromarray(skimage_data.chelsea())
    cat.save(tmp_path / "cat.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    cat.save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(image(str(tmp_path / "cat.png"))) == cat.size == (451, 300)
    assert image_size(image(str(tmp_path / "turned.jpg"))) == (300, 451)
    assert image_size({"type": "image", "image": (tmp_path / "cat.png").read_bytes()}) == (451, 300)
    assert image_size({"type": "image", "image": cat}) == (451, 300)
    assert image_size({"type": "image", "image": np.asarray(cat)}) == (451, 300)
    encoded = base64.b64encode((tmp_path / "cat.png").read_bytes()).decode()
    assert image_size(media_item("image", encoded, "images[0]")) == (451, 300)


def test_only_the_header_of_an_image_is_read(tmp_path):
    whole = png(300, 200)
    (tmp_path / "cut.png").write_bytes(whole[:60])
    assert image_size(image(str(tmp_path / "cut.png"))) == (300, 200)
    (tmp_path / "text.png").write_text("no image")
    for path, says in (
        ("text.png", r"found no readable image \(text\)"),
        ("none.png", "no such file"),
        (".", "found a directory"),
    ):
        with pytest.raises(MediaError, match=says):
            image_size(image(str(tmp_path / path)))


def test_only_relative_paths_are_joined_to_the_directory():
    assert located(image("a/b.png"), "/data") == image("/data/a/b.png")
    assert located(image("/a/b.png"), "/data") == image("/a/b.png")
    for item in (
        {"type": "text", "text": "a.png"},
        {"type": "image", "url": "https://h/a.png"},
        {"type": "image", "image": b"a"},
    ):
        assert located(item, "/data") == item
    frames = {"type": "video", "video": ["1.png", "https://h/2.png", b"3"], "fps": 2}
    assert located(frames, "/data") == frames | {"video": ["/data/1.png", "https://h/2.png", b"3"]}
