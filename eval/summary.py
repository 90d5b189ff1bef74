"""The figures of a run: the score first, how sure it is, and how many answers could not be understood."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from eval.items import Item
from eval.metrics import Metric
from eval.results import Category, Result, scores_of
from eval.statistics import bootstrap_interval
from glm4v_jax.commands.console import replacing
from glm4v_jax.errors import DataError

CONFIDENCE = 0.95


def summarize(items: Sequence[Item], results: Sequence[Result], metric: Metric, seed: int = 0) -> dict[str, Any]:
    """Figures of a run's results; equal results give equal figures, whoever computed them and when.

    Args:
      items, results: in the same order.
      metric: of the task.
      seed: of the bootstrap.

    Returns:
      score: the metric's own, as it is published for the task; else the mean.
      interval: of the mean over items, by bootstrap.
      parts: further figures of the metric.
      groups: mean and count for each group of items.
      rates: share of items in each category of `results.Category` but "scored".

    Raises:
      DataError: there are no results.
    """
    if not results:
        raise DataError("found no items to sum up; expected at least one")
    scores = [result.score for result in results]
    parts = dict(metric.aggregate(scores_of(items, results)))
    low, high = bootstrap_interval(scores, confidence=CONFIDENCE, seed=seed)
    counts = Counter(result.category for result in results)
    groups: dict[str, list[float]] = {}
    for result in results:
        if result.group is not None:
            groups.setdefault(result.group, []).append(result.score)
    return {
        "score": parts.pop("score", statistics.fmean(scores)),
        "mean": statistics.fmean(scores),
        "interval": [low, high],
        "confidence": CONFIDENCE,
        "count": len(results),
        "parts": parts,
        "groups": {name: {"mean": statistics.fmean(of), "count": len(of)} for name, of in sorted(groups.items())},
        "rates": {name: counts[name] / len(results) for name in get_args(Category) if name != "scored"},
        "truncated": sum(result.is_truncated for result in results) / len(results),
        "tokens": {
            "prompt": sum(result.prompt_tokens for result in results),
            "new": sum(result.new_tokens for result in results),
        },
    }


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write it as JSON, complete or not at all."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_summary(directory: Path) -> dict[str, Any]:
    """The summary of a run.

    Raises:
      DataError: there is none.
    """
    path = directory / "summary.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; expected the summary of a run") from None
    except ValueError as error:
        raise DataError(f"{path}: found no JSON ({error}); expected the summary of a run") from error
