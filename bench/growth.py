"""How time and memory grow: with patches, tokens, slots, images, rows of data, checkpoints, devices.

    python -m bench.growth

Each series of `bench.growth_series` does one piece of work at sizes that double: seconds are
the best of three runs after one that compiles, bytes are what compiled programs or processes take. The slope of a
series on log-log scales, over the larger half of its sizes, is compared with what it should be. Figures go to
`bench/results/growth.json` after each series, and a run that was interrupted measures what is missing; then
`docs/growth.md` and its chart are written. Exits with status 1 if something grows faster than it should.
"""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bench import page, report
from bench.growth_host import Work
from bench.growth_series import SERIES, TOLERANCE, Series, amount

RUNS, LEAST_SECONDS = 3, 0.01
"""Runs of which the best counts; a run repeats the work until it has taken so long."""
TINY_SIZES = 2


def measure(series: Series, sizes: Iterable[int]) -> list[float]:
    """Seconds or bytes of a series at each size."""
    return [_figure(series.work(size)) for size in sizes]


def _figure(work: Work) -> float:
    """What work returns, if it is a number; else the seconds that it takes."""
    found = work()
    if isinstance(found, int | float):
        return float(found)
    count, best = 1, float("inf")
    for _ in range(RUNS):
        while True:
            start = time.perf_counter()
            for _ in range(count):
                work()
            taken = time.perf_counter() - start
            if taken >= LEAST_SECONDS:
                break
            count *= 2
        best = min(best, taken / count)
    return best


def slope(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """k of the least-squares fit value ~ size^k over the larger half of the sizes, at least three, and its error.

    >>> k, error = slope([1, 2, 4, 8, 16], [9, 9, 16, 64, 256])
    >>> round(k, 3), round(error, 3)
    (2.0, 0.0)
    """
    first = min(len(sizes) // 2, max(len(sizes) - 3, 0))
    x, y = (np.log(np.maximum(values[first:], 1e-12)) for values in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    k = float(x @ y / (x @ x))
    return k, float(np.sqrt(np.sum((y - k * x) ** 2) / max(len(x) - 2, 1) / (x @ x)))


def asymptotes(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The a and b of value ~ a size + b size^2, neither negative, that fit best in relative terms.

    >>> [round(float(x), 6) for x in asymptotes([1, 2, 4], [3, 8, 24])]
    [2.0, 1.0]
    """
    x, y = np.asarray(sizes, float), np.asarray(values, float)
    terms = np.stack([x / y, x**2 / y], axis=1)
    found = np.linalg.lstsq(terms, np.ones(len(x)), rcond=None)[0]
    for other in np.flatnonzero(found < 0):
        kept = terms[:, 1 - other]
        found[1 - other], found[other] = kept.sum() / (kept @ kept), 0
    return float(found[0]), float(found[1])


def figures(series: Series, sizes: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """What is kept of a series."""
    k, error = slope(sizes, values)
    found: dict[str, Any] = {"sizes": list(sizes), "values": list(values), "slope": k, "error": error}
    if series.is_sum:
        found["linear"], found["quadratic"] = asymptotes(sizes, values)
    return found | {"passed": k <= series.slope + TOLERANCE}


def tables(results: Mapping[str, Any]) -> list[report.Table]:
    """All series with their slopes."""
    rows = [
        (
            one.panel.title, one.name, f"{found['sizes'][0]:,} to {found['sizes'][-1]:,} {one.panel.x}",
            amount(found["values"][-1], one.unit), f"{found['slope']:.2f} ± {found['error']:.2f}", f"{one.slope:g}",
            report.verdict(found["passed"]), one.why,
        )
        for one in SERIES
        if (found := results["series"].get(one.key))
    ]  # fmt: skip
    columns = ("what grows", "", "sizes", "at the largest", "slope", "at most", "", "")
    return [report.Table("growth", columns, rows)]


def read(machine: Mapping[str, Any]) -> dict[str, Any]:
    """The series that were measured on this machine."""
    try:
        found = report.read("growth")
    except FileNotFoundError:
        return {}
    return dict(found["series"]) if found["machine"] == machine else {}


def main() -> int:
    """Measure what is missing, print, write; 1 if something grows faster than it should."""
    parser = report.parser("bench.growth", __doc__)
    parser.add_argument("--only", default="", help="measure series again whose names contain this")
    parser.add_argument("--again", action="store_true", help="measure all series again")
    parser.add_argument("--tiny", action="store_true", help="two small sizes of each; writes nothing")
    arguments = parser.parse_args()
    out, machine = report.console(), report.machine_facts("jax", "numpy")
    results = {} if arguments.again or arguments.tiny else read(machine)
    for series in SERIES:
        sizes = series.sizes[:TINY_SIZES] if arguments.tiny else series.sizes
        known = results.get(series.key, {}).get("sizes") == list(sizes)
        if arguments.only not in series.key or (known and not arguments.only):
            continue
        start = time.perf_counter()
        results[series.key] = figures(series, sizes, measure(series, sizes))
        out.print(f"{series.key}: {time.perf_counter() - start:.1f} s", soft_wrap=True)
        if not arguments.tiny:
            _keep(machine, results)
    out.print(*tables({"series": results}))
    if arguments.tiny:
        return 0
    page.write("growth")
    return 0 if all(found["passed"] for found in results.values()) else 1


def _keep(machine: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    kept = {one.key: results[one.key] for one in SERIES if one.key in results}
    passed = all(found["passed"] for found in kept.values())
    report.write("growth", {"machine": machine, "series": kept, "passed": passed})


if __name__ == "__main__":
    sys.exit(main())
