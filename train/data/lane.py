"""A lane: one reader of records and the batches that it packs, going on from any point."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError, Glm4vError, one_line
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.config import DataConfig
from train.data.packing import Packer
from train.data.records import Record
from train.data.samples import EncodeOptions, Sample, encode

_PAUSES = (0.5, 2.0)
"""Seconds before a record is read once more that a disk, or the net, has refused."""
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


@dataclasses.dataclass
class Counts:
    """What became of the records that were read.

    samples: became samples. dropped: were too long. skipped: could not be read, or fit no batch.
    """

    samples: int = 0
    dropped: int = 0
    skipped: int = 0

    @property
    def rows(self) -> int:
        """That were read, every pass counted."""
        return self.samples + self.dropped + self.skipped

    def __add__(self, other: "Counts") -> "Counts":
        """Those of both."""
        return Counts(self.samples + other.samples, self.dropped + other.dropped, self.skipped + other.skipped)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Record number -> sample, for a model and the options of a job."""

    records: Sequence[Record]
    processor: Glm4vProcessor
    config: Glm4vConfig
    options: EncodeOptions

    def __call__(self, number: int) -> "Made":
        """Called in threads: nothing may be raised there that belongs to another record."""
        number, place = int(number), f"row {number}"
        try:
            record = _read(self.records, number)
            place = record.source
            return Made(number, encode(record, self.processor, self.config, self.options))
        except Glm4vError as error:
            return Made(number, None, str(error))
        except OSError as error:
            return Made(number, None, f"{place}: {one_line(error)}")
        except Exception as error:  # of a decoder that fails in a way of its own, for one
            return Made(number, None, f"{place}: {type(error).__name__}: {error}")

    def again(self, number: int) -> Sample:
        """The sample of a record that had one.

        Raises:
          DataError: it has none any more.
        """
        made = self(number)
        if made.sample is None:
            raise DataError(f"row {number}: found {made.error or 'a sample that is too long'}; expected what it was")
        return made.sample


def _read(records: Sequence[Record], number: int) -> Record:
    """A record, from a disk that may be slow to answer."""
    for pause in _PAUSES:
        try:
            return records[number]
        except _LASTING:
            raise
        except OSError:
            time.sleep(pause)
    return records[number]


@dataclasses.dataclass(frozen=True)
class Made:
    """A record's number, and what came of it: a sample, nothing because it is too long, or what is wrong with it."""

    number: int
    sample: Sample | None
    error: str | None = None


class Lane:
    """Every `count`-th record from the `index`-th on, in an order that a seed decides, packed without end.

    Attributes:
      counts: of its records so far.
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
        tell: Callable[[str], None],
    ):
        """Start at the beginning.

        Args:
          encoder, packer: of its own.
          data: for the order, and what to do with bad rows.
          index, count: which of the lanes it is.
          threads: that make samples ready.
          seed: of the order, which is that of all lanes.
          tell: called with what is wrong with a record that is skipped.
        """
        self._encoder, self._packer, self._data, self._tell = encoder, packer, data, tell
        self.counts = Counts()
        self._told: set[int] = set()
        numbers = grain.MapDataset.source(range(len(encoder.records))).seed(seed)
        numbers = (numbers.shuffle() if data.shuffle else numbers).repeat()
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        self._reader = iter(numbers[index::count].map(encoder).to_iter_dataset(options))

    def __next__(self) -> list[Sample]:
        """The samples of the next batch.

        Raises:
          DataError: a record is bad and the job says that this ends it, or a whole pass has brought no sample.
        """
        fruitless = 0
        while True:
            made = next(self._reader)
            if made.sample is None:
                self._leave_out(made)
                fruitless += 1
                if fruitless >= len(self._encoder.records):
                    raise DataError(
                        f"found no sample in {fruitless} rows, a whole pass; the last: {made.error or 'is too long'}"
                    )
                continue
            try:
                done = self._packer.push(made.sample, made.number)
            except DataError as error:
                self._leave_out(dataclasses.replace(made, error=str(error)))
                fruitless += 1
                if fruitless >= len(self._encoder.records):
                    raise
                continue
            fruitless = 0
            self.counts.samples += 1
            if done is not None:
                return done

    def get_state(self) -> dict[str, Any]:
        """Where it is, as JSON."""
        counts = dataclasses.asdict(self.counts)
        state = {"reader": self._reader.get_state(), "packer": self._packer.get_state(), "counts": counts}
        return json.loads(json.dumps(state))

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was.

        Raises:
          DataError: the data or the options are not what they were.
        """
        self._reader.set_state(state["reader"])
        self._packer.set_state(state["packer"], self._encoder.again)
        self.counts = Counts(**state["counts"])

    def _leave_out(self, made: Made) -> None:
        if made.error is None:
            self.counts.dropped += 1
            return
        if self._data.bad_rows == "error":
            raise DataError(made.error)
        self.counts.skipped += 1
        if made.number not in self._told:
            self._told.add(made.number)  # not again in every pass
            self._tell(made.error)
