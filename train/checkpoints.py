"""What a job keeps to go on from: Orbax checkpoints of its state, the position in the data beside it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from glm4v_jax.devices.distributed import gathered
from glm4v_jax.errors import CheckpointError
from train.config import CheckpointConfig
from train.evaluate import Evaluation
from train.state import Leaves, TrainState

_STATE, _DATA, _JOB, _STEP = "state", "data", "job", "step"


class Restored(NamedTuple):
    """A state, and where the data were behind its last step."""

    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of a job; each is complete, or not there. Every process calls the same methods."""

    def __init__(self, directory: Path, config: CheckpointConfig, job: Mapping[str, Any]):
        """Look at what is there.

        Args:
          directory: of the checkpoints, made if need be.
          config: how many to keep.
          job: what must be as it was for a job to go on, by name, as JSON can say it; it is kept beside every state.

        Raises:
          CheckpointError: what is there is another job's, or not on a disk that all processes share.
        """
        decisions, policies = ocp.training.save_decision_policies, ocp.training.preservation_policies
        keep = [policies.LatestN(config.keep)]
        if config.best is not None:
            keep.append(policies.BestN(get_metric_fn=self._goodness, n=1, keep_checkpoints_without_metrics=False))
        self._directory, self._config, self._job = directory, config, json.loads(json.dumps(job))
        self._response: Any = None
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            # It is asked to save when it is time.
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )
        try:
            self._check()
        except CheckpointError:
            self._checkpointer.close()
            raise

    @property
    def latest(self) -> int | None:
        """The step of the latest one."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def best(self) -> int | None:
        """The step of the best one, of equally good ones the first; None where none has been looked at."""
        self.wait()
        found = [info for info in self._checkpointer.checkpoints if self._config.best in (info.metrics or {})]
        return max(found, key=self._goodness_of).step if found else None

    def save(self, state: TrainState, data: dict[str, Any], evaluation: Evaluation | None = None) -> None:
        """Begin to write a state, which may be given away as soon as this returns; the one before is done first."""
        self.wait()
        content = {"params": state.params, "opt_state": state.opt_state, "counts": _counts(state)}
        step = int(state.step)
        metrics = None
        if self._config.best is not None and evaluation is not None:
            metrics = evaluation.metrics | {_STEP: step}
        self._response = self._checkpointer.save_checkpointables_async(
            step, {_STATE: content}, force=True, metrics=metrics, custom_metadata={_DATA: data, _JOB: self._job}
        )

    def wait(self) -> None:
        """Wait until what has been begun is on disk."""
        response, self._response = self._response, None
        if response is not None:
            response.result()

    def restore(self, like: TrainState) -> Restored:
        """The latest one.

        Args:
          like: its arrays, abstract, on the mesh that they are to lie on.

        Raises:
          CheckpointError: it does not fit the job, or is damaged.
        """
        step = self.latest
        content = {"params": like.params, "opt_state": like.opt_state, "counts": _counts(like)}
        found = self._load(step, content)
        counts = found["counts"]
        state = TrainState(found["params"], found["opt_state"], *(counts[name] for name in _COUNTS))
        return Restored(state, self._metadata(step)[_DATA])

    def restore_params(self, like: Leaves, step: int) -> Leaves:
        """What is trained, and no more, of one of them; see `restore`."""
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return self._load(step, {"params": like})["params"]

    def close(self) -> None:
        """Wait, and let go."""
        self.wait()
        self._checkpointer.close()

    def _check(self) -> None:
        found = gathered(self.latest)
        if different := [index for index, step in enumerate(found) if step != found[0]]:
            raise CheckpointError(
                f"{self._directory}: found step {found[0]} in process 0 and step {found[different[0]]} in process "
                f"{different[0]}; expected one directory, on a disk that all processes share"
            )
        if self.latest is None:
            return
        was = self._metadata(self.latest).get(_JOB, {})
        for name in (*self._job, *was):
            if was.get(name) != self._job.get(name):
                raise CheckpointError(
                    f"{self._directory / str(self.latest)}: cannot go on from this checkpoint: its job has {name} = "
                    f"{json.dumps(was.get(name))}; found {json.dumps(self._job.get(name))}, expected the same, or "
                    "another directory `out`"
                )

    def _metadata(self, step: int | None) -> dict[str, Any]:
        try:
            return self._checkpointer.checkpointables_metadata(step).custom_metadata or {}
        except Exception as error:  # Orbax has many
            raise self._unusable(step, error) from error

    def _load(self, step: int | None, content: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpointables(step, {_STATE: content})[_STATE]
        except Exception as error:  # Orbax has many
            if "RESOURCE_EXHAUSTED" in str(error):
                raise  # says nothing of the checkpoint
            raise self._unusable(step, error) from error

    def _unusable(self, step: int | None, error: Exception) -> CheckpointError:
        said = " ".join(str(error).split())[:300]
        return CheckpointError(
            f"{self._directory / str(step)}: cannot go on from this checkpoint ({said}); expected that of a job with "
            "the same model, frozen parts and optimizer"
        )

    def _goodness(self, metrics: dict[str, float]) -> tuple[float, float]:
        """Higher for a better one, and for the earlier of equals; models without the number are the worst."""
        best = self._config.best
        value = metrics.get(best, math.nan) if best is not None else math.nan
        return -math.inf if math.isnan(value) else -value if best == "loss" else value, -metrics.get(_STEP, 0)

    def _goodness_of(self, info: Any) -> tuple[float, float]:
        return self._goodness(info.metrics)


_COUNTS = ("step", "skipped", "streak")


def abstract(tree: Any) -> Any:
    """A tree of arrays as their shapes, dtypes and places."""
    return jax.tree.map(_abstract, tree)


def _counts(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _COUNTS}


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
