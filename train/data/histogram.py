"""A histogram as an image, drawn with Pillow."""

import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

_WIDTH, _HEIGHT = 960, 540
_LEFT, _TOP, _RIGHT, _BOTTOM = 84, 64, 24, 64
_BARS = 48
"""The most bars; their width is a round number."""
_TICKS = 8
_INK, _PALE, _BAR = "#222222", "#dddddd", "#4477aa"
_MARKS = (("median", 50, "#228833"), ("p95", 95, "#cc3311"))


def percentile(values: Sequence[int], percent: float) -> int:
    """Return the smallest of `values` that at least `percent` percent of them do not exceed."""
    return int(np.percentile(values, percent, method="inverted_cdf"))


def bins(values: Sequence[int]) -> tuple[int, np.ndarray]:
    """Return the width w of a bin, 1, 2 or 5 times a power of ten, and how many values are in [0, w), [w, 2 w), ..."""
    width = math.ceil(round_step((max(values) + 1) / _BARS))
    return width, np.bincount(np.asarray(values) // width)


def draw_histogram(values: Sequence[int], unit: str, title: str) -> PIL.Image.Image:
    """Draw the distribution of lengths, at least one and none negative, as an RGB image."""
    image = PIL.Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = PIL.ImageDraw.Draw(image)
    font, large = PIL.ImageFont.load_default(14), PIL.ImageFont.load_default(18)
    width, counts = bins(values)
    most, end = int(counts.max()), width * len(counts)
    right, base = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x_of(value: float) -> float:
        return _LEFT + value / end * (right - _LEFT)

    def y_of(count: float) -> float:
        return base - count / most * (base - _TOP)

    for count in _ticks(most):
        draw.line((_LEFT, y_of(count), right, y_of(count)), fill=_PALE)
        draw.text((_LEFT - 8, y_of(count)), f"{count:,}", fill=_INK, font=font, anchor="rm")
    for index, count in enumerate(counts):
        if count:
            box = (x_of(index * width), min(y_of(count), base - 1), x_of((index + 1) * width) - 1, base)
            draw.rectangle((box[0], box[1], max(box[0], box[2]), box[3]), fill=_BAR)
    for value in _ticks(end):
        draw.line((x_of(value), base, x_of(value), base + 5), fill=_INK)
        draw.text((x_of(value), base + 9), f"{value:,}", fill=_INK, font=font, anchor="ma")
    draw.line((_LEFT, base, right, base), fill=_INK)
    draw.text((_LEFT, 12), title, fill=_INK, font=large)
    draw.text(((_LEFT + right) / 2, _HEIGHT - 12), f"{unit} per record", fill=_INK, font=font, anchor="mb")
    for row, (name, percent, colour) in enumerate(_MARKS):
        value = percentile(values, percent)
        draw.line((x_of(value), _TOP, x_of(value), base), fill=colour, width=2)
        draw.text((right, 12 + 18 * row), f"{name} {value:,}", fill=colour, font=font, anchor="ra")
    return image


def round_step(least: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)


def _ticks(end: int) -> list[int]:
    step = max(1, round(round_step(end / _TICKS)))
    return list(range(0, end + 1, step))
