"""The summary of a run: the score first, its confidence interval, and how many answers could not be parsed."""

import importlib.metadata
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import glm4v_jax
from eval.data.items import Item
from eval.metrics import METRICS, Metric
from eval.results import (
    ANSWERS,
    RESULTS,
    SUMMARY,
    Category,
    ItemResult,
    digest_of,
    encoded,
    read_answers,
    score_items,
    scores_of,
    write_results,
)
from eval.statistics import clustered, score_interval
from eval.tasks import Task
from glm4v_jax.errors import DataError, not_there
from glm4v_jax.files import replacing

CONFIDENCE = 0.95


def score_run(
    items: Sequence[Item], task: Task, out: Path, about: Mapping[str, Any], seed: int = 0
) -> tuple[list[ItemResult], dict[str, Any]]:
    """Score the answers of a run, and write results and summary beside them; needs no model.

    `about` are further fields of the summary: model, options. Returns the results in the items' order, and the summary;
    DataError if answers are missing.
    """
    metric = METRICS[task.metric]
    results = score_items(items, read_answers(out / ANSWERS), metric)
    figures = summarize(items, results, metric, seed)
    summary = {
        "score": figures.pop("score"),
        "task": task.name,
        "metric": task.metric,
        **figures,
        # Equal for the same questions in the same order.
        "items": digest_of([(item.id, item.asked, item.reference) for item in items]),
        **about,
        "versions": {"glm4v_jax": glm4v_jax.__version__, "jax": importlib.metadata.version("jax")},
    }
    write_results(results, out / RESULTS)
    write_summary(summary, out / SUMMARY)
    return results, summary


def summarize(items: Sequence[Item], results: Sequence[ItemResult], metric: Metric, seed: int = 0) -> dict[str, Any]:
    """Compute the figures of a run; equal results give equal figures.


    Returns:
      score: the metric's own, as it is published for the task.
      mean: of the items' scores.
      interval: of the score, by bootstrap over clusters of items; Wilson's where these do not differ.
      count, clusters: of items, and of what the interval resamples, see `eval.metrics.metric.Cluster`.
      parts: further figures of the metric.
      groups: mean and count of each group of items, unless the parts have these means or there is one group only.
      rates: fraction of items in each `results.Category` but "scored"; with the scored ones they add up to 1.
      truncated_share: fraction of items whose text was cut off, parsed or not.
      forced_share: fraction of items whose thought was closed because its budget was used up.
      tokens: of all prompts, and of all texts.
    """
    if not results:
        raise DataError("results: found none; expected at least one")
    scores = scores_of(items, results)
    parts = dict(metric.aggregate(scores))
    clusters = clustered(scores, [result.cluster for result in results]).values()
    values, weights = zip(*map(metric.terms, clusters), strict=True)
    low, high = score_interval(values, weights, confidence=CONFIDENCE, seed=seed)
    counts = Counter(result.category for result in results)
    return {
        "score": parts.pop("score"),
        "mean": statistics.fmean(result.score for result in results),
        "interval": [low, high],
        "confidence": CONFIDENCE,
        "count": len(results),
        "clusters": len(clusters),
        "parts": parts,
        "groups": _groups(results, parts),
        "rates": {name: counts[name] / len(results) for name in get_args(Category) if name != "scored"},
        "truncated_share": statistics.fmean(result.is_truncated for result in results),
        "forced_share": statistics.fmean(result.is_forced for result in results),
        "tokens": {
            "prompt": sum(result.prompt_tokens for result in results),
            "new": sum(result.new_tokens for result in results),
        },
    }


def _groups(results: Sequence[ItemResult], parts: Mapping[str, float]) -> dict[str, dict[str, float]]:
    by_name: dict[str, list[float]] = {}
    for result in results:
        if result.group is not None:
            by_name.setdefault(result.group, []).append(result.score)
    groups = {name: {"mean": statistics.fmean(of), "count": len(of)} for name, of in sorted(by_name.items())}
    is_one = len(groups) == 1 and len(results) == len(next(iter(by_name.values())))
    return {} if is_one or all(_is_part(name, of["mean"], parts) for name, of in groups.items()) else groups


def _is_part(group: str, mean: float, parts: Mapping[str, float]) -> bool:
    """Whether a metric has "type/GROUP" or the like with this mean."""
    return any(name.endswith(f"/{group}") and math.isclose(value, mean) for name, value in parts.items())


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write a summary as JSON, complete or not at all."""
    with replacing(path) as aside:
        aside.write_bytes(encoded(summary, indent=2) + b"\n")


def read_summary(directory: Path) -> dict[str, Any]:
    """Read the summary of a run; DataError if the file does not exist or is not JSON."""
    path = directory / SUMMARY
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(not_there(path, "the summary of a run")) from None
    except ValueError as error:
        raise DataError(f"{path}: found invalid JSON ({error}); expected the summary of a run") from error
