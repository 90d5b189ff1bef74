"""What the measurements have in common: tables, verdicts, results as JSON, facts about the machine."""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import rich.console
import rich.markup
import rich.table

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def machine_facts(*packages: str) -> dict[str, Any]:
    """Processor cores, operating system, and the versions of Python and of these packages."""
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def verdict(passed: bool) -> str:
    """One word for the last column of a table."""
    return "[green]pass[/green]" if passed else "[red]FAIL[/red]"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> rich.table.Table:
    """A table whose first column is text and whose others are figures, aligned to the right."""
    made = rich.table.Table(title=rich.markup.escape(title), title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def console() -> rich.console.Console:
    """Where reports go; wide enough for the tables also where the output is a file."""
    out = rich.console.Console()
    return out if out.is_terminal else rich.console.Console(width=140)


def write_result(name: str, figures: dict[str, Any], directory: pathlib.Path = RESULTS) -> pathlib.Path:
    """Write `<name>.json`; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return path
