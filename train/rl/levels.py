"""How hard the problems are for a model: pass rates by key, a file with a line for each.

{"key": "a1b2", "samples": 8, "right": 5, "mean": 0.625}
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from glm4v_jax.data.tables import open_rows
from glm4v_jax.devices.distributed import is_first
from glm4v_jax.errors import DataError
from glm4v_jax.files import replacing


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


@dataclasses.dataclass(frozen=True)
class Levels:
    """A file of pass rates, with a line for each problem that is done.

    Attributes:
      path: the file.
      model: fingerprint of the checkpoint.
      samples: rollouts of each problem.
    """

    path: Path
    model: str
    samples: int

    def done(self) -> set[str]:
        """Return the keys of the lines that are there; a last line that was cut off is removed.

        Raises:
          DataError: the file is of another model or number of rollouts, or is none of pass rates.
        """
        if not self.path.is_file():
            return set()
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        keys = set()
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                keys.add(row["key"])
                found = row.get("model"), row.get("samples")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(
                    f"{self.path}:{number}: found no pass rate of a problem; expected one: pass --restart to measure "
                    "again, or --out for another file"
                ) from error
            if found != (self.model, self.samples):
                raise DataError(
                    f"{self.path}:{number}: found {found[1]} rollouts of model {found[0]}; expected {self.samples} of "
                    f"{self.model}: pass --restart to measure again, or --out for another file"
                )
        if len(whole) < len(text) and is_first():
            with replacing(self.path) as aside:
                aside.write_bytes(whole)
        return keys

    def add(self, key: str, rewards: Sequence[float]) -> None:
        """Write the line of a problem, of the rewards of its rollouts."""
        right, mean = sum(reward == 1 for reward in rewards), statistics.fmean(rewards)
        line = {"key": key, "samples": len(rewards), "right": right, "mean": mean, "model": self.model}
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
