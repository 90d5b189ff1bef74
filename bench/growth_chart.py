"""docs/images/growth.svg from bench/results/growth.json; `python -m bench.page growth` writes it beside its page."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.growth_series import SERIES, Panel, Series, amount
from bench.report import ROOT, read

CHART = ROOT / "docs" / "images" / "growth.svg"
COLORS = ("#2463a5", "#c04000", "#2c8a3d", "#8a5aa8")
WIDTH, HEIGHT, COLUMNS = 340, 280, 3
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 92, 40
INK, GRID = "#222222", "#dddddd"


def _measured(results: Mapping[str, Any]) -> Iterator[tuple[Series, Any]]:
    return ((one, results[one.key]) for one in SERIES if one.key in results)


def chart() -> str:
    """The chart, as SVG."""
    results = read("growth")["series"]
    panels = list(dict.fromkeys(one.panel for one, _ in _measured(results)))
    width, height = COLUMNS * WIDTH, -(-len(panels) // COLUMNS) * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="sans-serif" '
        'font-size="11">',
        "<title>Time and memory over sizes, on log-log scales</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        x, y = number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT
        curves = [(one, found) for one, found in _measured(results) if one.panel == panel]
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel, curves), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, curves: Sequence[tuple[Series, Any]]) -> Iterator[str]:
    sizes = sorted({size for _, found in curves for size in found["sizes"]})
    values = [value for _, found in curves for value in found["values"]]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    span = math.log(sizes[-1] / sizes[0])

    def at(size: float, value: float) -> tuple[float, float]:
        across = math.log(size / sizes[0]) / span
        up = (math.log10(value) - low) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - up)

    yield _text(LEFT, 18, panel.title, "start", bold=True)
    for power in range(low, high + 1, 1 + (high - low) // 5):
        y = at(sizes[0], 10.0**power)[1]
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>'
        yield _text(LEFT - 6, y + 4, amount(1.000001 * 10.0**power, panel.unit), "end")
    for size in sizes[:: 1 + (len(sizes) - 1) // 5]:
        yield _text(at(size, values[0])[0], HEIGHT - BOTTOM + 16, f"{size:,}")
    yield _text((WIDTH + LEFT - RIGHT) / 2, HEIGHT - 8, panel.x)
    for number, (one, found) in enumerate(curves):
        color, y = COLORS[number], 34 + 14 * number
        yield f'<path d="M{LEFT} {y - 4}h16" stroke="{color}" stroke-width="2"/>'
        yield _text(LEFT + 20, y, f"{one.name}: {found['slope']:.2f}", "start")
        for line in _expected(one, found, 10.0**low):
            points = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in line)
            yield f'<polyline points="{points}" fill="none" stroke="{color}" stroke-dasharray="2 3"/>'
        points = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in _points(found))
        yield f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'


def _points(found: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    return zip(found["sizes"], found["values"], strict=True)


def _expected(series: Series, found: Mapping[str, Any], least: float) -> Iterator[list[tuple[float, float]]]:
    """Lines of the slopes that are expected, from the first size to the last, cut where they leave the panel."""
    first, last = found["sizes"][0], found["sizes"][-1]
    power = -1 if series.slope < 0 else round(series.slope)
    terms = [(found["values"][-1] / last**power, power)]
    if series.is_sum:
        terms = [(found["linear"], 1), (found["quadratic"], 2)]
    for factor, power in terms:
        if factor <= 0 or factor * last**power <= least:
            continue
        begin = first if power <= 0 else max(first, (least / factor) ** (1 / power))
        begin = begin if power >= 0 else max(first, last * (found["values"][-1] / max(found["values"])) ** (-1 / power))
        yield [(begin, factor * begin**power), (last, factor * last**power)]


def _text(x: float, y: float, text: str, anchor: str = "middle", *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}"{weight}>{html.escape(text)}</text>'
