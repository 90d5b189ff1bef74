"""From records to samples, as a job encodes them: in threads, with errors that are returned and name the record."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError, Glm4vError, one_line
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.config import BatchConfig, DataConfig
from train.data.placement import num_lanes, packer_of
from train.data.records import Record
from train.data.samples import EncodeOptions, Sample, encode

_PAUSES = (0.5, 2.0)
"""Seconds before a record is read again that a disk, or the network, has refused."""
_PERMANENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)

TOO_LONG = "too long: found more tokens than batch.length, or data.max_length where that is less"
"""Why a record is dropped."""

Outcome = Sample | DataError | None
"""What became of a record: a sample; None where it is too long and is dropped; or an error that names it."""


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
        """Encode a record once more that had become a sample; DataError if it no longer does."""
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
    """Return the encoder of a job's records, whose batches are divided into `lanes`; by default as the job says."""
    encoding = functools.partial(encode, processor=processor, config=config, options=encode_options(data, batch))
    return Encoder(records, encoding, packer_of(batch, lanes or num_lanes(batch)).check)


def outcomes(encoder: Encoder, threads: int, index: int = 0, count: int = 1) -> Iterator[tuple[int, Outcome]]:
    """Yield what becomes of every `count`-th record from the `index`-th on, in their order, encoded in threads."""
    numbers = grain.MapDataset.source(range(index, len(encoder.records), count))
    yield from numbers.map(encoder).to_iter_dataset(reading(threads))


def reading(threads: int) -> grain.ReadOptions:
    """Return how datasets of grain are read that are mapped by an encoder."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)


def encode_options(data: DataConfig, batch: BatchConfig) -> EncodeOptions:
    """Return a job's options for its records: samples are no longer than a row."""
    return dataclasses.replace(data, max_length=min(data.max_length or batch.length, batch.length))
