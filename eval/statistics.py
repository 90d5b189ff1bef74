"""Confidence intervals: by bootstrap for scores of any kind, and Wilson's for fractions."""

import dataclasses
import math
import statistics
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import numpy as np

from glm4v_jax.errors import DataError, counted

T = TypeVar("T")

RESAMPLES = 10_000
_CELLS = 1 << 22
"""Indices that are drawn at a time, 32 MiB of them, whatever the number of scores."""
_SPREAD = 1e-12
"""Ends of an interval that are no further apart than this differ by rounding only."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of the second run's scores less the first's over the same items, and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float],
    counts: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a mean, or ratio of sums (Efron and Tibshirani 1993, chapter 13).

    The same for the same values, in the same order, and seed. For one value, or equal ones, both ends are that value;
    `score_interval` widens these.

    Args:
        values: [N] scores, or sums over clusters, which are resampled together; finite.
        counts: [N] `sum(values)` is divided by their sum; not negative. None: ones, for the mean. A resample whose
            counts are all 0 is 1, or 0 if its values are negative.
        confidence: fraction of intervals that contain the true mean, between 0 and 1.
        resamples: number of draws of N values.
        seed: of the draws.

    Raises:
        DataError: there are no values, one is not finite, or an argument is out of its range.
    """
    scores = _checked(values, confidence)
    weights = np.ones_like(scores) if counts is None else _checked(counts, confidence)
    if len(weights) != len(scores):
        raise DataError(f"counts: found {len(weights)} for {counted(len(scores), 'value')}; expected as many")
    if np.any(weights < 0):
        raise DataError(f"counts: found {weights.min():g}; expected none below 0")
    if resamples < 1:
        raise DataError(f"resamples: found {resamples}; expected at least 1")
    is_even = np.all(weights == weights[0])
    if is_even and np.all(scores == scores[0]):
        value = float(_ratio(scores[0], weights[0]))
        return value, value
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // len(scores))
    ratios = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(len(scores), size=(min(rows, resamples - start), len(scores)))
        totals = len(scores) * weights[0] if is_even else weights[drawn].sum(axis=1)
        ratios.append(_ratio(scores[drawn].sum(axis=1), totals))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)


def score_interval(
    values: Sequence[float],
    counts: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute the interval of a score that is sum(values) / sum(counts), from 0 to 1: by bootstrap over clusters.

    Where no resample differs, as with values that are all 0 or all 1, Wilson's with as many trials as there are
    clusters: it is wide enough for any score between 0 and 1, whose variance is at most that of a fraction.

    `values`, `counts`: [N] sums over each cluster; a score below 0 counts as 0. The rest is as of `bootstrap_interval`.
    """
    ends = bootstrap_interval(values, counts, confidence=confidence, resamples=resamples, seed=seed)
    low, high = (min(max(end, 0.0), 1.0) for end in ends)
    if high - low > _SPREAD:
        return low, high
    return wilson_interval(low * len(values), len(values), confidence=confidence)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compute the mean difference of two runs, with the interval of `bootstrap_interval` over the items.

    Items are resampled, not scores: what makes an item hard for both runs cancels.

    >>> paired_difference([0.0, 1.0], [0.5, 1.0]).mean
    0.25

    Args:
        first, second: [N] scores of the same items in the same order.
        clusters: [N] items with the same one are resampled together; those with None alone.
        confidence, seed: as of `bootstrap_interval`.

    Raises:
        DataError: as `bootstrap_interval` does, or the runs differ in length.
    """
    if len(first) != len(second):
        raise DataError(f"scores: found {len(first)} and {len(second)}; expected those of the same items")
    differences = [float(b) - float(a) for a, b in zip(first, second, strict=True)]
    drawn = list(clustered(differences, clusters or [None] * len(differences)).values())
    low, high = bootstrap_interval(
        [math.fsum(together) for together in drawn],
        [len(together) for together in drawn],
        confidence=confidence,
        seed=seed,
    )
    return Difference(math.fsum(differences) / len(differences), low, high)


def clustered(things: Sequence[T], clusters: Sequence[Hashable]) -> dict[Hashable, list[T]]:
    """Group things [N] by their clusters [N], in the order of the first things; each None is a cluster of its own."""
    found: dict[Hashable, list[T]] = {}
    for index, (thing, cluster) in enumerate(zip(things, clusters, strict=True)):
        found.setdefault(("alone", index) if cluster is None else ("together", cluster), []).append(thing)
    return found


def wilson_interval(hits: float, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's score interval of a fraction (JASA 22, 1927), without continuity correction.

    Raises:
        DataError: `count` is not positive, or `hits` not from 0 to `count`, or `confidence` not between 0 and 1.
    """
    if count < 1 or not 0 <= hits <= count:
        raise DataError(f"hits: found {hits} of {count}; expected from 0 to all of at least 1")
    _check_confidence(confidence)
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    fraction, weight = hits / count, z * z / count
    centre = (fraction + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(fraction * (1 - fraction) / count + weight / (4 * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _ratio(sums: Any, counts: Any) -> np.ndarray:
    nothing = np.equal(counts, 0)
    return np.where(nothing, np.greater_equal(sums, 0), sums / np.where(nothing, 1, counts))


def _checked(values: Sequence[float], confidence: float) -> np.ndarray:
    scores = np.asarray(values, np.float64)
    if scores.ndim != 1 or not len(scores):
        raise DataError(f"scores: found the shape {scores.shape}; expected at least one")
    if not np.all(np.isfinite(scores)):
        raise DataError(f"scores: found {scores[~np.isfinite(scores)][0]}; expected finite numbers")
    _check_confidence(confidence)
    return scores


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise DataError(f"confidence: found {confidence}; expected a number between 0 and 1")
