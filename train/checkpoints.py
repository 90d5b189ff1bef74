"""What a job keeps to go on from: Orbax checkpoints of its state, the position in the data beside it."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from glm4v_jax.errors import CheckpointError
from train.config import CheckpointConfig
from train.evaluate import Evaluation
from train.state import TrainState

_STATE, _DATA, _BEST = "state", "data", "best"


class Restored(NamedTuple):
    """A state, and where the data were behind its last step."""

    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of a job; each is complete, or not there. Every process calls the same methods."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        """Look at what is there.

        Args:
          directory: of the checkpoints, made if need be.
          config: how many to keep.
        """
        decisions, policies = ocp.training.save_decision_policies, ocp.training.preservation_policies
        keep = [policies.LatestN(config.keep)]
        if config.best is not None:
            keep.append(policies.BestN(get_metric_fn=_goodness, n=1, keep_checkpoints_without_metrics=False))
        self._directory, self._config = directory, config
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            # It is asked to save when it is time.
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The step of the latest one."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def best(self) -> int | None:
        """The step of the best one, of equally good ones the first; None where none has been looked at."""
        self.wait()
        found = [info for info in self._checkpointer.checkpoints if info.metrics]
        return max(found, key=_goodness_and_age).step if found else None

    def save(self, state: TrainState, data: dict[str, Any], evaluation: Evaluation | None = None) -> None:
        """Begin to write a state, which may be given away as soon as this returns; the one before is done first."""
        self.wait()
        content = {"params": state.params, "opt_state": state.opt_state, "counts": _counts(state)}
        metrics = None
        if self._config.best is not None and evaluation is not None:
            metrics = {_BEST: evaluation.best_by(self._config.best)}
        self._response = self._checkpointer.save_checkpointables_async(
            int(state.step), {_STATE: content}, force=True, metrics=metrics, custom_metadata={_DATA: data}
        )

    _response: Any = None

    def wait(self) -> None:
        """Wait until what has been begun is on disk."""
        response, self._response = self._response, None
        if response is not None:
            response.result()

    def restore(self, like: TrainState, step: int | None = None) -> Restored:
        """One of them, the latest by default, on the mesh that `like` lies on.

        Raises:
          CheckpointError: it does not fit the job, or is damaged.
        """
        step = self.latest if step is None else step
        content = {"params": like.params, "opt_state": like.opt_state, "counts": _counts(like)}
        abstract = jax.tree.map(_abstract, content)
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


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _goodness(metrics: dict[str, float]) -> float:
    return metrics[_BEST]


def _goodness_and_age(info: Any) -> tuple[float, int]:
    return _goodness(info.metrics), -info.step
