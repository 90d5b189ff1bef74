"""How hard the problems are for a model: pass rates by key, a file with a line for each.

{"key": "a1b2", "samples": 8, "right": 5, "mean": 0.625}
"""

import json
import math
import statistics
from collections.abc import Collection, Sequence
from typing import Any

from glm4v_jax.data.tables import open_rows
from glm4v_jax.errors import DataError


def read_levels(files: Sequence[str], keys: Collection[str]) -> dict[str, float]:
    """Return the pass rate of each problem that a file has; of several files, of different models, the mean.

    Files are as `glm4v train levels` writes them; any with fields "key" and "mean" will do. OSError if one cannot be
    read, DataError if a line is invalid, or of another problem than those of `keys`.
    """
    known = set(keys)
    found: dict[str, list[float]] = {}
    for file in files:
        rows = open_rows(file)
        seen = set()
        for number in range(len(rows)):
            key, mean = _level_of(rows[number], rows.place(number))
            if key not in known:
                raise DataError(f"{rows.place(number)}: key: found {key!r}; expected the key of a problem of the job")
            if key in seen:
                raise DataError(f"{rows.place(number)}: key: found {key!r} a second time; expected one line for each")
            seen.add(key)
            found.setdefault(key, []).append(mean)
    return {key: statistics.fmean(means) for key, means in found.items()}


def _level_of(row: dict[str, Any], place: str) -> tuple[str, float]:
    key, mean = row.get("key"), row.get("mean")
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise DataError(f"{place}: key: found {key!r}; expected the key of a problem")
    if isinstance(mean, bool) or not isinstance(mean, int | float) or not (math.isfinite(mean) and 0 <= mean <= 1):
        raise DataError(f"{place}: mean: found {mean!r}; expected a number from 0 to 1")
    return str(key), float(mean)


def level_line(key: str, rewards: Sequence[float]) -> str:
    """Return the line of a problem, of the rewards of its rollouts.

    >>> level_line("a", [1.0, 0.0, 0.5, 1.0])
    '{"key": "a", "samples": 4, "right": 2, "mean": 0.625}'
    """
    right = sum(reward == 1 for reward in rewards)
    return json.dumps({"key": key, "samples": len(rewards), "right": right, "mean": statistics.fmean(rewards)})
