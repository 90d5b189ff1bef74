"""docs/growth.md and docs/images/growth.svg from bench/results/growth.json: `python -m bench.growth_page`."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.growth_series import SERIES, TOLERANCE, Panel, Series, Unit
from bench.report import ROOT, markdown, read

PAGE, CHART = ROOT / "docs" / "growth.md", ROOT / "docs" / "images" / "growth.svg"
COLORS = ("#2463a5", "#c04000", "#2c8a3d", "#8a5aa8")
WIDTH, HEIGHT, COLUMNS = 340, 280, 3
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 92, 40
INK, GRID = "#222222", "#dddddd"
UNITS: Mapping[Unit, Sequence[tuple[float, str]]] = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
}

TEXT = """\
# Growth

Written by `python -m bench.growth`; change that program, not this page.

Work that grows with the square of its input is fast in a test and slow with a user's data. Here time and memory are
measured over sizes that double. On log-log scales the slope is the exponent: 1 is linear, 2 quadratic, 0 constant.

![Time and memory over sizes, on log-log scales]({chart})

Lines are measured; beside their names is the slope over the larger half of the sizes. Dotted lines have the ideal
slope: 1, or 0, or -1 over devices; 2 where the table says so. For attention, both parts of the fit `a n + b n²` are
dotted.

## Slopes

Seconds are the best of three runs on {processor}, {cores} cores, jax {jax}; bytes are what compiled programs take, or
processes. Chips are computed from programs that are compiled for them. A series fails if its slope exceeds what is
expected by more than {tolerance}.

{slopes}

## What is quadratic by nature

{sums}

Attention is computed in blocks: its time grows with the square, its memory does not. Short lengths keep scores [S, S],
which are faster there.
"""


def amount(value: float, unit: Unit) -> str:
    """A figure with its unit.

    >>> amount(0.0123, "s"), amount(4.5e6, "bytes")
    ('12 ms', '4.5 MB')
    """
    scale, name = next((one for one in UNITS[unit] if value >= one[0]), UNITS[unit][-1])
    shown = value / scale
    return f"{shown:.2g} {name}" if shown < 100 else f"{shown:,.0f} {name}"


def page() -> str:
    """The page."""
    results = read("growth")
    facts, series = results["machine"], results["series"]
    rows = (
        (
            one.panel.title, one.name, f"{found['sizes'][0]:,} to {found['sizes'][-1]:,} {one.panel.x}",
            amount(found["values"][-1], one.unit), f"{found['slope']:.2f} ± {found['error']:.2f}",
            f"{one.slope:g}" + ("" if found["passed"] else " (missed)"), one.why,
        )
        for one, found in _measured(series)
    )  # fmt: skip
    return TEXT.format(
        chart=CHART.relative_to(PAGE.parent), processor=facts["processor"], cores=facts["cores"], jax=facts["jax"],
        tolerance=TOLERANCE, sums="\n".join(_sums(series)),
        slopes=markdown(("what grows", "", "sizes", "at the largest", "slope", "at most", ""), rows),
    )  # fmt: skip


def _measured(results: Mapping[str, Any]) -> Iterator[tuple[Series, Any]]:
    return ((one, results[one.key]) for one in SERIES if one.key in results)


def _sums(results: Mapping[str, Any]) -> Iterator[str]:
    for one, found in _measured(results):
        if one.is_sum and found["linear"] and found["quadratic"]:
            equal = found["linear"] / found["quadratic"]
            yield (
                f"- {one.key}: {amount(1000 * found['linear'], 's')} for each 1,000 {one.panel.x}, and attention takes "
                f"as long at {equal:,.0f}."
            )


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


def write() -> None:
    """Write page and chart."""
    PAGE.write_text(page(), encoding="utf-8")
    CHART.write_text(chart(), encoding="utf-8")


if __name__ == "__main__":
    write()
