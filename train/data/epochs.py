"""Count the steps that epochs take: samples are packed by their sizes alone."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import process_count, process_index
from jax.sharding import Mesh

from glm4v_jax.console.progress import seldom
from glm4v_jax.devices.distributed import errors_of_all, gathered, is_first
from glm4v_jax.errors import ConfigError, DataError, counted
from glm4v_jax.files import replacing, to_json
from train.config import BatchConfig, DataConfig
from train.data.encoder import TOO_LONG, Encoder, outcomes
from train.data.placement import lanes_here, num_lanes, packer_of
from train.data.samples import Sample
from train.data.stream import RowCounts, in_order


@dataclasses.dataclass(frozen=True, eq=False)
class Size:
    """Size of a sample, which is all that a packer looks at; see `Sample` for the fields."""

    length: int
    frames: np.ndarray
    source: str = ""

    def __len__(self) -> int:
        return self.length


def count_steps(
    encoder: Encoder,
    data: DataConfig,
    batch: BatchConfig,
    mesh: Mesh,
    epochs: int,
    *,
    seed: int = 0,
    log: Callable[[str], None],
    step: int = 0,
    lanes: Mapping[str, Any] | None = None,
) -> int:
    """Return after how many steps a `Stream` with the same arguments has had each record `epochs` times.

    All processes call this. Every record is encoded once, by one of the processes.

    `step` and `lanes` are those of the checkpoint that the job resumes from. The steps are counted from there on: the
    last batches of a job that was complete with fewer epochs were partly filled.

    Raises:
      ConfigError: the checkpoint has begun more epochs.
      DataError: no record becomes a sample; or one is bad, and the job says that this ends it; or the samples do not
        fit as they did.
    """
    sizes = _sizes(encoder, data, log)
    count = num_lanes(batch)

    def known(number: int) -> Size:
        if number in sizes:
            return sizes[number]
        raise DataError(f"row {number}: found it unreadable, or too long; expected the sample it was")

    def batches(lane: int) -> int:
        packer, number_of_full, done = packer_of(batch, count), 0, 0
        numbers = in_order([(range(len(encoder.records)), 1.0)], data.shuffle, seed, lane, count, epochs)
        if lanes is not None:
            state = lanes[str(lane)]
            packer.set_state(state["packer"], known)
            done = RowCounts.of({str(lane): state}).rows
            if done > len(numbers):
                begun = (lane + (done - 1) * count) // len(encoder.records) + 1
                raise ConfigError(f"epochs: found {epochs}; expected at least {begun}: the checkpoint has begun these")
        for number in numbers[done:]:
            size = sizes.get(int(number))
            number_of_full += size is not None and packer.push(size, int(number)) is not None
        return number_of_full + sum(1 for _ in packer.finish())

    with errors_of_all():
        most = max(batches(lane) for lane in lanes_here(batch, mesh))
    return step + math.ceil(max(gathered(most)) / batch.micro_batches)


def _sizes(encoder: Encoder, data: DataConfig, log: Callable[[str], None]) -> Mapping[int, Size]:
    """Record number -> size of its sample, of those that become one."""
    total, note = len(encoder.records), seldom(log)
    own: list[tuple[int, int, Any]] = []
    reason = TOO_LONG
    with errors_of_all():
        for done, (number, found) in enumerate(
            outcomes(encoder, data.threads, process_index(), process_count()), process_index() + 1
        ):
            if isinstance(found, Sample):
                own.append((number, len(found), found.frames.tolist()))
            elif found is not None:
                reason = str(found)
                if data.bad_rows == "error":
                    raise DataError(reason)
            note(f"counting the steps of an epoch: {done * process_count():,} of {counted(total, 'row')}")
    everyone = gathered([own, reason])
    sizes = {
        number: Size(length, np.array(frames, np.int64).reshape(-1, 2))
        for of_process, _ in everyone
        for number, length, frames in of_process
    }
    if not sizes:
        raise DataError(f"found no sample in {counted(total, 'row')}; reason for the last: {reason}")
    return sizes


def read_steps(path: Path, digest: str) -> int | None:
    """Return the steps that `write_steps` has kept; None if there are none, or those of another job.

    All processes call this; the first one reads.
    """
    found: int | None = gathered(_read(path, digest) if is_first() else None)[0]
    return found


def write_steps(path: Path, digest: str, steps: int) -> None:
    """Keep the number of steps of what a digest says, so that a job that resumes need not count again."""
    with replacing(path) as aside:
        aside.write_text(to_json({"digest": digest, "steps": steps}) + "\n", encoding="utf-8")


def _read(path: Path, digest: str) -> int | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return int(found["steps"]) if found["digest"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        return None
