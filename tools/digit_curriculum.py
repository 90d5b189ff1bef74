"""The training of our own tiny model as a sequence of records: what is learned, how much of it, and when."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import overload

import numpy as np

from glm4v_jax.errors import ConfigError
from glm4v_jax.tiny.digits import Task, digits, make_example
from train.data.records import Record

CYCLE = 32
"""Records in which every task has its part; about a batch."""


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Which tasks come how often, and when a second digit joins the first.

    Attributes:
      reading, grounding, motion: records of each `CYCLE`.
      two_digits: (place in the training from 0 to 1, share of the images of grounding with two digits), in the order
        of the places; linear between them, constant before the first and after the last.
    """

    reading: int = 16
    grounding: int = 13
    motion: int = 3
    two_digits: tuple[tuple[float, float], ...] = ((0.05, 0.1), (0.2, 0.75))

    def two_digits_at(self, place: float) -> float:
        """The share of images of two digits among those of grounding."""
        places, shares = zip(*self.two_digits, strict=True)
        return float(np.interp(place, places, shares))


class DigitRecords(Sequence[Record]):
    """Records by their number, each made when it is asked for, from the seed and its number alone.

    The order is that of the training: `data.shuffle` is to be off.
    """

    def __init__(self, count: int, curriculum: Curriculum | None = None, *, seed: int = 0) -> None:
        """Make nothing yet; ConfigError if the curriculum's tasks do not add up to a cycle."""
        self._count, self._curriculum, self._seed = count, curriculum or Curriculum(), seed
        parts = (self._curriculum.reading, self._curriculum.grounding, self._curriculum.motion)
        if sum(parts) != CYCLE or min(parts) < 0:
            raise ConfigError(f"curriculum: found {' + '.join(map(str, parts))} records; expected {CYCLE} together")
        # Evenly mixed: a batch may begin anywhere.
        self._kinds = np.random.default_rng(seed).permutation(np.repeat(np.arange(3), parts))
        self._rank = np.array([np.sum(self._kinds[:i] == kind) for i, kind in enumerate(self._kinds)])
        self._order = functools.lru_cache(maxsize=16)(self._new_order)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        draw = np.random.default_rng([self._seed, index])
        cycle, place = divmod(index, CYCLE)
        kind = int(self._kinds[place])
        number = cycle * int(np.sum(self._kinds == kind)) + int(self._rank[place])
        turn, position = divmod(number, len(digits("train").labels))
        task = self._task(kind, index / len(self), draw)
        made = make_example(task, "train", int(self._order(kind, turn)[position]), draw, f"digits/{task}/train:{index}")
        return Record(made.messages, (False, True), made.source)

    def _task(self, kind: int, place: float, draw: np.random.Generator) -> Task:
        if kind != 1:
            return "reading" if kind == 0 else "motion"
        return "grounding2" if draw.random() < self._curriculum.two_digits_at(place) else "grounding1"

    def _new_order(self, kind: int, turn: int) -> np.ndarray:
        """The order in which a kind of task takes the digits in its `turn`-th round through them all."""
        return np.random.default_rng([self._seed, kind, turn]).permutation(len(digits("train").labels))
