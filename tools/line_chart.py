"""Line charts as SVG, for generated pages: the same numbers give the same bytes, which a test compares."""

import html
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 40, 44
_TICKS = 5
"""Parts of the y axis, and at most of the x axis."""
_INK, _GRID = "#222222", "#dddddd"


class Line(NamedTuple):
    """A curve: points (x, y), and an interval around each (x, low, high), if there are some; "" is in no legend."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    is_dashed: bool = False


class Panel(NamedTuple):
    """A chart: y from 0 to 1, written as percent."""

    title: str
    lines: Sequence[Line]
    x_label: str = "sampled answers"


def draw(panels: Sequence[Panel], columns: int = 2) -> str:
    """Return the text of an SVG of panels, in rows of `columns`."""
    rows = -(-len(panels) // columns)
    size = f"{columns * WIDTH} {rows * HEIGHT}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="12">',
        f'<rect width="{columns * WIDTH}" height="{rows * HEIGHT}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        x, y = number % columns * WIDTH, number // columns * HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel) -> list[str]:
    most = max(x for line in panel.lines for x, _ in line.points) or 1

    def at(x: float, y: float) -> str:
        across, down = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
        return f"{_LEFT + across * x / most:.1f},{_TOP + down * (1 - y):.1f}"

    parts = [_text(_LEFT, 22, panel.title, "start", bold=True)]
    for share in (tick / _TICKS for tick in range(_TICKS + 1)):
        (x1, y), x2 = at(0, share).split(","), at(most, share).split(",")[0]
        parts.append(f'<line x1="{x1}" y1="{y}" x2="{x2}" y2="{y}" stroke="{_GRID}"/>')
        parts.append(_text(_LEFT - 6, float(y) + 4, f"{share:.0%}", "end"))
    for x in range(0, int(most) + 1, _tick(most)):
        parts.append(_text(float(at(x, 0).split(",")[0]), HEIGHT - _BOTTOM + 16, f"{x:,}"))
    parts.append(_text((WIDTH + _LEFT - _RIGHT) / 2, HEIGHT - 10, panel.x_label))
    for line in panel.lines:
        if line.band:
            edge = [at(x, high) for x, _, high in line.band] + [at(x, low) for x, low, _ in reversed(line.band)]
            parts.append(f'<polygon points="{" ".join(edge)}" fill="{line.color}" opacity="0.15"/>')
        dash = ' stroke-dasharray="5 4"' if line.is_dashed else ""
        points = " ".join(at(x, y) for x, y in line.points)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line.color}" stroke-width="2"{dash}/>')
    return parts + _legend(panel)


def _tick(most: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that divides 0 to `most` into few enough parts."""
    unit = 1
    while True:
        for step in (unit, 2 * unit, 5 * unit):
            if most / step <= _TICKS:
                return step
        unit *= 10


def _legend(panel: Panel) -> list[str]:
    """The names of the curves, beneath the title, in one line."""
    parts, x = [], float(_LEFT)
    for line in (line for line in panel.lines if line.name):
        dash = ' stroke-dasharray="5 4"' if line.is_dashed else ""
        parts.append(
            f'<line x1="{x:.1f}" y1="32" x2="{x + 16:.1f}" y2="32" stroke="{line.color}" stroke-width="2"{dash}/>'
        )
        parts.append(_text(x + 20, 36, line.name, "start"))
        x += 34 + 6.2 * len(line.name)
    return parts


def _text(x: float, y: float, text: str, anchor: str = "middle", *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_INK}"{weight}>{html.escape(text)}</text>'
