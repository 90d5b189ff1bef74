"""Bounding boxes and points that an answer names, as pixels of the image, and drawn on it.

The model gives coordinates as numbers from 0 to 1000 along each axis of the *original* image, whatever the size to
which it was resized: x / width * 1000, y / height * 1000, top left before bottom right.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from glm4v_jax.config.thinking import THINKING, ThinkingFormat
from glm4v_jax.errors import GenerationError, counted
from glm4v_jax.generate.text.thinking import parse

SCALE = 1000
"""The coordinate of the right and of the bottom edge."""

# Chinese answers may use full-width digits, punctuation and brackets.
_NARROW = str.maketrans(
    "０１２３４５６７８９．，、；－＋［］（）｛｝＜＞【】〔〕〈〉《》", "0123456789.,,;-+[](){}<>[]()<><>"
)

_NUMBER = r"[-+]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
_BETWEEN = r"(?:\s*+[,;]\s*+|\s++)"
_GROUP = r"[\[({{<]\s*+({number}(?:{between}{number}){{{more}}})\s*+,?\s*+[\])}}>]"
_BOX = re.compile(_GROUP.format(number=_NUMBER, between=_BETWEEN, more=3))
_POINT = re.compile(_GROUP.format(number=_NUMBER, between=_BETWEEN, more=1))

# Bright colours with a black rim: on any ground one of the two is seen.
_COLOURS = ("#ffe119", "#42d4f4", "#f58231", "#bfef45", "#ff8fd8", "#ffffff")
_RIM = "#000000"


def find_boxes(
    text: str, limit: float = SCALE, *, thinking: ThinkingFormat = THINKING["tagged"]
) -> list[tuple[float, float, float, float]]:
    """Return the boxes (x1, y1, x2, y2) that the answer in `text` names, from 0 to 1000, as and in the order written.

    A box is four numbers in brackets of any style, `[]`, `()`, `<>` or `{}`, inside other brackets or not, with commas,
    semicolons or whitespace between them. Four numbers of which one is beyond 0 to 1000, such as years, are not a box.
    Boxes inside box tokens win; without any, those of the whole answer count. Never raises.

    Args:
        text: all that was generated.
        limit: the largest coordinate, for answers of another scale: 1 for shares, `math.inf` for pixels.
        thinking: how the model writes thoughts.
    """
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in _find(_BOX, text, limit, thinking)]


def find_points(
    text: str, limit: float = SCALE, *, thinking: ThinkingFormat = THINKING["tagged"]
) -> list[tuple[float, float]]:
    """Return the points (x, y) that the answer in `text` names, two numbers in brackets; else as `find_boxes`."""
    return [(x, y) for x, y in _find(_POINT, text, limit, thinking)]


def _find(pattern: re.Pattern[str], text: str, limit: float, thinking: ThinkingFormat) -> list[list[float]]:
    parsed = parse(text, thinking)
    return _groups(pattern, "\n".join(parsed.boxed), limit) or _groups(pattern, parsed.answer, limit)


def _groups(pattern: re.Pattern[str], text: str, limit: float) -> list[list[float]]:
    matches = pattern.finditer(text.translate(_NARROW))
    groups = [[float(number) for number in re.findall(_NUMBER, match[1])] for match in matches]
    return [group for group in groups if all(math.isfinite(value) and 0 <= value <= limit for value in group)]


def to_pixels(boxes: Iterable[Sequence[float]] | Sequence[float], width: int, height: int) -> list[tuple[int, ...]]:
    """Scale boxes, or points, to pixels of the original image.

    Args:
        boxes: (x1, y1, x2, y2) or (x, y), from 0 to 1000; or only one.
        width, height: of the original image, in pixels.

    Returns:
        Rounded pixels within the image, each of the length it came in. Boxes have their corners in order and end at
        edges, from 0 to `width` and `height`, as `PIL.Image.crop` takes them; points are pixels that exist, up to
        `width - 1` and `height - 1`.

    Raises:
        GenerationError: a number is not finite, something is neither box nor point, or the image is empty.
    """
    if width < 1 or height < 1:
        raise GenerationError(f"image: found {width} x {height} pixels; expected at least 1 x 1")
    pixels: list[tuple[int, ...]] = []
    for box in _several(boxes):
        if len(box) not in (2, 4) or not all(math.isfinite(value) for value in box):
            raise GenerationError(f"box: found {tuple(box)}; expected 4 finite numbers, or 2 for a point")
        last = 0 if len(box) == 4 else 1
        xs = sorted(_scaled(x, width, width - last) for x in box[::2])
        ys = sorted(_scaled(y, height, height - last) for y in box[1::2])
        pixels.append(tuple(value for corner in zip(xs, ys, strict=True) for value in corner))
    return pixels


def _scaled(coordinate: float, size: int, last: int) -> int:
    return min(max(round(coordinate * size / SCALE), 0), last)


def _several(boxes: Iterable[Sequence[float]] | Sequence[float]) -> Iterable[Sequence[float]]:
    """Boxes, of which there may be only one."""
    given: list[Any] = list(boxes)
    return [given] if given and not hasattr(given[0], "__len__") else given


def draw_boxes(
    image: Image.Image, boxes: Iterable[Sequence[float]] | Sequence[float], labels: Sequence[str] | str = ()
) -> Image.Image:
    """Draw boxes, and points as small crosses, on an RGB copy of an image, in bright colours with a black rim.

    Args:
        image: the original image, or the same at any other size.
        boxes: (x1, y1, x2, y2) or (x, y), from 0 to 1000, as `find_boxes` and `find_points` return them; or only one.
        labels: what to write next to the first, second, ... of them; there may be fewer. A text is that of the first.

    Raises:
        GenerationError: as `to_pixels` does, or there are more labels than boxes.
    """
    labels = [labels] if isinstance(labels, str) else labels
    pixels = to_pixels(boxes, *image.size)
    if len(labels) > len(pixels):
        raise GenerationError(
            f"labels: found {len(labels)} for {counted(len(pixels), 'box', 'boxes')}; expected at most one a box"
        )
    drawn = image.convert("RGB") if image.mode != "RGB" else image.copy()
    draw = ImageDraw.Draw(drawn)
    line = max(1, round(min(drawn.size) / 200))
    for index, box in enumerate(pixels):
        colour = _COLOURS[index % len(_COLOURS)]
        if len(box) == 4:
            _outline(draw, box, colour, line, drawn.size)
        else:
            _cross(draw, box, colour, line)
        if index < len(labels):
            _label(draw, labels[index], (box[0], box[1]), colour, line, drawn.size)
    return drawn


def _outline(draw: ImageDraw.ImageDraw, box: Sequence[int], colour: str, line: int, size: tuple[int, int]) -> None:
    """Three lines side by side, rim, colour, rim, within the image so that a box at its border is seen whole."""
    left, top, right, bottom = box
    # Right and bottom are edges, that is, one past the last pixel.
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)
    right, bottom = max(right - 1, left), max(bottom - 1, top)
    draw.rectangle((left, top, right, bottom), outline=_RIM, width=3 * line)
    inner = (left + line, top + line, right - line, bottom - line)
    if inner[0] <= inner[2] and inner[1] <= inner[3]:
        draw.rectangle(inner, outline=colour, width=line)
    else:  # too small for three lines
        draw.rectangle((left, top, right, bottom), outline=colour, width=1)


def _cross(draw: ImageDraw.ImageDraw, point: Sequence[int], colour: str, line: int) -> None:
    x, y = point
    arm = 5 * line
    for width, fill in ((3 * line, _RIM), (line, colour)):
        draw.line((x - arm, y, x + arm, y), fill=fill, width=width)
        draw.line((x, y - arm, x, y + arm), fill=fill, width=width)


def _label(
    draw: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[int, int],
    colour: str,
    line: int,
    size: tuple[int, int],
) -> None:
    """Writes black on a plate of the box's colour, above its corner where there is room, else within the image."""
    font = ImageFont.load_default(size=max(10, 6 * line))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4 * line, bottom - top + 4 * line
    x = max(min(corner[0], size[0] - width), 0)
    y = corner[1] - height if corner[1] >= height else min(corner[1], max(size[1] - height, 0))
    draw.rectangle((x, y, x + width, y + height), fill=colour, outline=_RIM, width=line)
    draw.text((x + 2 * line - left, y + 2 * line - top), text, fill=_RIM, font=font)
