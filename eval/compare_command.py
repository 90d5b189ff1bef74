"""`python -m eval compare`: two runs side by side, as tables or as JSON."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import rich.console
import rich.table
import rich.text
import tyro

from eval.compare import RIGHT, Comparison, Flip, Side, compare, runs_in
from eval.results import encoded
from eval.statistics import Difference
from glm4v_jax.console.program import JsonOptions
from glm4v_jax.console.table import printable
from glm4v_jax.errors import DataError
from glm4v_jax.files import to_json

_WIDTH = 160
"""Columns of a table where standard output is not a terminal."""
_LONGEST = 120
"""Characters of a prompt or an answer in a table."""
_NAMED = 10
"""Items that one run lacks and a message names."""


@dataclasses.dataclass(kw_only=True)
class Compare(JsonOptions):
    """Compare two runs item by item: the difference of their means with its interval, and the items that flipped.

    Differences are the second run less the first. Both must have the same data and metric; items that only one of them
    has are listed and not compared.
    """

    first: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FIRST", help_behavior_hint="")]
    """Output directory of the run to compare with."""

    second: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SECOND", help_behavior_hint="")]
    """Output directory of the run that should be better."""

    right: Annotated[float, tyro.conf.arg(metavar="SCORE")] = RIGHT
    """Count items of at least this score as right."""

    show: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Print this many flipped items of each kind; --json prints all."""

    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Random seed of the bootstrap."""

    def run(self) -> int:
        """Compare, and print the differences."""
        if not 0 < self.right <= 1:
            raise DataError(f"--right: found {self.right}; expected a number above 0 and at most 1")
        if self.show < 0:
            raise DataError(f"--show: found {self.show}; expected an integer of at least 0")
        first, second = (runs_in(pathlib.Path(directory)) for directory in (self.first, self.second))
        pairs = [(task, task) for task in first if task in second]
        if len(first) == len(second) == 1:
            pairs = list(zip(first, second, strict=True))  # variants too
        if not pairs:
            found = f"{', '.join(first)} in {self.first} and {', '.join(second)} in {self.second}"
            raise DataError(f"task: found {found}; expected the same")
        comparisons = [compare(first[a], second[b], right=self.right, seed=self.seed) for a, b in pairs]
        if self.as_json:
            by_task = {comparison.task: comparison.to_dict() for comparison in comparisons}
            print(encoded(by_task if len(by_task) > 1 else next(iter(by_task.values()))).decode())
        else:
            self._print(comparisons)
        if alone := sorted((first.keys() ^ second.keys()) - {task for pair in pairs for task in pair}):
            print(f"eval: tasks of one run only, not compared: {printable(', '.join(alone))}", file=sys.stderr)
        return 0

    def _print(self, comparisons: Sequence[Comparison]) -> None:
        console = rich.console.Console(width=None if sys.stdout.isatty() else _WIDTH)
        for index, comparison in enumerate(comparisons):
            if index:
                console.print()
            _print_figures(console, comparison)
            for title, flips in (("right -> wrong", comparison.lost), ("wrong -> right", comparison.gained)):
                _print_flips(console, title, flips, self.show)


def _print_figures(console: rich.console.Console, comparison: Comparison) -> None:
    first, second, difference = comparison.first, comparison.second, comparison.difference
    task = rich.table.Column(_text(comparison.task))
    table = rich.table.Table(task, "first", "second", "difference", box=None, pad_edge=False)
    table.add_row("run", _text(first.directory), _text(second.directory))
    if first.task != second.task:
        table.add_row("task", _text(first.task), _text(second.task))
    if first.model or second.model:
        table.add_row("model", _text(first.model or "unknown"), _text(second.model or "unknown"))
    table.add_row(f"score ({printable(comparison.metric)})", f"{first.score:.3f}", f"{second.score:.3f}")
    interval = f"{_signed(difference)}, {comparison.confidence:.0%} interval"
    means = f"{first.mean:.3f}", f"{second.mean:.3f}"
    table.add_row(f"mean of the {comparison.count:,} common items", *means, interval)
    for name, of in comparison.groups.items():
        table.add_row(rich.text.Text("  ").append(_text(name)), "", "", _signed(of))
    for category in sorted({*first.categories, *second.categories} - {"scored"}):
        counts = [side.categories.get(category, 0) for side in (first, second)]
        table.add_row(
            f"  {category.replace('_', ' ')}", *(f"{count:,}" for count in counts), f"{counts[1] - counts[0]:+,}"
        )
    console.print(table)
    equal = comparison.count - comparison.higher - comparison.lower
    console.print(
        f"second higher on {comparison.higher:,} items, lower on {comparison.lower:,}, equal on {equal:,}; "
        f"right -> wrong {len(comparison.lost):,}, wrong -> right {len(comparison.gained):,}",
        highlight=False,
    )
    if comparison.asked_differently:
        console.print(f"the prompts of {comparison.asked_differently:,} items differ", highlight=False)
    if comparison.settings:
        settings = (
            f"{name} {_short_setting(a)} and {_short_setting(b)}" for name, (a, b) in comparison.settings.items()
        )
        console.print(_text(f"settings that differ: {'; '.join(settings)}", longest=None))
    errors = [side.categories.get("error", 0) for side in (first, second)]
    if any(errors):
        console.print(
            f"prompts that could not be prepared: {errors[0]:,} items of the first, {errors[1]:,} of the second; they "
            "score as empty answers",
            highlight=False,
        )
    for name, side in (("first", first), ("second", second)):
        _print_only(console, name, side)


def _print_only(console: rich.console.Console, name: str, side: Side) -> None:
    if not side.only:
        return
    ids = ", ".join(side.only[:_NAMED]) + (", ..." if len(side.only) > _NAMED else "")
    console.print(_text(f"only in the {name}, not compared: {len(side.only):,} items: {ids}", longest=None))


def _print_flips(console: rich.console.Console, title: str, flips: Sequence[Flip], show: int) -> None:
    if not flips or not show:
        return
    more = f", {show} of them shown" if len(flips) > show else ""
    table = rich.table.Table("item", "prompt", "reference", "first", "second", box=None, pad_edge=False)
    for flip in flips[:show]:
        answers = [
            _text(answer if answer is not None else f"({category.replace('_', ' ')})")
            for answer, category in zip(flip.answers, flip.categories, strict=True)
        ]
        table.add_row(_text(flip.id), _text(flip.question), _text(_short(flip.reference)), *answers)
    console.print(f"\n{title}: {len(flips):,}{more}", highlight=False)
    console.print(table)


def _short(reference: Mapping[str, Any]) -> str:
    """The right answer of a reference, where it has one of the usual names; else all of it."""
    for name in ("answer", "answers", "boxes"):
        if (value := reference.get(name)) is not None:
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(dict(reference), ensure_ascii=False)


def _short_setting(setting: Any) -> str:
    text = "none" if setting is None else setting if isinstance(setting, str) else to_json(setting)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _signed(difference: Difference) -> str:
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def _text(value: str, longest: int | None = _LONGEST) -> rich.text.Text:
    """A text in one line, shortened, and without control sequences of rich or a terminal."""
    # Unpaired surrogates, which a tokenizer can produce, cannot be printed.
    line = printable(" ".join(value.split())).encode(errors="backslashreplace").decode()
    return rich.text.Text(line if longest is None or len(line) <= longest else line[: longest - 3] + "...")
