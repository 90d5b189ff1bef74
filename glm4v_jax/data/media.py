"""Images and videos of rows of data: every spelling as one kind of item, and where its files are.

An item is `{"type": "image" | "video", KEY: source}` with KEY `path` for a file, `url` for an http(s), file or data
address, and `image` or `video` for what is in memory: bytes, a Pillow image, an array, a list of frames.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from glm4v_jax.errors import DataError, MediaError
from glm4v_jax.inputs.media.decode import shortened
from glm4v_jax.inputs.media.fetch import describe, is_address, is_url
from glm4v_jax.inputs.media.load import are_frames, is_array, load_image, open_image

MediaItem = dict[str, Any]

MEDIA_FIELDS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
"""Field of a row -> kind of what it has."""

# How the base64 text of JPEG, PNG, GIF, RIFF (WebP, AVI), MP4 and Matroska begins, which no sensible path does.
_BASE64_HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "AAAAI", "AAAAH", "AAAAG", "GkXfo")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}=*\s*\Z")
_ORIENTATION = 0x0112
_SWAPPED = (5, 6, 7, 8)
"""Values of EXIF's orientation that swap width and height."""


def is_base64(text: str) -> bool:
    """Whether text is an encoded image or video, and not a path."""
    return text.startswith(_BASE64_HEADS) and _BASE64.match(text) is not None


def media_item(kind: str, value: Any, field: str) -> MediaItem:
    """Make the item of an image or video, however a row writes it.

    >>> media_item("image", {"bytes": None, "path": "cat.png"}, "image")
    {'type': 'image', 'path': 'cat.png'}

    Args:
        kind: "image" or "video".
        value: path, address, base64 text, bytes, Pillow image, array; `{"bytes": ..., "path": ...}` as in tables of
            Hugging Face; `{"url": ...}` of OpenAI; `{"type": "base64", "data": ...}` of Anthropic; for a video also a
            list of frames, each any of these.
        field: how errors name it.

    Raises:
        DataError: it is something else.
    """
    value = _unwrapped(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{field}: found an empty string; expected a path or an address")
        if is_address(value):
            return {"type": kind, "url": value}
        if is_base64(value):
            return {"type": kind, "url": f"data:{kind}/unknown;base64,{value}"}
        return {"type": kind, "path": value}
    if kind == "video" and isinstance(value, list | tuple):
        if not value:
            raise DataError(f"{field}: found no frames; expected at least one")
        return {"type": kind, kind: [source_of(media_item("image", f, f"{field}[{i}]")) for i, f in enumerate(value)]}
    if isinstance(value, bytes | bytearray | PIL.Image.Image) or is_array(value):
        return {"type": kind, kind: value}
    expected = "a path, an address, base64 or bytes" + (", or a list of frames" if kind == "video" else "")
    raise DataError(f"{field}: found {kind_of(value)}; expected {expected}")


def media_values(kind: str, value: Any) -> list[Any]:
    """The images or videos of a field that may have one or several: a list of files of images is one video's frames.

    >>> media_values("video", ["0.png", "1.png"]), media_values("video", ["a.mp4", ["0.png", "1.png"]])
    ([['0.png', '1.png']], ['a.mp4', ['0.png', '1.png']])
    """
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [values] if kind == "video" and are_frames(values, by_name=True) else values


def _unwrapped(value: Any) -> Any:
    """What an object around an image or video holds."""
    if not isinstance(value, Mapping):
        return value
    if value.get("type") == "base64" and isinstance(value.get("data"), str):
        return f"data:{value.get('media_type', 'image/unknown')};base64,{value.get('data')}"
    held = (value.get(key) for key in ("bytes", "base64", "url", "path", "image", "video"))
    return next((inner for inner in held if inner is not None), value)


def source_of(item: Mapping[str, Any]) -> Any:
    """Return what `load_image` or `load_video` takes of an item."""
    return next(item[key] for key in ("path", "url", "image", "video") if key in item)


def file_name(source: Any) -> str | None:
    """Return the name of the file that a source is, wherever it lies; None for what is in memory."""
    return os.path.basename(source) if isinstance(source, str | os.PathLike) else None


def located(item: MediaItem, directory: str | Path) -> MediaItem:
    """Return an item whose paths are joined to `directory`, which they were relative to."""
    files = {key: item[key] for key in ("path", "video") if key in item}
    return item | {key: _located(value, directory) for key, value in files.items()}


def _located(source: Any, directory: str | Path) -> Any:
    if isinstance(source, list):
        return [_located(frame, directory) for frame in source]
    return os.path.join(directory, source) if isinstance(source, str) and not is_address(source) else source


def is_remote(item: Mapping[str, Any]) -> bool:
    """Whether an item has to be downloaded."""
    return is_url(item.get("url"))


def image_size(item: Mapping[str, Any]) -> tuple[int, int]:
    """Return (width, height) of an image in pixels, oriented as its EXIF data says; of a file only the header is read.

    Raises:
        MediaError: it does not exist or is not an image; the message names it.
    """
    source = source_of(item)
    if isinstance(source, PIL.Image.Image):
        return _oriented_size(source)
    if is_array(source):
        return load_image(source).size
    # As a path, so that a missing file is not tried as base64.
    with open_image(Path(source) if "path" in item else source) as image:
        try:
            return _oriented_size(image)
        except Exception as error:  # Pillow's format readers raise many kinds of errors on broken files.
            found = f"no readable orientation ({shortened(error)})"
            raise MediaError(f"{describe(source)}: found {found}; expected an image") from error


def _oriented_size(image: PIL.Image.Image) -> tuple[int, int]:
    width, height = image.size
    # Not `image.getexif()`: that of a PNG decodes all of it, in case the orientation is stored after the pixels.
    return (height, width) if PIL.Image.Image.getexif(image).get(_ORIENTATION) in _SWAPPED else (width, height)


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing, as tables and exports write it: null, "", [], "[]", [null], {"bytes": null}."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "None")
    if isinstance(value, Mapping):
        return all(inner is None for inner in value.values())
    return value is None or (isinstance(value, list | tuple) and all(map(is_empty, value)))


def kind_of(value: Any) -> str:
    """Name the type of a value in JSON's words, for messages."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
