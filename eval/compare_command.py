"""`python -m eval compare`: two runs side by side, as tables or as JSON."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro
from msgspec import Meta

from eval.compare import RIGHT, Comparison, Flip, compare, runs_in
from eval.results import encoded
from eval.statistics import Difference
from glm4v_jax.config.checks import Natural
from glm4v_jax.console.program import JsonOptions
from glm4v_jax.console.table import print_table, printable
from glm4v_jax.errors import DataError, counted
from glm4v_jax.files import to_json

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

    right: Annotated[float, Meta(gt=0, le=1), tyro.conf.arg(metavar="SCORE")] = RIGHT
    """Count items of at least this score as right."""

    show: Annotated[Natural, tyro.conf.arg(metavar="N")] = 20
    """Print this many flipped items of each kind; --json prints all."""

    seed: Annotated[Natural, tyro.conf.arg(metavar="N")] = 0
    """Random seed of the bootstrap."""

    def run(self) -> int:
        """Compare, and print the differences."""
        first, second = (runs_in(pathlib.Path(directory)) for directory in (self.first, self.second))
        pairs = [(task, task) for task in first if task in second]
        if len(first) == len(second) == 1:
            pairs = list(zip(first, second, strict=True))  # variants too
        if not pairs:
            found = f"{', '.join(first)} in {self.first} and {', '.join(second)} in {self.second}"
            raise DataError(f"task: found {found}; expected the same")
        comparisons = [compare(first[a], second[b], right=self.right, seed=self.seed) for a, b in pairs]
        if self.as_json:
            by_task = {comparison.task: dataclasses.asdict(comparison) for comparison in comparisons}
            print(encoded(by_task if len(by_task) > 1 else next(iter(by_task.values()))).decode())
        else:
            for index, comparison in enumerate(comparisons):
                if index:
                    print()
                _print_figures(comparison)
                for title, flips in (("right -> wrong", comparison.lost), ("wrong -> right", comparison.gained)):
                    _print_flips(title, flips, self.show)
        if alone := sorted((first.keys() ^ second.keys()) - {task for pair in pairs for task in pair}):
            print(f"eval: tasks of one run only, not compared: {printable(', '.join(alone))}", file=sys.stderr)
        return 0


def _print_figures(comparison: Comparison) -> None:
    first, second = sides = comparison.first, comparison.second
    rows = [("run", first.directory, second.directory)]
    if first.task != second.task:
        rows.append(("task", first.task, second.task))
    if first.model or second.model:
        rows.append(("model", first.model or "unknown", second.model or "unknown"))
    rows.append((f"score ({comparison.metric})", f"{first.score:.3f}", f"{second.score:.3f}"))
    table = [(*(_short(cell) for cell in row), "") for row in rows]
    interval = f"{_signed(comparison.difference)}, {comparison.confidence:.0%} interval"
    name = f"mean of the {comparison.count:,} common items"
    table.append((name, f"{first.mean:.3f}", f"{second.mean:.3f}", interval))
    table += [(f"  {_short(name)}", "", "", _signed(of)) for name, of in comparison.groups.items()]
    for category in sorted({*first.categories, *second.categories} - {"scored"}):
        a, b = (side.categories.get(category, 0) for side in sides)
        table.append((f"  {category.replace('_', ' ')}", f"{a:,}", f"{b:,}", f"{b - a:+,}"))
    print_table((_short(comparison.task), "first", "second", "difference"), table)
    equal = comparison.count - comparison.higher - comparison.lower
    print(
        f"second higher on {counted(comparison.higher, 'item')}, lower on {comparison.lower:,}, equal on {equal:,}; "
        f"right -> wrong {len(comparison.lost):,}, wrong -> right {len(comparison.gained):,}"
    )
    if comparison.asked_differently:
        print(f"the prompts of {counted(comparison.asked_differently, 'item')} differ")
    if comparison.settings:
        settings = (f"{name} {_setting(a)} and {_setting(b)}" for name, (a, b) in comparison.settings.items())
        print(printable(f"settings that differ: {'; '.join(settings)}"))
    errors = [side.categories.get("error", 0) for side in sides]
    if any(errors):
        print(
            f"prompts that could not be prepared: {counted(errors[0], 'item')} of the first, {errors[1]:,} of "
            "the second; they score as empty answers"
        )
    for name, side in (("first", first), ("second", second)):
        if side.only:
            ids = ", ".join(side.only[:_NAMED]) + (", ..." if len(side.only) > _NAMED else "")
            print(printable(f"only in the {name}, not compared: {counted(len(side.only), 'item')}: {_one_line(ids)}"))


def _print_flips(title: str, flips: Sequence[Flip], show: int) -> None:
    if not flips or not show:
        return
    more = f", {show} of them shown" if len(flips) > show else ""
    print(f"\n{title}: {len(flips):,}{more}")
    rows = []
    for flip in flips[:show]:
        answers = [
            answer if answer is not None else f"({category.replace('_', ' ')})"
            for answer, category in zip(flip.answers, flip.categories, strict=True)
        ]
        rows.append([_short(cell) for cell in (flip.id, flip.question, _answer_of(flip.reference), *answers)])
    print_table(("item", "prompt", "reference", "first", "second"), rows)


def _answer_of(reference: Mapping[str, Any]) -> str:
    """The right answer of a reference, where it has one of the usual names; else all of it."""
    for name in ("answer", "answers", "boxes"):
        if (value := reference.get(name)) is not None:
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(dict(reference), ensure_ascii=False)


def _setting(setting: Any) -> str:
    return _short("none" if setting is None else setting if isinstance(setting, str) else to_json(setting))


def _signed(difference: Difference) -> str:
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _short(text: str) -> str:
    line = _one_line(text)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
