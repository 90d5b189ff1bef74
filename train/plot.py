"""Curves of a job's metrics over its steps, as an image, drawn with Pillow: loss or reward, and learning rate."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from glm4v_jax.console.drawings import write_png
from glm4v_jax.devices.distributed import is_first
from glm4v_jax.errors import counted, one_line
from glm4v_jax.files import naming_file
from train.data.histogram import round_step
from train.log import EVALUATIONS, METRICS, read_log

_SCALE = 2
"""It is drawn this many times larger: Pillow's lines have steps."""
_WIDTH, _LEFT, _RIGHT, _TOP, _GAP, _BOTTOM = (_SCALE * size for size in (960, 92, 24, 52, 40, 60))
_INK, _PALE, _GRID = "#222222", "#a9c3dd", "#dddddd"
_FIRST, _SECOND, _THIRD = "#225588", "#cc5511", "#228833"
_DOTS = 20
"""The values of a curve of no more steps than this are marked."""
_SMOOTHED = 100
"""A curve of more steps than this is shown with its moving average."""

Points = Sequence[tuple[int, float]]


class Curve(NamedTuple):
    """Values of steps; `has_dots` marks each of them."""

    name: str
    points: Points
    color: str
    has_dots: bool = False


class Panel(NamedTuple):
    """Curves with one axis, whose label is `label`; `height` of the panel, in pixels."""

    label: str
    curves: Sequence[Curve]
    height: int


def draw_metrics(directory: Path, log: Callable[[str], None]) -> None:
    """Draw the metrics of a job to `loss.png` in its output directory, or `reward.png` where it learns by reward.

    The first process does. Without metrics nothing is drawn; a file that cannot be written is a line of the log.
    """
    if not is_first():
        return
    metrics, evaluations = read_log(directory / METRICS), read_log(directory / EVALUATIONS)
    name = "reward" if any("reward" in line for line in metrics) else "loss"
    points, held_out = _points(metrics, name), _points(evaluations, name)
    if not points:
        return
    last = f"{name} {points[-1][1]:.4g}" + (f", held-out {held_out[-1][1]:.4g}" if held_out else "")
    title = f"{directory.name}: {last} after {counted(points[-1][0], 'step')}"
    image = draw_curves(title, list(_panels(name, points, held_out, _points(metrics, "learning_rate"))))
    try:
        with naming_file(directory / f"{name}.png"):
            write_png(image, directory / f"{name}.png")
    except OSError as error:
        log(f"not drawn: {one_line(error)}")


def _panels(name: str, points: Points, held_out: Points, rates: Points) -> Iterator[Panel]:
    is_long = len(points) > _SMOOTHED
    curves = [Curve("each step" if is_long else name, points, _PALE if is_long else _FIRST)]
    if is_long:
        curves.append(Curve("moving average", smoothed(points), _FIRST))
    if held_out:
        curves.append(Curve("held-out data", held_out, _SECOND, has_dots=True))
    yield Panel(name, curves, 340)
    if rates:
        yield Panel("learning rate", [Curve("", rates, _THIRD)], 120)


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def smoothed(points: Points) -> Points:
    """Return the exponential moving average over about one point in fifty, without a bias to the first.

    >>> [round(value, 2) for _, value in smoothed([(step, float(step % 2)) for step in range(1, 101)])[-2:]]
    [0.67, 0.33]
    """
    decay = max(0.0, 1 - 50 / len(points))
    found, total, weight = [], 0.0, 0.0
    for step, value in points:
        total, weight = decay * total + value, decay * weight + 1
        found.append((step, total / weight))
    return found


