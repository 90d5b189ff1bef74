"""How sure a mean is: intervals by bootstrap for scores of any kind, and Wilson's for shares."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glm4v_jax.errors import DataError

RESAMPLES = 10_000
_CELLS = 1 << 22
"""Of an array of drawn indices, 32 MiB of them: what is drawn at a time, whatever the number of scores."""


class Difference(NamedTuple):
    """Of two runs over the same items.

    mean: of the second's scores less the first's.
    low, high: of its confidence interval.
    """

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron and Tibshirani 1993, chapter 13).

    The same for the same values, order included, and seed. Of one value, and of equal ones, both ends are that value:
    a bootstrap knows nothing of what it has not seen. For shares near 0 or 1 `wilson_interval` does.

    Args:
        values: [N] scores; finite.
        confidence: share of intervals that hold the true mean, between 0 and 1.
        resamples: how often N values are drawn.
        seed: of the draws.

    Raises:
        DataError: there are no values, one is not finite, or an argument is out of its range.
    """
    scores = _checked(values, confidence)
    if resamples < 1:
        raise DataError(f"resamples: found {resamples}, expected at least 1")
    if np.all(scores == scores[0]):
        return float(scores[0]), float(scores[0])
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // len(scores))
    means = [
        scores[rng.integers(len(scores), size=(min(rows, resamples - start), len(scores)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """How much better the second of two runs is, with the interval of `bootstrap_interval` over the items.

    Items are drawn, not scores: what makes an item hard for both runs cancels.

    Args:
        first, second: [N] scores of the same items in the same order.
        confidence, resamples, seed: as of `bootstrap_interval`.

    Raises:
        DataError: as `bootstrap_interval` does, or the runs differ in length.
    """
    if len(first) != len(second):
        raise DataError(f"scores: found {len(first)} and {len(second)}; expected those of the same items")
    differences = [float(b) - float(a) for a, b in zip(first, second, strict=True)]
    low, high = bootstrap_interval(differences, confidence=confidence, resamples=resamples, seed=seed)
    return Difference(math.fsum(differences) / len(differences), low, high)


def wilson_interval(hits: int, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (JASA 22, 1927), without continuity correction.

    Raises:
        DataError: `count` is not positive, or `hits` not from 0 to `count`, or `confidence` not between 0 and 1.
    """
    if count < 1 or not 0 <= hits <= count:
        raise DataError(f"share: found {hits} of {count}; expected from 0 to all of at least 1")
    _check_confidence(confidence)
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = hits / count, z * z / count
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _checked(values: Sequence[float], confidence: float) -> np.ndarray:
    scores = np.asarray(values, np.float64)
    if scores.ndim != 1 or not len(scores):
        raise DataError(f"scores: found the shape {scores.shape}; expected at least one in a row")
    if not np.all(np.isfinite(scores)):
        raise DataError(f"scores: found {scores[~np.isfinite(scores)][0]}; expected finite numbers")
    _check_confidence(confidence)
    return scores


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise DataError(f"confidence: found {confidence}, expected between 0 and 1")
