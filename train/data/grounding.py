"""Boxes and points of ms-swift's `objects` as GLM-4.1V writes them.

The model's coordinates are integers from 0 to 1000 along each axis of the original image: round(1000 * x / width),
round(1000 * y / height), whatever the size it is resized to; see `glm4v_jax.generate.text.boxes`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm4v_jax.config.checks import fits
from glm4v_jax.data.media import MediaItem, kind_of
from glm4v_jax.errors import counted
from glm4v_jax.generate.text.boxes import SCALE
from train.data.conversations import Message, invalid

SizeOf = Callable[[MediaItem], tuple[int, int]]
"""MediaItem of an image -> its width and height in pixels."""

_PLACEHOLDER = re.compile("<ref-object>|<bbox>")
_FIELDS = {"<ref-object>": "ref", "<bbox>": "bbox"}


def place_objects(messages: Sequence[Message], objects: Any, size_of: SizeOf) -> list[Message]:
    """Replace `<ref-object>` by names and `<bbox>` by boxes.

    A box becomes `[x1,y1,x2,y2]` and a point `[x,y]`; box tokens and outer brackets belong to the data, as in
    `<|begin_of_box|>[<bbox>,<bbox>]<|end_of_box|>`.

    Args:
        messages: with typed items; not changed.
        objects: `{"ref": [names], "bbox": [boxes], "bbox_type": "real" | "norm1", "image_id": [index of an image]}`;
            boxes are (x1, y1, x2, y2) or (x, y), in pixels of their image or from 0 to 1; without `image_id` the image
            is the first.
        size_of: of an image; called only for pixels.

    Raises:
        DataError: more or fewer placeholders than names or boxes; a box is invalid, or not within its image.
        MediaError: `size_of` does not find the image.
    """
    if not isinstance(objects, Mapping):
        raise invalid("objects", kind_of(objects), "an object with 'ref' and 'bbox'")
    values = {name: _list_of(objects, name) for name in ("ref", "bbox", "image_id")}
    texts = [item["text"] for message in messages for item in message["content"] if item["type"] == "text"]
    for placeholder, name in _FIELDS.items():
        count = sum(text.count(placeholder) for text in texts)
        if count != len(values[name]):
            raise invalid(f"objects.{name}", f"{len(values[name])} for {count} {placeholder}", "as many")
    for index, name in enumerate(values["ref"]):
        if not isinstance(name, str):
            raise invalid(f"objects.ref[{index}]", kind_of(name), "a string")
    images = [item for message in messages for item in message["content"] if item["type"] == "image"]
    boxes = _write_boxes(values["bbox"], values["image_id"], objects.get("bbox_type"), images, size_of)
    pending = {"<ref-object>": iter(values["ref"]), "<bbox>": iter(boxes)}

    def replaced(item: MediaItem) -> MediaItem:
        if item["type"] != "text":
            return item
        return item | {"text": _PLACEHOLDER.sub(lambda match: next(pending[match[0]]), item["text"])}

    return [message | {"content": [replaced(item) for item in message["content"]]} for message in messages]


def _list_of(objects: Mapping[str, Any], name: str) -> list[Any]:
    value = objects.get(name)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise invalid(f"objects.{name}", kind_of(value), "a list")
    return list(value)


def _write_boxes(
    boxes: Sequence[Any], image_ids: Sequence[Any], bbox_type: Any, images: Sequence[MediaItem], size_of: SizeOf
) -> list[str]:
    if bbox_type not in (None, "real", "norm1"):
        raise invalid("objects.bbox_type", repr(bbox_type), "'real' or 'norm1'")
    written = []
    sizes: dict[int, tuple[int, int]] = {}
    for index, box in enumerate(boxes):
        field = f"objects.bbox[{index}]"
        width = height = 1
        if bbox_type != "norm1":
            image = image_ids[index] if index < len(image_ids) else 0
            if not isinstance(image, int) or not 0 <= image < len(images):
                raise invalid(
                    field, f"a box of image {image!r} in a conversation with {counted(len(images), 'image')}",
                    "an index of one of them in 'objects.image_id'",
                )  # fmt: skip
            if image not in sizes:
                sizes[image] = size_of(images[image])
            width, height = sizes[image]
        written.append(_write_box(box, width, height, field))
    return written


def _write_box(box: Any, width: int, height: int, field: str) -> str:
    if not isinstance(box, list | tuple) or len(box) not in (2, 4) or not all(fits(value, float) for value in box):
        raise invalid(field, repr(box), "4 numbers, or 2 for a point")
    scaled = [round(SCALE * value / (height if axis % 2 else width)) for axis, value in enumerate(box)]
    if not all(0 <= value <= SCALE for value in scaled):
        where = f"an image of {width} x {height} pixels" if (width, height) != (1, 1) else "0 to 1"
        raise invalid(field, repr(list(box)), f"coordinates within {where}")
    if len(box) == 4 and not (box[0] <= box[2] and box[1] <= box[3]):
        raise invalid(field, repr(list(box)), "the top left corner before the bottom right one")
    return f"[{','.join(map(str, scaled))}]"
