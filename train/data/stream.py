"""From records to the batches of training steps, in an order that the seed decides; can be resumed after any step.

A batch is divided into lanes, each with a reader and rows of its own, so that every process reads only what its devices
take. The lanes follow from the job file alone: another mesh, or other processes, get the same batches.
"""

import collections
import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError, counted
from train.config import BatchConfig, DataConfig
from train.data.encoder import TOO_LONG, Encoder, reading
from train.data.packing import Packer, TrainBatch
from train.data.placement import joined, lane_shape, lanes_here, num_lanes, packed, packer_of, stacked
from train.data.samples import Sample

AHEAD = 2
"""Steps whose batches are prepared while another is computed."""

Draws = Sequence[tuple[np.ndarray, float]]
"""Of several sets the numbers of their records, and their shares of what is drawn."""


@dataclasses.dataclass
class RowCounts:
    """What became of the rows that were read.

    samples: became samples. dropped: were too long. skipped: could not be read, or fit no batch.
    """

    samples: int = 0
    dropped: int = 0
    skipped: int = 0

    @property
    def rows(self) -> int:
        """How many were read, every epoch counted."""
        return self.samples + self.dropped + self.skipped

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "RowCounts":
        """The sums over lanes, from their states."""
        counts = [lane["counts"] for lane in state.values()]
        return cls(*(sum(one[field.name] for one in counts) for field in dataclasses.fields(cls)))


class Lane:
    """Every `count`-th record from the `index`-th on, in an order that a seed decides, packed; see `in_order`.

    After the last epoch come the batches that are not full, and then empty ones: other lanes may have more.

    Attributes:
      counts: of its rows so far.
      bad: what is wrong with the first of them that was skipped; None if none was.
    """

    def __init__(
        self,
        encoder: Encoder,
        packer: Packer,
        data: DataConfig,
        *,
        index: int,
        count: int,
        threads: int,
        seed: int,
        log: Callable[[str], None],
        draws: Draws = (),
        epochs: int = 0,
    ):
        """Start at the beginning of lane `index` of `count`; `draws`, `seed` and `epochs` are those of `in_order`.

        `log` is called with one message for every record that is skipped.
        """
        self._encoder, self._packer, self._data, self._log = encoder, packer, data, log
        self.counts = RowCounts()
        self.bad: str | None = None
        numbers = in_order(draws or [(range(len(encoder.records)), 1.0)], data.shuffle, seed, index, count, epochs)
        self._reader = iter(numbers.map(encoder).to_iter_dataset(reading(threads)))

    def __next__(self) -> list[Sample]:
        """Return the samples of the next batch, none after the last one.

        Raises:
          DataError: a record is bad and the job says that this ends it, or a whole epoch has brought no sample.
        """
        fruitless = 0
        while True:
            try:
                number, found = next(self._reader)
            except StopIteration:
                return next(self._packer.finish(), [])
            if isinstance(found, Sample):
                fruitless = 0
                self.counts.samples += 1
                if (done := self._packer.push(found, number)) is not None:
                    return done
                continue
            self._skip(number, found)
            fruitless += 1
            if fruitless >= len(self._encoder.records):
                reason = found or TOO_LONG
                raise DataError(
                    f"found no sample in {counted(fruitless, 'row')}, a whole epoch; reason for the last: {reason}"
                )

    def get_state(self) -> dict[str, Any]:
        """Return its position, as JSON."""
        counts = dataclasses.asdict(self.counts)
        state = {"reader": self._reader.get_state(), "packer": self._packer.get_state(), "counts": counts}
        return json.loads(json.dumps(state | {"bad": self.bad}))

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resume from another one's position; DataError if the data or the options differ from those of the state."""
        self._reader.set_state(state["reader"])
        self._packer.set_state(state["packer"], self._encoder.again)
        self.counts = RowCounts(**state["counts"])
        self.bad = state.get("bad")  # earlier versions have none

    def _skip(self, number: int, error: DataError | None) -> None:
        if error is None:
            self.counts.dropped += 1
            return
        if self._data.bad_rows == "error":
            raise error
        self.counts.skipped += 1
        self.bad = self.bad or str(error)
        if number not in self._encoder.reported:
            self._encoder.reported.add(number)
            self._log(str(error))


