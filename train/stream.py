"""From records to the batches of training steps: in an order that the seed decides, and from any point on again.

A batch is divided into lanes, each with a reader and rows of its own, so that every process reads only what its devices
take. What the lanes are is a matter of the job's file alone: another mesh, or other processes, get the same batches.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from glm4v_jax.config import Glm4vConfig
from glm4v_jax.errors import DataError
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.config import BatchConfig, DataConfig
from train.lane import Counts, Encoder, Lane
from train.packing import Packer, TrainBatch, VisionShape, pack
from train.placement import joined, lanes_here, num_lanes, stacked
from train.records import Record
from train.samples import EncodeOptions

AHEAD = 2
"""Steps whose batches are made while another is computed."""


class Prepared(NamedTuple):
    """A step's micro-batches on the host.

    state: of this process's lanes behind them: lane -> state.
    counts: what these lanes have read so far.
    epoch: how many passes over their part of the records that is.
    """

    batch: TrainBatch
    state: dict[str, Any]
    counts: Counts
    epoch: float


class Stream:
    """Batches without end: every pass over the records in another order, if that is asked for."""

    def __init__(
        self,
        records: Sequence[Record],
        processor: Glm4vProcessor,
        config: Glm4vConfig,
        data: DataConfig,
        batch: BatchConfig,
        mesh: Mesh,
        *,
        seed: int = 0,
        tell: Callable[[str], None],
    ):
        """Start at the beginning.

        Args:
          records: by their number.
          processor, config: of the model.
          data, batch: see there.
          mesh: whose devices take the batches.
          seed: of the order.
          tell: called with what is wrong with a record that is skipped.

        Raises:
          DataError: there are no records.
        """
        if not len(records):
            raise DataError(f"{', '.join(data.files)}: found no rows; expected some to learn from")
        self._config, self._batch, self._count, self._records = config, batch, num_lanes(batch), len(records)
        here = lanes_here(batch, mesh)
        encoder = Encoder(records, processor, config, encode_options(data, batch))
        threads = max(1, data.threads // len(here))
        self._lanes = {
            index: Lane(
                encoder, self._packer(), data, index=index, count=self._count, threads=threads, seed=seed, tell=tell
            )
            for index in here
        }
        self._ahead: collections.deque[concurrent.futures.Future[Prepared]] = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "batches")

    def __next__(self) -> Prepared:
        """The next step's micro-batches; those of the steps after it are begun.

        Raises:
          DataError: a record is bad and the job says that this ends it, or a whole pass has brought no sample.
        """
        while len(self._ahead) <= AHEAD:
            self._ahead.append(self._thread.submit(self._make))
        return self._ahead.popleft().result()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where others were; before the first batch is taken.

        Args:
          state: those of all lanes: `Prepared.state` of every process.

        Raises:
          DataError: the data or the options are not what they were.
        """
        if set(state) != {str(index) for index in range(self._count)}:
            raise DataError(f"state of the data: found {len(state)} lanes; expected {self._count}, as the job has now")
        for index, lane in self._lanes.items():
            lane.set_state(state[str(index)])

    def close(self) -> None:
        """Make no more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def _lane_vision_shape(self) -> VisionShape | None:
        shape = vision_shape(self._batch)
        return None if shape is None else (shape[0] // self._count, shape[1])

    def _packer(self) -> Packer:
        batch = self._batch
        return Packer(
            rows=batch.rows // self._count, length=batch.length, vision_shape=self._lane_vision_shape,
            per_row=None if batch.pack else 1, open_batches=batch.open_batches if batch.pack else 1,
        )  # fmt: skip

    def _make(self) -> Prepared:
        parts = [self._micro_batch() for _ in range(self._batch.micro_batches)]
        state = {str(index): lane.get_state() for index, lane in self._lanes.items()}
        counts = counts_of(state)
        return Prepared(
            stacked([joined(lanes, self._count, self._merged_tokens) for lanes in parts]), state, counts,
            counts.rows * self._count / (self._records * len(self._lanes)),
        )  # fmt: skip

    def _micro_batch(self) -> dict[int, TrainBatch]:
        batch = self._batch
        return {
            index: pack(
                next(lane), rows=batch.rows // self._count, length=batch.length, vision_shape=self._lane_vision_shape,
                config=self._config, average=batch.average, per_row=None if batch.pack else 1,
            )
            for index, lane in self._lanes.items()
        }  # fmt: skip

    @property
    def _merged_tokens(self) -> int:
        rows, length = self._lane_vision_shape or (0, 0)
        return rows * length // self._config.vision_config.spatial_merge_size**2


def counts_of(state: Mapping[str, Any]) -> Counts:
    """What lanes have read, by their state."""
    return sum((Counts(**lane["counts"]) for lane in state.values()), Counts())


def vision_shape(batch: BatchConfig) -> VisionShape | None:
    """(R, L) of a batch's vision rows; None for text alone."""
    return (batch.vision_rows, batch.vision_length) if batch.vision_rows else None


def encode_options(data: DataConfig, batch: BatchConfig) -> EncodeOptions:
    """How a job's records become samples."""
    return EncodeOptions(
        max_length=batch.length if data.max_length is None else min(data.max_length, batch.length),
        too_long=data.too_long, keep_thoughts=data.keep_thoughts, image_max_pixels=data.image_max_pixels,
        video_max_pixels=data.video_max_pixels, video_fps=data.video_fps,
    )  # fmt: skip
