"""What all measurements share: facts about the machine, tables, verdicts, results as JSON."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.console
import rich.markup
import rich.table
import rich.text

from glm4v_jax.files import replacing

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
VECTORS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}
"""Flags that Linux lists -> instruction sets, the widest first."""


class Table(NamedTuple):
    """A table whose first column is text and whose others are figures; cells may have Rich's markup."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __rich__(self) -> rich.table.Table:
        """The table as a terminal shows it."""
        made = rich.table.Table(title=rich.markup.escape(self.title), title_justify="left")
        for index, column in enumerate(self.columns):
            made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in self.rows:
            made.add_row(*map(str, row))
        return made

    def __str__(self) -> str:
        """The table in Markdown, without its title."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        plain = [[rich.text.Text.from_markup(str(cell)).plain.replace("|", "/") for cell in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in plain)


def processor() -> str:
    """Model of the CPU and its widest vectors, which decide the speed of products: "AMD EPYC, AVX-512"."""
    try:
        facts = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    fields: dict[str, str] = dict(re.findall(r"^(model name|flags|Features)\s*:\s*(.*)$", facts, re.MULTILINE))
    flags = fields.get("flags", fields.get("Features", "")).split()
    vectors = next((name for flag, name in VECTORS.items() if flag in flags), None)
    return ", ".join(filter(None, (fields.get("model name", platform.machine()), vectors)))


def machine_facts(*packages: str) -> dict[str, Any]:
    """Processor and its cores, operating system, and the versions of Python and of these packages."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def verdict(passed: bool | None) -> str:
    """One word for the last column of a table; none where there is no aim."""
    return "" if passed is None else "[green]pass[/green]" if passed else "[red]FAIL[/red]"


class Check(NamedTuple):
    """What was found, the aim, and whether that is met; None where there is no aim."""

    what: str
    found: Any
    aim: Any = ""
    passed: bool | None = None


def check_table(title: str, checks: Iterable[Check]) -> Table:
    """A line for each check."""
    return Table(title, ("", "found", "aim", ""), [(*check[:3], verdict(check.passed)) for check in checks])


def all_pass(checks: Iterable[Check]) -> bool:
    """Whether every aim is met."""
    return all(check.passed is not False for check in checks)


def spread(ratio: Mapping[str, float]) -> str:
    """Median, smallest and largest; runs of other processors may lack some of it."""
    form = "{median:.2f} [{min:.2f}, {max:.2f}]" if "min" in ratio else "{median:.2f}" if ratio else ""
    return form.format_map(ratio)


def judged(line: Mapping[str, Any]) -> tuple[str, str, str]:
    """The last cells of what `turns.compare` returns: ratio, aim, verdict."""
    ratio = spread(line["ratio"])
    return (ratio, "", "") if line["aim"] is None else (ratio, f"{line['aim']:.1f}", verdict(line["passed"]))


def profile_tables(profiles: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Iterable[Table]:
    """Of what `turns.profiles` returns."""
    for work, sides in profiles.items():
        for side, profile in sides.items():
            rows = [(line["name"], line["calls"], f"{line['milliseconds']:.1f}") for line in profile]
            yield Table(f"{work}, {side}: where the time goes", ("operation", "calls", "ms"), rows)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A docstring as it stands, and the options with their defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def parser(program: str, doc: str) -> argparse.ArgumentParser:
    """Return a program's command line; its help is its module's docstring and the options with their defaults."""
    return argparse.ArgumentParser(prog=f"python -m {program}", description=doc, formatter_class=_Help)


def console() -> rich.console.Console:
    """Where reports go; in a file, tables are as wide as they are, and no sentence is folded."""
    out = rich.console.Console()
    return out if out.is_terminal else rich.console.Console(width=1000)


def read(name: str) -> Any:
    """What `write` has written as `<name>.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def write(name: str, figures: Mapping[str, Any], directory: pathlib.Path | None = None) -> pathlib.Path:
    """Write `<name>.json` to `RESULTS`, whole or not at all."""
    directory = directory or RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(path := directory / f"{name}.json") as aside:
        aside.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return path


def finish(name: str, figures: Mapping[str, Any], *shown: Table | str, directory: pathlib.Path | None = None) -> int:
    """Write figures, print tables and sentences; returns the exit status, 1 if an aim is missed."""
    path = write(name, figures, directory)
    for each in shown:
        console().print(each)
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    console().print(f"written to {where}", soft_wrap=True)
    return 0 if figures["passed"] else 1