def in_order(
    draws: Sequence[tuple[Sequence[int] | np.ndarray, float]],
    shuffle: bool,
    seed: int,
    index: int,
    count: int,
    epochs: int = 0,
) -> Any:
    """Return the numbers of a lane's records in their order: a dataset of grain.

    Each set is repeated, in a new order every time; together the lanes have each record once before any has it again.
    The sets alternate so that each lane has the shares at any time, to within a record.

    >>> numbers = in_order([([0, 1, 2], 3.0), ([3], 1.0)], False, 0, index=0, count=1)
    >>> [int(numbers[place]) for place in range(9)]
    [0, 1, 2, 3, 0, 1, 2, 3, 0]

    Args:
      draws: the numbers of each set, and its share, relative to the others.
      shuffle: whether sets are read in an order that the seed decides, or as they are.
      seed: of the order.
      index, count: which lane this is, and of how many.
      epochs: how often each record is read, of one set; 0 is without end.
    """
    sets = []
    for place, (numbers, _) in enumerate(draws):
        one = grain.MapDataset.source(numbers).seed(seed + place)
        # Of each set by itself: lanes would otherwise take turns with the sets.
        sets.append((one.shuffle() if shuffle else one).repeat(epochs or None)[index::count])
    return sets[0] if len(sets) == 1 else grain.MapDataset.mix(sets, [share for _, share in draws])


class Stream:
    """Batches of steps: those of all lanes of this process."""

    def __init__(
        self,
        encoder: Encoder,
        config: Glm4vConfig,
        data: DataConfig,
        batch: BatchConfig,
        mesh: Mesh,
        *,
        seed: int = 0,
        log: Callable[[str], None],
        draws: Draws = (),
        epochs: int = 0,
    ):
        """Start at the beginning; `draws` and `epochs` are those of `Lane`. DataError if there are no records.

        `log` is called with one message for every record that is skipped.
        """
        if not len(encoder.records):
            raise DataError(f"{', '.join(data.files)}: found no rows; expected some to train on")
        self._config, self._batch, self._count = config, batch, num_lanes(batch)
        self._epochs = epochs
        self._records = sum(len(numbers) for numbers, _ in draws) or len(encoder.records)
        here = lanes_here(batch, mesh)
        threads = max(1, data.threads // len(here))
        self._lanes = {
            index: Lane(
                encoder, packer_of(batch, self._count), data, index=index, count=self._count, threads=threads,
                seed=seed, log=log, draws=draws, epochs=epochs,
            )
            for index in here
        }  # fmt: skip
        self._ahead: collections.deque[concurrent.futures.Future[tuple[TrainBatch, dict[str, Any]]]]
        self._ahead = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "batches")

    def __next__(self) -> tuple[TrainBatch, dict[str, Any]]:
        """Return the next step's micro-batches, on the host, and the state of this process's lanes after them.

        DataError if a record is bad and the job says that this ends it, or a whole epoch has brought no sample.
        """
        while len(self._ahead) <= AHEAD:
            self._ahead.append(self._thread.submit(self._make))
        return self._ahead.popleft().result()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resume from the states of all lanes, before the first batch is taken; DataError as in `Lane.set_state`."""
        for index, lane in self._lanes.items():
            lane.set_state(state[str(index)])

    def epochs(self, state: Mapping[str, Any]) -> float:
        """Return how many epochs lanes have read, at their states, which may be those of this process alone.

        Where epochs end, each lane has read all of them at its end, although some have a row more than others.
        """
        rows = RowCounts.of(state).rows
        if not self._epochs:
            return rows * self._count / (self._records * len(state))
        own = sum(len(range(int(index), self._epochs * self._records, self._count)) for index in state)
        return rows * self._epochs / own if own else float(self._epochs)

    def left(self, state: Mapping[str, Any]) -> int:
        """Return how many rows of all epochs are in no batch yet, at a state of all lanes; 0 where there is no end."""
        waiting = sum(len(samples) for lane in state.values() for samples in lane["packer"]["open"])
        return self._epochs * self._records - RowCounts.of(state).rows + waiting if self._epochs else 0

    def close(self) -> None:
        """Stop preparing batches."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self) -> tuple[TrainBatch, dict[str, Any]]:
        parts = [self._next_parts() for _ in range(self._batch.micro_batches)]
        state = {str(index): lane.get_state() for index, lane in self._lanes.items()}
        return stacked([joined(lanes, self._count, self._merged_tokens) for lanes in parts]), state

    def _next_parts(self) -> dict[int, TrainBatch]:
        """The next micro-batch: lane -> its part."""
        return {
            index: packed(next(lane), self._batch, self._config, self._count) for index, lane in self._lanes.items()
        }

    @property
    def _merged_tokens(self) -> int:
        rows, length = lane_shape(self._batch, self._count)["vision_shape"] or (0, 0)
        return rows * length // self._config.vision_config.spatial_merge_size**2
