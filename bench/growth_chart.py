"""docs/images/growth.svg from bench/results/growth.json; `python -m bench.page growth` writes it beside its page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench import line_chart
from bench.growth_series import SERIES, Panel, Series, amount
from bench.line_chart import Axis, Line
from bench.report import ROOT, read

CHART = ROOT / "docs" / "images" / "growth.svg"
COLORS = ("#2463a5", "#c04000", "#2c8a3d", "#8a5aa8")


def chart() -> str:
    """The chart, as SVG."""
    results = read("growth")["series"]
    curves = [(one, results[one.key]) for one in SERIES if one.key in results]
    panels = [
        _panel(panel, [(one, found) for one, found in curves if one.panel == panel])
        for panel in dict.fromkeys(one.panel for one, _ in curves)
    ]
    return line_chart.draw(panels, "Time and memory over sizes, on log-log scales", columns=3)


def _panel(panel: Panel, curves: Sequence[tuple[Series, Any]]) -> line_chart.Panel:
    sizes = sorted({size for _, found in curves for size in found["sizes"]})
    values = [value for _, found in curves for value in found["values"]]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    powers = range(low, high + 1, 1 + (high - low) // 5)
    x = Axis(sizes[0], sizes[-1], [(size, f"{size:,}") for size in sizes[:: 1 + (len(sizes) - 1) // 5]], panel.x, True)
    y = Axis(10.0**low, 10.0**high, [(10.0**p, amount(1.000001 * 10.0**p, panel.unit)) for p in powers], "", True)
    lines = []
    for color, (one, found) in zip(COLORS, curves, strict=False):
        lines += [Line("", color, line, style="dotted") for line in _expected(one, found, 10.0**low)]
        points = list(zip(found["sizes"], found["values"], strict=True))
        lines.append(Line(f"{one.name}: {found['slope']:.2f}", color, points))
    return line_chart.Panel(panel.title, lines, x, y)


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
