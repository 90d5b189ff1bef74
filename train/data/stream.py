"""From records to the batches of training steps: in an order that the seed decides, and from any point on again.

A batch is divided into lanes, each with a reader and rows of its own, so that every process reads only what its devices
take. What the lanes are is a matter of the job's file alone: another mesh, or other processes, get the same batches.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.config import BatchConfig, DataConfig
from train.data.lane import Counts, Encoder, Lane
from train.data.packing import Packer, TrainBatch, pack
from train.data.placement import joined, lanes_here, num_lanes, stacked
from train.data.records import Record
from train.data.samples import EncodeOptions, Sample

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
                encoder, packer_of(batch, self._count), data, index=index, count=self._count, threads=threads,
                seed=seed, tell=tell,
            )
            for index in here
        }  # fmt: skip
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
        for index, lane in self._lanes.items():
            lane.set_state(state[str(index)])

    def close(self) -> None:
        """Make no more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self) -> Prepared:
        parts = [self._next_parts() for _ in range(self._batch.micro_batches)]
        state = {str(index): lane.get_state() for index, lane in self._lanes.items()}
        counts = counts_of(state)
        return Prepared(
            stacked([joined(lanes, self._count, self._merged_tokens) for lanes in parts]), state, counts,
            counts.rows * self._count / (self._records * len(self._lanes)),
        )  # fmt: skip

    def _next_parts(self) -> dict[int, TrainBatch]:
        """Of a micro-batch, by lane."""
        return {
            index: packed(next(lane), self._batch, self._config, self._count) for index, lane in self._lanes.items()
        }

    @property
    def _merged_tokens(self) -> int:
        rows, length = _shape(self._batch, self._count)["vision_shape"] or (0, 0)
        return rows * length // self._config.vision_config.spatial_merge_size**2


def counts_of(state: Mapping[str, Any]) -> Counts:
    """What lanes have read, by their state."""
    return sum((Counts(**lane["counts"]) for lane in state.values()), Counts())


def packer_of(batch: BatchConfig, lanes: int = 1) -> Packer:
    """The packer of one of so many lanes of a batch."""
    # Without packing the first batch that is open takes every sample until it is full.
    return Packer(**_shape(batch, lanes), open_batches=batch.open_batches if batch.pack else 1)


def packed(samples: Sequence[Sample], batch: BatchConfig, config: Glm4vConfig, lanes: int = 1) -> TrainBatch:
    """What `packer_of` has put together, as one lane's part of a batch.

    Raises:
      DataError: the samples do not fit.
    """
    return pack(samples, **_shape(batch, lanes), config=config, average=batch.average)


def _shape(batch: BatchConfig, lanes: int) -> dict[str, Any]:
    """Of one lane's part of a batch."""
    vision = batch.vision_shape
    return {
        "rows": batch.rows // lanes,
        "length": batch.length,
        "vision_shape": None if vision is None else (vision[0] // lanes, vision[1]),
        "per_row": batch.per_row,
    }


def encode_options(data: DataConfig, batch: BatchConfig) -> EncodeOptions:
    """How a job's records become samples."""
    return EncodeOptions(
        max_length=batch.length if data.max_length is None else min(data.max_length, batch.length),
        too_long=data.too_long, keep_thoughts=data.keep_thoughts, image_max_pixels=data.image_max_pixels,
        video_max_pixels=data.video_max_pixels, video_fps=data.video_fps,
    )  # fmt: skip
