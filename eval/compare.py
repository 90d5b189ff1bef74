"""Compare two runs of a task: the difference of their scores with its interval, and the items on which they differ."""

import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.parse_answer import final_answer
from eval.results import RESULTS, SUMMARY, ItemResult, read_results
from eval.statistics import Difference, paired_difference
from eval.summary import CONFIDENCE, read_summary
from glm4v_jax.errors import DataError

RIGHT = 0.5
"""The least score of a right item. It is where an IoU becomes a hit, and the least similarity that ANLS counts."""

_SETTINGS = ("preset", "dtype", "prompt", "system")
"""Fields of a summary, besides "options", that describe the prompt and the model's settings."""

_NAMED = 5
"""Items that a message names."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two runs.

    Attributes:
      directory: of the run.
      task: its name.
      model: its directory.
      score: of the whole run, from its summary.
      mean: over the items that both runs have.
      categories: counts of these items by `eval.results.Category`.
      only: ids of the items that the other run lacks, in this run's order.
    """

    directory: str
    task: str
    model: str | None
    score: float
    mean: float
    categories: Mapping[str, int]
    only: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Flip:
    """An item that one run has right and the other wrong.

    Attributes:
      id, question, reference: of the item.
      scores: of the first run and the second.
      answers: the final answers; None where nothing follows the thought.
      categories: of `eval.results.Category`.
    """

    id: str
    question: str
    reference: Mapping[str, Any]
    scores: tuple[float, float]
    answers: tuple[str | None, str | None]
    categories: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs over the same items; differences are the second less the first.

    Attributes:
      task: of both, or "FIRST, SECOND".
      metric: of both.
      count: of the items that both have; only these are compared.
      first, second: the runs.
      difference: of the means, with its interval, for which items are resampled as for that of a score.
      confidence: of the interval.
      groups: the difference for each group of items.
      gained: items that are right in the second run only, in the data's order.
      lost: items that are right in the first run only.
      higher, lower: number of items on which the second has the higher, or the lower, score.
      asked_differently: number of items whose prompts differ, in the text, the images or their positions, though the
        references do not.
      settings: "preset", "dtype", "prompt", "system" and generation options that differ -> those of the first and the
        second; None where a run has none.
    """

    task: str
    metric: str
    count: int
    first: Side
    second: Side
    difference: Difference
    confidence: float
    groups: Mapping[str, Difference]
    gained: Sequence[Flip]
    lost: Sequence[Flip]
    higher: int
    lower: int
    asked_differently: int
    settings: Mapping[str, tuple[Any, Any]]


def compare(first: Path, second: Path, *, right: float = RIGHT, seed: int = 0) -> Comparison:
    """Compare two runs of a task, or of its variants with the same metric, item by item; an item is right from `right`.

    Raises:
      DataError: a directory has no summary.json and results.jsonl, or the runs are of different metrics or data.
      OSError: a file cannot be read.
    """
    summaries = read_summary(first), read_summary(second)
    a, b = (_field(summary, "metric", path) for summary, path in zip(summaries, (first, second), strict=True))
    if a != b:
        raise DataError(f"metric: found {a!r} in {first} and {b!r} in {second}; expected the same")
    tasks = [_field(summary, "task", path) for summary, path in zip(summaries, (first, second), strict=True)]
    runs = _by_id(first), _by_id(second)
    pairs = [(result, runs[1][id_]) for id_, result in runs[0].items() if id_ in runs[1]]
    if not pairs:
        raise DataError(
            f"{first} and {second}: found no common item ({_some(runs[0])}; {_some(runs[1])}); expected runs over the "
            "same data"
        )
    _check_data(pairs, first, second)
    groups: dict[str, list[tuple[ItemResult, ItemResult]]] = {}
    for pair in pairs:
        if pair[0].group is not None:
            groups.setdefault(pair[0].group, []).append(pair)
    return Comparison(
        task=", ".join(dict.fromkeys(tasks)),
        metric=summaries[0]["metric"],
        count=len(pairs),
        first=_side(first, summaries[0], *runs),
        second=_side(second, summaries[1], *reversed(runs)),
        difference=_difference(pairs, seed),
        confidence=CONFIDENCE,
        groups={name: _difference(of, seed) for name, of in sorted(groups.items())},
        gained=[_flip(a, b) for a, b in pairs if a.score < right <= b.score],
        lost=[_flip(a, b) for a, b in pairs if b.score < right <= a.score],
        higher=sum(b.score > a.score for a, b in pairs),
        lower=sum(b.score < a.score for a, b in pairs),
        asked_differently=sum(_is_asked_differently(a, b) for a, b in pairs),
        settings=_settings(*summaries),
    )


def runs_in(directory: Path) -> dict[str, Path]:
    """Return task -> directory of its run, for the directory of one run, or of several tasks; else a DataError."""
    summary = read_summary(directory)
    if "scores" not in summary:
        return {_field(summary, "task", directory): directory}
    return {name: directory / name for name in _field(summary, "scores", directory)}


def _field(summary: Mapping[str, Any], field: str, directory: Path) -> Any:
    if not isinstance(summary, dict) or field not in summary:
        raise DataError(f"{directory / SUMMARY}: found no field {field!r}; expected the summary of a run")
    return summary[field]


def _by_id(directory: Path) -> dict[str, ItemResult]:
    results = read_results(directory / RESULTS)
    if twice := [id_ for id_, count in Counter(result.id for result in results).items() if count > 1]:
        raise DataError(f"{directory / RESULTS}: found {twice[0]!r} more than once; expected unique ids")
    return {result.id: result for result in results}


def _check_data(pairs: Sequence[tuple[ItemResult, ItemResult]], first: Path, second: Path) -> None:
    """Check that the references are equal: equal ids are not enough, as all data have row numbers.

    Raises:
      DataError: the references of an item differ.
    """
    if differing := [pair for pair in pairs if _plain(pair[0].reference) != _plain(pair[1].reference)]:
        a, b = differing[0]
        raise DataError(
            f"{first} and {second}: found {len(differing)} of {len(pairs)} common items with another reference, such "
            f"as {a.id!r} ({_plain(a.reference)} and {_plain(b.reference)}); expected runs over the same data"
        )


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _is_asked_differently(a: ItemResult, b: ItemResult) -> bool:
    return a.question != b.question or (None not in (a.prompt, b.prompt) and a.prompt != b.prompt)


def _settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ."""
    sides = [
        {name: summary.get(name) for name in _SETTINGS} | dict(summary.get("options") or {})
        for summary in (first, second)
    ]
    pairs = {name: (sides[0].get(name), sides[1].get(name)) for name in sides[0] | sides[1]}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def _some(ids: Mapping[str, Any]) -> str:
    names = list(ids)
    return ", ".join(map(repr, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "") or "none"


def _side(
    directory: Path, summary: Mapping[str, Any], run: Mapping[str, ItemResult], other: Mapping[str, ItemResult]
) -> Side:
    shared = [result for id_, result in run.items() if id_ in other]
    return Side(
        directory=str(directory),
        task=_field(summary, "task", directory),
        model=" + ".join(filter(None, (summary.get("model"), summary.get("adapter")))) or None,
        score=_field(summary, "score", directory),
        mean=statistics.fmean(result.score for result in shared),
        categories=dict(Counter(result.category for result in shared).most_common()),
        only=[id_ for id_ in run if id_ not in other],
    )


def _difference(pairs: Sequence[tuple[ItemResult, ItemResult]], seed: int) -> Difference:
    return paired_difference(
        [a.score for a, _ in pairs],
        [b.score for _, b in pairs],
        [a.cluster for a, _ in pairs],
        confidence=CONFIDENCE,
        seed=seed,
    )


def _flip(a: ItemResult, b: ItemResult) -> Flip:
    return Flip(
        id=a.id,
        question=a.question,
        reference=a.reference,
        scores=(a.score, b.score),
        answers=(final_answer(a.output), final_answer(b.output)),
        categories=(a.category, b.category),
    )
