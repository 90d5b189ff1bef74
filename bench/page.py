"""The pages of docs/ that measurements fill: `python -m bench.page` writes them all, `python -m bench.page growth` one.

Each is a template of Jinja in `bench/templates/`, which reads what programs keep in `bench/results/`.
"""

import importlib
import math
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jinja2

from bench.report import ROOT, Table, read

PAGES = {
    "performance": ROOT / "docs" / "guides" / "performance.md",
    "quantize": ROOT / "docs" / "guides" / "quantize.md",
    "growth": ROOT / "docs" / "growth.md",
    "device": ROOT / "docs" / "performance.md",
}
"""Name of a template -> the page."""
CHARTS = {"growth": "bench.growth_chart", "device": "bench.device.chart"}
"""Name of a template -> the module whose `CHART` and `chart` are its chart."""


def tables(program: str, of: str | None = None) -> Sequence[Table]:
    """Return what a program of `bench` prints as tables, of its results or of those that are called `of`."""
    return importlib.import_module(f"bench.{program}").tables(read(of or program))


def fill(template: pathlib.Path, **values: Any) -> str:
    """Return the text of a template, which calls `values` by name; jinja2.UndefinedError if a figure is missing.

    In it, `x | f(".1f")` formats a number, `read("engine")` are results, `tables("engine")` their tables, and
    `use("bench.engine")` is a module, for its settings.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"f": format, "median": statistics.median, "product": math.prod}
    environment.globals |= {"read": read, "tables": tables, "use": importlib.import_module}
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def page(name: str) -> str:
    """Return the text of a page of measurements."""
    return fill(ROOT / "bench" / "templates" / f"{name}.md")


def write(*names: str) -> None:
    """Write pages, by default all, and their charts."""
    for name in names or PAGES:
        PAGES[name].write_text(page(name), encoding="utf-8")
        if name in CHARTS:
            module = importlib.import_module(CHARTS[name])
            module.CHART.write_text(module.chart(), encoding="utf-8")


if __name__ == "__main__":
    write(*sys.argv[1:])
