"""From records to the batches of training steps, in an order that the seed decides; can be resumed after any step.

A batch is divided into lanes, each with a reader and rows of its own, so that every process reads only what its devices
take. The lanes follow from the job file alone: another mesh, or other processes, get the same batches.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError, Glm4vError, counted, one_line
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.config import BatchConfig, DataConfig
from train.data.packing import Packer, TrainBatch, pack
from train.data.placement import joined, lanes_here, num_lanes, stacked
from train.data.records import Record
from train.data.samples import EncodeOptions, Sample, encode

AHEAD = 2
"""Steps whose batches are prepared while another is computed."""

_PAUSES = (0.5, 2.0)
"""Seconds before a record is read again that a disk, or the network, has refused."""
_PERMANENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)

Draws = Sequence[tuple[np.ndarray, float]]
"""Of several sets the numbers of their records, and their shares of what is drawn."""

TOO_LONG = "too long: found more tokens than batch.length, or data.max_length where that is less"
"""Why a record is dropped."""

Outcome = Sample | DataError | None
"""What became of a record: a sample; None where it is too long and is dropped; or an error that names it."""


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


@dataclasses.dataclass
class Encoder:
    """Record number -> its sample; called in threads, so that errors are returned and not raised.

    records: by their number.
    encode: record -> sample, None if it is too long; see `samples.encode`.
    check: raises `DataError` for a sample that fits no batch; see `Packer.check`.
    pauses: seconds before each further attempt to read a record.
    references: of preference data, what pairs are compared with, [records, 2] (`references.table_of`).
    reported: numbers of the bad records that have been named: each once, and not by every lane and in every epoch.
    """

    records: Sequence[Record]
    encode: Callable[[Record], Sample | None]
    check: Callable[[Sample], None]
    pauses: Sequence[float] = _PAUSES
    references: np.ndarray | None = None
    reported: set[int] = dataclasses.field(default_factory=set)

    def __call__(self, number: int) -> tuple[int, Outcome]:
        """Return the number and what became of the record."""
        number, place = int(number), f"row {number}"
        try:
            record = self._read(number)
            place = record.source
            sample = self.encode(record)
            if sample is None:
                return number, None
            self.check(sample)
            return number, sample if self.references is None else self._compared(number, sample)
        except Glm4vError as error:
            return number, DataError(str(error))
        except OSError as error:
            return number, DataError(f"{place}: {one_line(error)}")
        except Exception as error:  # of a media decoder that fails in its own way, for one
            return number, DataError(f"{place}: {type(error).__name__}: {error}")

    def _compared(self, number: int, sample: Sample) -> Sample:
        assert self.references is not None
        chosen, rejected = self.references[number].tolist()
        if math.isnan(chosen):
            raise DataError(
                f"{sample.source}: found it readable, which it was not before the training; expected no change: remove "
                "references.npz from the output directory, and the job computes again what answers are compared with"
            )
        return dataclasses.replace(sample, reference=(chosen, rejected))

    def again(self, number: int) -> Sample:
        """Encode a record once more that had become a sample.

        Raises:
          DataError: it no longer does.
        """
        _, found = self(number)
        if isinstance(found, Sample):
            return found
        raise DataError(f"row {number}: found {found or TOO_LONG}; expected the sample it was")

    def _read(self, number: int) -> Record:
        for pause in self.pauses:
            try:
                return self.records[number]
            except _PERMANENT:
                raise
            except OSError:
                time.sleep(pause)
        return self.records[number]


def make_encoder(
    records: Sequence[Record],
    processor: Glm4vProcessor,
    config: Glm4vConfig,
    data: DataConfig,
    batch: BatchConfig,
    lanes: int | None = None,
) -> Encoder:
    """Return the encoder of a job's records.

    Args:
      records: by their number.
      processor, config: of the model.
      data, batch: see there.
      lanes: into how many a batch is divided, each of which has room for less; by default as the job says.
    """
    encoding = functools.partial(encode, processor=processor, config=config, options=encode_options(data, batch))
    return Encoder(records, encoding, packer_of(batch, lanes or num_lanes(batch)).check)


def outcomes(encoder: Encoder, threads: int, index: int = 0, count: int = 1) -> Iterator[tuple[int, Outcome]]:
    """Yield what becomes of every `count`-th record from the `index`-th on, in their order, encoded in threads."""
    numbers = grain.MapDataset.source(range(index, len(encoder.records), count))
    yield from numbers.map(encoder).to_iter_dataset(_reading(threads))


def _reading(threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)


class Lane:
    """Every `count`-th record from the `index`-th on, in an order that a seed decides, packed; see `in_order`.

    After the last epoch come the batches that are not full, and then empty ones: other lanes may have more.

    Attributes:
      counts: of its rows so far.
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
        """Start at the beginning.

        Args:
          encoder: of all records.
          packer: of its own.
          data: for the order, and what to do with bad rows.
          index, count: which lane this is, and of how many.
          threads: how many encode samples.
          seed: of the order, which is the same for all lanes.
          log: called with one message for every record that is skipped.
          draws: sets and their shares; by default all records are one.
          epochs: how often each record is read; 0 is without end.
        """
        self._encoder, self._packer, self._data, self._log = encoder, packer, data, log
        self.counts = RowCounts()
        numbers = in_order(draws or [(range(len(encoder.records)), 1.0)], data.shuffle, seed, index, count, epochs)
        self._reader = iter(numbers.map(encoder).to_iter_dataset(_reading(threads)))

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
        return json.loads(json.dumps(state))

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resume from another one's position.

        Raises:
          DataError: the data or the options differ from those of the state.
        """
        self._reader.set_state(state["reader"])
        self._packer.set_state(state["packer"], self._encoder.again)
        self.counts = RowCounts(**state["counts"])

    def _skip(self, number: int, error: DataError | None) -> None:
        if error is None:
            self.counts.dropped += 1
            return
        if self._data.bad_rows == "error":
            raise error
        self.counts.skipped += 1
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
        """Start at the beginning.

        Args:
          encoder: of the records; see `make_encoder`.
          config: of the model.
          data, batch: see there.
          mesh: whose devices take the batches.
          seed: of the order.
          log: called with one message for every record that is skipped.
          draws, epochs: see `Lane`.

        Raises:
          DataError: there are no records.
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
        """Return the next step's micro-batches, and start preparing those of later steps.

        Returns:
          The batch on the host; and the state after it of this process's lanes, lane -> state.

        Raises:
          DataError: a record is bad and the job says that this ends it, or a whole epoch has brought no sample.
        """
        while len(self._ahead) <= AHEAD:
            self._ahead.append(self._thread.submit(self._make))
        return self._ahead.popleft().result()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resume; call it before the first batch is taken.

        Args:
          state: of all lanes: those that `__next__` returned in every process.

        Raises:
          DataError: the data or the options differ from those of the state.
        """
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
        rows, length = _shape(self._batch, self._count)["vision_shape"] or (0, 0)
        return rows * length // self._config.vision_config.spatial_merge_size**2


def packer_of(batch: BatchConfig, lanes: int = 1) -> Packer:
    """Return the packer of one of `lanes` lanes."""
    # Without packing the first batch that is open takes every sample until it is full.
    return Packer(**_shape(batch, lanes), open_batches=batch.open_batches if batch.pack else 1)


def packed(samples: Sequence[Sample], batch: BatchConfig, config: Glm4vConfig, lanes: int = 1) -> TrainBatch:
    """Return one lane's part of a batch, of samples that `packer_of` has put together.

    Raises:
      DataError: the samples do not fit.
    """
    return pack(samples, **_shape(batch, lanes), config=config, average=batch.average)


def _shape(batch: BatchConfig, lanes: int) -> dict[str, Any]:
    """Arguments of `pack` for one lane's part of a batch."""
    vision = batch.vision_shape
    return {
        "rows": batch.rows // lanes,
        "length": batch.length,
        "vision_shape": None if vision is None else (vision[0] // lanes, vision[1]),
        "per_row": batch.per_row,
    }


def encode_options(data: DataConfig, batch: BatchConfig) -> EncodeOptions:
    """Return a job's options for its records: samples are no longer than a row."""
    return dataclasses.replace(data, max_length=min(data.max_length or batch.length, batch.length))