def draw_curves(title: str, panels: Sequence[Panel]) -> PIL.Image.Image:
    """Draw panels below each other, over the same steps, as an RGB image."""
    height = _TOP + sum(_SCALE * panel.height + _GAP for panel in panels) - _GAP + _BOTTOM
    image = PIL.Image.new("RGB", (_WIDTH, height), "white")
    draw = PIL.ImageDraw.Draw(image)
    draw.text((_LEFT, _SCALE * 14), title, fill=_INK, font=_font(18))
    steps = [step for panel in panels for curve in panel.curves for step, _ in curve.points]
    first, last = min(steps), max(steps)
    if first == last:  # in the middle
        first, last = first - 1, last + 1
    top = _TOP
    for panel in panels:
        _draw_panel(image, draw, panel, top, (first, last))
        top += _SCALE * panel.height + _GAP
    base = top - _GAP
    for step in _ticks(first, last, max(1, round_step((last - first) / 10))) if len(set(steps)) > 1 else steps[:1]:
        x = _LEFT + (step - first) / (last - first) * (_WIDTH - _RIGHT - _LEFT)
        draw.line((x, base, x, base + _SCALE * 5), fill=_INK, width=_SCALE)
        draw.text((x, base + _SCALE * 9), f"{step:,.0f}", fill=_INK, font=_font(14), anchor="ma")
    draw.text(((_LEFT + _WIDTH - _RIGHT) / 2, height - _SCALE * 8), "step", fill=_INK, font=_font(14), anchor="mb")
    return image.reduce(_SCALE)


def _draw_panel(
    image: PIL.Image.Image, draw: PIL.ImageDraw.ImageDraw, panel: Panel, top: int, steps: tuple[int, int]
) -> None:
    base, right = top + _SCALE * panel.height, _WIDTH - _RIGHT
    values = [value for curve in panel.curves for _, value in curve.points]
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = round_step((high - low) / (8 if panel.height > 200 else 3))
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    ticks = _ticks(low, high, step)

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - steps[0]) / (steps[1] - steps[0]) * (right - _LEFT)
        return x, base - (value - low) / (high - low) * (base - top)

    for tick in ticks:
        _, y = place(steps[0], tick)
        draw.line((_LEFT, y, right, y), fill=_GRID, width=_SCALE)
        draw.text((_LEFT - _SCALE * 8, y), f"{tick:.6g}", fill=_INK, font=_font(14), anchor="rm")
    for curve in panel.curves:
        points = [place(*point) for point in curve.points]
        draw.line(points, fill=curve.color, width=2 * _SCALE, joint="curve")
        for x, y in points if curve.has_dots or len(points) <= _DOTS else ():
            radius = 4 * _SCALE
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=curve.color)
    draw.line((_LEFT, top, _LEFT, base, right, base), fill=_INK, width=_SCALE)
    names = [(curve.name, curve.color) for curve in panel.curves if len(panel.curves) > 1]
    y = top - _SCALE * 14
    for name, color in reversed(names):  # above the panel, where no curve is
        draw.line((right - _SCALE * 28, y, right, y), fill=color, width=3 * _SCALE)
        draw.text((right - _SCALE * 36, y), name, fill=_INK, font=_font(14), anchor="rm")
        right -= _SCALE * 56 + math.ceil(draw.textlength(name, font=_font(14)))
    _draw_upwards(image, panel.label, (_SCALE * 16, (top + base) // 2))


def _draw_upwards(image: PIL.Image.Image, text: str, center: tuple[int, int]) -> None:
    """Write the label of a vertical axis."""
    left, top, right, bottom = map(math.ceil, _font(14).getbbox(text))
    label = PIL.Image.new("L", (right - left + 4, bottom - top + 4), 255)
    PIL.ImageDraw.Draw(label).text((2 - left, 2 - top), text, fill=0, font=_font(14))
    label = label.rotate(90, expand=True)
    image.paste(label.convert("RGB"), (center[0] - label.width // 2, center[1] - label.height // 2))


def _font(size: int) -> Any:
    return PIL.ImageFont.load_default(_SCALE * size)


def _ticks(low: float, high: float, step: float) -> list[float]:
    """Return the multiples of `step` from `low` to `high`."""
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
