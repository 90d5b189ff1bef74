"""Line charts as SVG, for generated pages: the same numbers give the same bytes, which tests compare."""

import html
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from train.data.histogram import round_step

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 92, 44
"""Margins of a panel; in the upper one are its title and the names of up to four curves."""
_TICKS = 5
"""Parts of an axis, at most."""
_INK, _GRID = "#222222", "#dddddd"
Style = Literal["solid", "dashed", "dotted"]
_STYLES: dict[Style, str] = {"solid": 'stroke-width="2"', "dashed": 'stroke-width="2" stroke-dasharray="5 4"',
           "dotted": 'stroke-dasharray="2 3"'}  # fmt: skip


class Line(NamedTuple):
    """A curve: points (x, y), and an interval around each (x, low, high), if there are some; "" is in no legend."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    style: Style = "solid"


class Axis(NamedTuple):
    """An axis from `low` to `high`, with what is written at some of its values."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    label: str = ""
    is_log: bool = False

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 at `low` to 1 at `high`.

        >>> Axis(1, 100, (), is_log=True).share(10)
        0.5
        """
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


PERCENT = Axis(0, 1, [(tick / _TICKS, f"{tick / _TICKS:.0%}") for tick in range(_TICKS + 1)])


class Panel(NamedTuple):
    """A chart; without an axis for x from 0 to the largest of its curves."""

    title: str
    lines: Sequence[Line]
    x: Axis | None = None
    y: Axis = PERCENT


def draw(panels: Sequence[Panel], title: str, columns: int = 2) -> str:
    """Return the text of an SVG of panels, in rows of `columns`."""
    rows = -(-len(panels) // columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * WIDTH} {rows * HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{columns * WIDTH}" height="{rows * HEIGHT}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        x, y = number % columns * WIDTH, number // columns * HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel) -> Iterator[str]:
    x_axis, y_axis = panel.x or _from_zero(max(x for line in panel.lines for x, _ in line.points) or 1), panel.y

    def at(x: float, y: float) -> tuple[float, float]:
        across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + across * x_axis.share(x), TOP + down * (1 - y_axis.share(y))

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)

    yield _text(LEFT, 18, panel.title, "start", bold=True)
    for value, text in y_axis.ticks:
        y = at(x_axis.low, value)[1]
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{_GRID}"/>'
        yield _text(LEFT - 6, y + 4, text, "end")
    for value, text in x_axis.ticks:
        yield _text(at(value, y_axis.low)[0], HEIGHT - BOTTOM + 16, text)
    yield _text((WIDTH + LEFT - RIGHT) / 2, HEIGHT - 10, x_axis.label)
    for number, line in enumerate(line for line in panel.lines if line.name):
        y = 34 + 14 * number
        yield f'<path d="M{LEFT} {y - 4}h16" stroke="{line.color}" {_STYLES[line.style]}/>'
        yield _text(LEFT + 20, y, line.name, "start")
    for line in panel.lines:
        if line.band:
            edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
            yield f'<polygon points="{path(edge)}" fill="{line.color}" opacity="0.15"/>'
        yield f'<polyline points="{path(line.points)}" fill="none" stroke="{line.color}" {_STYLES[line.style]}/>'


def _from_zero(most: float) -> Axis:
    """An axis up to `most`, in round steps that give few enough parts."""
    step = max(1, round(round_step(most / _TICKS)))
    return Axis(0, most, [(x, f"{x:,}") for x in range(0, int(most) + 1, step)], "sampled answers")


def _text(x: float, y: float, text: str, anchor: str = "middle", *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_INK}"{weight}>{html.escape(text)}</text>'
