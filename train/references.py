"""Log probabilities of preference data under the model before the training: computed once, and kept in a file."""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from glm4v_jax.checkpoints.orbax_write import by_first
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.console.progress import seldom
from glm4v_jax.devices.distributed import gathered, is_first, shared, to_host
from glm4v_jax.errors import DataError, counted
from glm4v_jax.files import replacing
from train.config import BatchConfig
from train.data.encoder import TOO_LONG, Encoder, outcomes
from train.data.packing import TrainBatch, place
from train.data.placement import packed, packer_of, put, stacked
from train.data.samples import Sample
from train.preference import pairs_of
from train.state import Weights

Numbered = Iterable[tuple[int, Sample]]


def encoded(encoder: Encoder, threads: int) -> Iterator[tuple[int, Sample]]:
    """Yield the number and the sample of every record that becomes one, encoded in threads.

    Raises:
      DataError: none does.
    """
    is_any, reason = False, TOO_LONG
    for number, found in outcomes(encoder, threads):
        if isinstance(found, Sample):
            is_any = True
            yield number, found
        elif found is not None:
            reason = str(found)
    if not is_any:
        raise DataError(f"found no pair in {counted(len(encoder.records), 'row')}; reason for the last: {reason}")


def compute(
    weights: Weights, samples: Numbered, batch: BatchConfig, config: Glm4vConfig, mesh: Mesh
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Yield the number of each pair with the log probabilities of its two answers; all processes call this.

    `weights` are those before the training, `samples` number -> pair, and `batch` is the shape that they are packed in.
    """
    packer, numbers = packer_of(batch), dict[int, int]()

    def finished(done: list[Sample]) -> Iterator[tuple[int, tuple[float, float]]]:
        logprobs = to_host(_logprobs(weights, put(stacked([packed(done, batch, config)]), mesh)))
        places = place([len(sample) for sample in done], batch.rows, batch.length, batch.per_row)
        assert places is not None
        for sample, (row, _, segment) in zip(done, places, strict=True):
            chosen, rejected = logprobs[row, segment - 1].tolist()
            yield numbers.pop(id(sample)), (chosen, rejected)

    for number, sample in samples:
        numbers[id(sample)] = number
        if (done := packer.push(sample, number)) is not None:
            yield from finished(done)
    for done in packer.finish():
        yield from finished(done)


@jax.jit
def _logprobs(weights: Weights, batches: TrainBatch) -> jax.Array:
    batch, model = jax.tree.map(lambda x: x[0], batches), weights.model()
    return pairs_of(model, model(batch.batch), batch).logprobs


def table_of(
    path: Path,
    digest: str,
    count: int,
    computed: Callable[[], Iterable[tuple[int, tuple[float, float]]]],
    log: Callable[[str], None],
) -> np.ndarray:
    """Return the log probabilities of all pairs, float32 [count, 2], from the file if it has them.

    All processes call this. Another `digest` in the file, of what decides them, makes it useless; `computed` yields
    number and log probabilities of each pair, and those of other records stay NaN. OSError if the disk refuses.
    """
    found = _read(path, digest, count) if is_first() else None
    if gathered(found is not None)[0]:
        return shared(np.zeros((count, 2), np.float32) if found is None else found)
    table, note = np.full((count, 2), np.nan, np.float32), seldom(log)
    for done, (number, logprobs) in enumerate(computed(), 1):
        table[number] = logprobs
        note(f"log probabilities before the training: {done:,} of {count:,} pairs")
    by_first(lambda: _write(path, digest, table))
    return table


def _read(path: Path, digest: str, count: int) -> np.ndarray | None:
    try:
        with np.load(path) as file:
            table = file["logprobs"]
            return table if str(file["digest"]) == digest and table.shape == (count, 2) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or a damaged one
        return None


def _write(path: Path, digest: str, table: np.ndarray) -> None:
    with replacing(path) as aside, aside.open("wb") as file:
        np.savez(file, logprobs=table, digest=np.array(digest))
