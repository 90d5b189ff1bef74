"""What a job keeps to go on from: Orbax checkpoints of its state, the position in the data beside it."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from glm4v_jax.errors import CheckpointError
from train.config import CheckpointConfig
from train.state import TrainState

_STATE, _DATA = "state", "data"


class Restored(NamedTuple):
    """A state, and where the data were behind its last step."""

    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of a job; each is complete, or not there."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        """Look at what is there.

        Args:
          directory: of the checkpoints, made if need be.
          config: how many to keep.
        """
        policies = ocp.training.preservation_policies
        decisions = ocp.training.save_decision_policies
        self._directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            # It is asked to save when it is time.
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            preservation_policy=policies.LatestN(config.keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The step of the latest one."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Begin to write a state, which may be given away as soon as this returns; the one before is done first."""
        self.wait()
        content = {"params": state.params, "opt_state": state.opt_state, "counts": _counts(state)}
        self._response = self._checkpointer.save_checkpointables_async(
            int(state.step), {_STATE: content}, force=True, custom_metadata={_DATA: data}
        )

    _response: Any = None

    def wait(self) -> None:
        """Wait until what has been begun is on disk."""
        response, self._response = self._response, None
        if response is not None:
            response.result()

    def restore(self, like: TrainState) -> Restored:
        """The latest one, on the mesh that `like` lies on.

        Raises:
          CheckpointError: it does not fit the job, or is damaged.
        """
        step = self.latest
        content = {"params": like.params, "opt_state": like.opt_state, "counts": _counts(like)}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), content)
        try:
            found = self._checkpointer.load_checkpointables(step, {_STATE: abstract})[_STATE]
            metadata = self._checkpointer.checkpointables_metadata(step).custom_metadata
        except Exception as error:  # Orbax has many
            said = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{self._directory / str(step)}: cannot go on from this checkpoint ({said}); expected that of a job "
                "with the same model, frozen parts and optimizer"
            ) from error
        counts = found["counts"]
        state = TrainState(found["params"], found["opt_state"], *(counts[name] for name in _COUNTS))
        return Restored(state, metadata[_DATA])

    def close(self) -> None:
        """Wait, and let go."""
        self.wait()
        self._checkpointer.close()


_COUNTS = ("step", "skipped", "streak")


def _counts(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _COUNTS}
