"""The figures of a run: the score first, how sure it is, and how many answers could not be understood."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from eval.data.items import Item
from eval.files import SUMMARY
from eval.metrics import Metric
from eval.results import Category, Result, encoded, scores_of
from eval.statistics import clustered, score_interval
from glm4v_jax.errors import DataError
from glm4v_jax.files import replacing

CONFIDENCE = 0.95


def summarize(items: Sequence[Item], results: Sequence[Result], metric: Metric, seed: int = 0) -> dict[str, Any]:
    """Figures of a run's results; equal results give equal figures, whoever computed them and when.

    Args:
      items, results: in the same order.
      metric: of the task.
      seed: of the bootstrap.

    Returns:
      score: the metric's own, as it is published for the task.
      mean: of the items' scores.
      interval: of the score, by bootstrap over clusters of items; Wilson's where these do not differ.
      count, clusters: of items, and of what the interval draws, see `eval.metrics.metric.Cluster`.
      parts: further figures of the metric.
      groups: mean and count for each group of items, unless the parts tell these means or all are of one group.
      forced_share: of answers whose thought was closed because its budget was used up.
      rates: share of items in each category of `results.Category` but "scored"; with those scored they make 1.
      truncated_share: share of items whose answer was cut off, understood or not.

    Raises:
      DataError: there are no results.
    """
    if not results:
        raise DataError("found no items to sum up; expected at least one")
    scores = [result.score for result in results]
    told = scores_of(items, results)
    parts = dict(metric.aggregate(told))
    clusters = clustered(told, [result.cluster for result in results]).values()
    values, weights = zip(*map(metric.terms, clusters), strict=True)
    low, high = score_interval(values, weights, confidence=CONFIDENCE, seed=seed)
    counts = Counter(result.category for result in results)
    return {
        "score": parts.pop("score"),
        "mean": statistics.fmean(scores),
        "interval": [low, high],
        "confidence": CONFIDENCE,
        "count": len(results),
        "clusters": len(clusters),
        "parts": parts,
        "groups": _groups(results, parts),
        "rates": {name: counts[name] / len(results) for name in get_args(Category) if name != "scored"},
        "truncated_share": sum(result.is_truncated for result in results) / len(results),
        "forced_share": sum(result.is_forced for result in results) / len(results),
        "tokens": {
            "prompt": sum(result.prompt_tokens for result in results),
            "new": sum(result.new_tokens for result in results),
        },
    }


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write it as JSON, complete or not at all."""
    with replacing(path) as aside:
        aside.write_bytes(encoded(summary, indent=2) + b"\n")


def _groups(results: Sequence[Result], parts: Mapping[str, float]) -> dict[str, dict[str, float]]:
    by_name: dict[str, list[float]] = {}
    for result in results:
        if result.group is not None:
            by_name.setdefault(result.group, []).append(result.score)
    groups = {name: {"mean": statistics.fmean(of), "count": len(of)} for name, of in sorted(by_name.items())}
    if len(groups) == 1 and len(results) == len(next(iter(by_name.values()))):
        return {}
    return {} if all(_is_told(name, of["mean"], parts) for name, of in groups.items()) else groups


def _is_told(group: str, mean: float, parts: Mapping[str, float]) -> bool:
    """Whether a metric has "type/GROUP" or the like with this mean."""
    return any(name.endswith(f"/{group}") and math.isclose(value, mean) for name, value in parts.items())


def read_summary(directory: Path) -> dict[str, Any]:
    """The summary of a run.

    Raises:
      DataError: there is none.
    """
    path = directory / SUMMARY
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; expected the summary of a run") from None
    except ValueError as error:
        raise DataError(f"{path}: found no JSON ({error}); expected the summary of a run") from error
