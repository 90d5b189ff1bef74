"""The output directory of a job that runs: held against a second run, and saved to, but never what is bad."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from glm4v_jax.checkpoints.atomic_directory import locked
from glm4v_jax.checkpoints.orbax_write import by_first
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.distributed import errors_of_all
from glm4v_jax.errors import CheckpointError, Glm4vError
from glm4v_jax.files import made_directory
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.job import abstract_state, check_output
from train.log import read_evaluations
from train.state import TrainState, is_finite

CHECKPOINTS, ANSWERS, PROFILE = "checkpoints", "answers", "profile"
REFERENCES, EPOCHS = "references.npz", "epochs.json"
"""What a job writes to its output directory, besides its result and its metrics."""


class TrainError(Glm4vError):
    """A job cannot continue: its state is not finite, or its gradients are not or are too large, step after step."""


class JobResult(NamedTuple):
    """How a job ended.

    step: the last one.
    is_done: whether that was the last of all; otherwise it was asked to stop.
    """

    step: int
    is_done: bool


@contextlib.contextmanager
def open_checkpoints(
    config: TrainConfig, identity: Mapping[str, Any], log: Callable[[str], None]
) -> Iterator[Checkpoints]:
    """Create and lock the output directory, and open its checkpoints; all processes call this.

    `identity` is what must not have changed for the job to resume, see `Checkpoints`. What is created for a job that is
    then refused is removed again. CheckpointError if another process holds the directory, its checkpoints are another
    job's, the path of the result has other files, or too little disk space is left.
    """
    out = Path(config.out)
    with contextlib.ExitStack() as stack:
        with _unwritable(config.out):
            by_first(lambda: stack.enter_context(made_directory(out)))  # a refused job leaves nothing
        with errors_of_all(), _unwritable(config.out):
            out.mkdir(parents=True, exist_ok=True)  # of the other processes, whose disk may be another
        by_first(lambda: stack.enter_context(locked(out / CHECKPOINTS)))
        # Not before the lock: else a second job that is refused might remove it from under the first.
        by_first(lambda: stack.enter_context(made_directory(out / CHECKPOINTS)))
        check_output(config)
        kept = Checkpoints(out / CHECKPOINTS, config.checkpoint, identity, log, read_evaluations(out))
        checkpoints = stack.enter_context(contextlib.closing(kept))
        yield checkpoints


@contextlib.contextmanager
def _unwritable(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"out: found {out}: {error.strerror}; expected a directory to write") from None


def check_room(config: TrainConfig, model: Glm4vConfig, checkpoints: Checkpoints) -> None:
    """Raise a CheckpointError if the disk lacks room for all checkpoints to come and the result; in the job's mesh."""
    done = (checkpoints.latest or 0) * config.steps // config.num_updates  # steps; where some were empty, more or less
    saves = sum(map(config.is_saved, range(done + 1, config.steps + 1)))
    checkpoints.check_room(abstract_state(config, model)[0], saves, check_output(config))


@dataclasses.dataclass(frozen=True)
class Saver:
    """Saves the states of a run unless they are bad, and says which checkpoint is good after steps that were skipped.

    Attributes:
      checkpoints, config: of the job.
      first: the checkpoint that the run began with; 0 if there was none.
    """

    checkpoints: Checkpoints
    config: TrainConfig
    first: int

    def save(self, step: int, state: TrainState, streak: int, data: dict[str, Any], number: int | None = None) -> bool:
        """Save, unless the last step was skipped: its state may be bad, and a new checkpoint removes an old one.

        Returns whether it is saved; a TrainError where the state is not finite. `streak`: how many skipped steps in a
        row end with `step`; `data`: to resume with, as JSON; `number`: of the checkpoint, see `Checkpoints.save`.
        """
        if not is_finite(state):
            raise TrainError(
                f"step {step}: found parameters or an optimizer's state that are not finite, and not saved; expected "
                f"finite ones; {self._way_back()}"
            )
        if streak:
            return False
        self.checkpoints.save(state, data, number)
        return True

    def check_streak(self, step: int, streak: int, grad_norm: float) -> None:
        """Check that not too many steps in a row were skipped.

        Raises:
          TrainError: `max_skipped` were.
        """
        if streak >= self.config.max_skipped:
            raise TrainError(
                f"step {step}: found gradients of norm {grad_norm}, the last of {self.config.max_skipped} skipped "
                f"steps in a row; expected norms up to max_grad_norm = {self.config.max_grad_norm}; {self._way_back()}"
            )

    def _way_back(self) -> str:
        """Say which checkpoint is good, and what to do, after steps that came to nothing."""
        self.checkpoints.wait()
        latest, folder = self.checkpoints.latest, Path(self.config.out) / CHECKPOINTS
        if latest is None:
            return "no checkpoint was saved: lower the learning rate, or look at the data of these steps"
        if latest > self.first:
            return (
                f"the newest good checkpoint is {folder / str(latest)}: the same command resumes from it; if it ends "
                "here again, lower the learning rate, or look at the data of these steps"
            )
        older = self.checkpoints.before(latest)
        instead = "start again" if older is None else f"resume from {folder / str(older)}"
        return f"this run began with {folder / str(latest)}, which may be bad: move it away to {instead}"


def ignore(line: str) -> None:
    """Log to nobody."""
    del line
