"""From records to the batches of training steps: in an order that the seed decides, and from any point on again."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np

from glm4v_jax.config import Glm4vConfig
from glm4v_jax.errors import DataError, Glm4vError
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.config import BatchConfig, DataConfig
from train.packing import Packer, TrainBatch, VisionShape, pack
from train.records import Record
from train.samples import EncodeOptions, Sample, encode


@dataclasses.dataclass
class Counts:
    """What became of the records that were read.

    samples: were learned from. dropped: were too long. skipped: could not be read.
    """

    samples: int = 0
    dropped: int = 0
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class _Made:
    """A record's number, and what came of it: a sample, nothing because it is too long, or what is wrong with it."""

    number: int
    sample: Sample | None
    error: str | None = None


class Stream:
    """Batches without end: every pass over the records in another order, if that is asked for.

    Attributes:
      counts: of the records so far.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: Glm4vProcessor,
        config: Glm4vConfig,
        data: DataConfig,
        batch: BatchConfig,
        *,
        seed: int = 0,
        tell: Callable[[str], None] | None = None,
    ):
        """Start at the beginning.

        Args:
          records: by their number.
          processor, config: of the model.
          data, batch: see there.
          seed: of the order.
          tell: called with what is wrong with a record that is skipped.

        Raises:
          DataError: there are no records.
        """
        if not len(records):
            raise DataError(f"{', '.join(data.files)}: found no rows; expected some to learn from")
        self._records, self._processor, self._config, self._data = records, processor, config, data
        self._batch, self._tell = batch, tell
        self._options = EncodeOptions(
            max_length=min(data.max_length or batch.length, batch.length), too_long=data.too_long,
            keep_thoughts=data.keep_thoughts, image_max_pixels=data.image_max_pixels,
            video_max_pixels=data.video_max_pixels, video_fps=data.video_fps,
        )  # fmt: skip
        self._packer = Packer(
            rows=batch.rows, length=batch.length, vision_shape=self._vision_shape, per_row=None if batch.pack else 1,
            open_batches=4 if batch.pack else 1,
        )  # fmt: skip
        self.counts = Counts()
        self._told: set[int] = set()
        numbers = grain.MapDataset.source(range(len(records))).seed(seed)
        numbers = numbers.shuffle() if data.shuffle else numbers
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=4 * data.threads)
        self._reader = iter(numbers.repeat().map(self._make).to_iter_dataset(options))

    @property
    def _vision_shape(self) -> VisionShape | None:
        batch = self._batch
        return (batch.vision_rows, batch.vision_length) if batch.vision_rows else None

    def __next__(self) -> TrainBatch:
        """The next step's micro-batches: every array has a first dimension of them.

        Raises:
          DataError: a record is bad and the job says that this ends it, or a whole pass has brought no sample.
        """
        parts = [self._pack(self._next_samples()) for _ in range(self._batch.micro_batches)]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)

    def get_state(self) -> dict[str, Any]:
        """Where it is, as JSON."""
        counts = dataclasses.asdict(self.counts)
        state = {"reader": self._reader.get_state(), "packer": self._packer.get_state(), "counts": counts}
        return json.loads(json.dumps(state))

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where another one was.

        Raises:
          DataError: the data or the options are not what they were.
        """
        self._reader.set_state(state["reader"])
        self._packer.set_state(state["packer"], self._again)
        self.counts = Counts(**state["counts"])

    def _next_samples(self) -> list[Sample]:
        fruitless = 0
        while True:
            made = next(self._reader)
            if made.sample is None:
                self._leave_out(made)
                fruitless += 1
                if fruitless >= len(self._records):
                    raise DataError(f"found no sample in {fruitless} rows, a whole pass; the last: {made.error}")
                continue
            fruitless = 0
            try:
                done = self._packer.push(made.sample, made.number)
            except DataError as error:
                self._leave_out(dataclasses.replace(made, error=str(error)))
                continue
            self.counts.samples += 1
            if done is not None:
                return done

    def _leave_out(self, made: _Made) -> None:
        if made.error is None:
            self.counts.dropped += 1
            return
        if self._data.bad_rows == "error":
            raise DataError(made.error)
        self.counts.skipped += 1
        if self._tell is not None and made.number not in self._told:
            self._told.add(made.number)  # not again in every pass
            self._tell(made.error)

    def _make(self, number: int) -> _Made:
        """In a thread: nothing may be raised there that belongs to another record."""
        number = int(number)
        try:
            sample = encode(self._records[number], self._processor, self._config, self._options)
        except (Glm4vError, OSError) as error:
            return _Made(number, None, str(error))
        return _Made(number, sample)

    def _again(self, number: int) -> Sample:
        made = self._make(number)
        if made.sample is None:
            raise DataError(f"row {number}: found {made.error or 'a sample that is too long'}; expected what it was")
        return made.sample

    def _pack(self, samples: Sequence[Sample]) -> TrainBatch:
        batch = self._batch
        return pack(
            samples, rows=batch.rows, length=batch.length, vision_shape=self._vision_shape, config=self._config,
            average=batch.average, per_row=None if batch.pack else 1,
        )  # fmt: skip
