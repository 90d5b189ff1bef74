"""What a job resumes from: Orbax checkpoints of its state, with the position in the data beside it."""

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
_COUNTS = ("step", "skipped", "streak")


class Restored(NamedTuple):
    """A state, and the position in the data after its last step."""

    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of a job; each is complete, or absent. Every process calls the same methods."""

    def __init__(self, directory: Path, config: CheckpointConfig, job: Mapping[str, Any]):
        """Open the directory.

        Args:
          directory: of the checkpoints; created if need be.
          config: which to keep.
          job: what must not have changed for a job to resume, by name, as JSON; saved in every checkpoint.

        Raises:
          CheckpointError: the checkpoints are another job's, or not on a disk that all processes share.
        """
        decisions, policies = ocp.training.save_decision_policies, ocp.training.preservation_policies
        keep = [policies.LatestN(config.keep)]
        if config.best is not None:
            keep.append(policies.BestN(get_metric_fn=self._goodness, n=1, keep_checkpoints_without_metrics=False))
        self._directory, self._config, self._job = directory, config, json.loads(json.dumps(job))
        self._response: Any = None
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            # The caller decides when to save.
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
        """The step of the best one, of equally good ones the first; None if none was evaluated."""
        self.wait()
        found = [info for info in self._checkpointer.checkpoints if self._config.best in (info.metrics or {})]
        return max(found, key=lambda info: self._goodness(info.metrics)).step if found else None

    def save(self, state: TrainState, data: dict[str, Any], evaluation: Evaluation | None = None) -> None:
        """Start to write a state, which may be donated as soon as this returns; waits for the one before."""
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
        """Wait until what is being written is on disk."""
        response, self._response = self._response, None
        if response is not None:
            response.result()

    def restore(self, like: TrainState) -> Restored:
        """Load the latest one.

        Args:
          like: its arrays, abstract, sharded as they are to be loaded.

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
        """Load the trained parameters of one of them, and no more; see `restore`."""
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return self._load(step, {"params": like})["params"]

    def close(self) -> None:
        """Wait for what is being written, and close."""
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
        saved = self._metadata(self.latest).get(_JOB, {})
        changed = [name for name in (*self._job, *(saved.keys() - self._job.keys())) if self._differs(name, saved)]
        if changed:
            faults = [
                f"{name}: found {json.dumps(self._job.get(name))}; expected {json.dumps(saved.get(name))}, as saved"
                for name in changed
            ]
            raise CheckpointError(
                f"{self._directory / str(self.latest)}: cannot resume from this checkpoint: {'; '.join(faults)}; "
                "restore the job file, or choose another output directory"
            )

    def _differs(self, name: str, saved: Mapping[str, Any]) -> bool:
        return saved.get(name) != self._job.get(name)

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
                raise  # has nothing to do with the checkpoint
            raise self._unusable(step, error) from error

    def _unusable(self, step: int | None, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:300]
        return CheckpointError(
            f"{self._directory / str(step)}: cannot resume from this checkpoint ({reason}); expected one of a job with "
            "the same model, frozen parts and optimizer"
        )

    def _goodness(self, metrics: dict[str, float]) -> tuple[float, float]:
        """Higher for a better one, and for the earlier of equals; models without the metric are the worst."""
        best = self._config.best
        value = metrics.get(best, math.nan) if best is not None else math.nan
        return -math.inf if math.isnan(value) else -value if best == "loss" else value, -metrics.get(_STEP, 0)


def abstract(tree: Any) -> Any:
    """Return the shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _counts(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _COUNTS}
