"""What a job resumes from: Orbax checkpoints of its state, with the position in the data beside it."""

import contextlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from glm4v_jax.checkpoints.atomic_directory import FULL, free_bytes, full_disk
from glm4v_jax.checkpoints.orbax_write import PART_BYTES, by_first, os_errors, without_orbax_log
from glm4v_jax.devices.distributed import gathered, is_first, several
from glm4v_jax.errors import CheckpointError, counted
from glm4v_jax.files import size_text
from train.config import CheckpointConfig
from train.damage import DamagedError, check_sizes, damaged, note_sizes, problem
from train.evaluate import Evaluation
from train.state import Leaves, TrainState, bit_sum, is_finite

DATA_DIGEST, ENCODING_DIGEST = "content of the training data", "tokenizer, chat template and processors of the model"
SAMPLING_DIGEST = "generation_config.json of the model"
"""Names of digests in what must not have changed; checkpoints of earlier versions lack them."""
_DIGESTS = DATA_DIGEST, ENCODING_DIGEST, SAMPLING_DIGEST

_STATE, _DATA, _JOB, _EVALUATIONS, _SUMS = "state", "data", "job", "evaluations", "checksums"
_COUNTS = ("step", "skipped", "streak")
_NOTED_SECONDS = 60
_DAMAGED = ".damaged"


class Restored(NamedTuple):
    """A state, and the position in the data after its last step."""

    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of a job; each is complete, or absent. Every process calls the same methods.

    One whose files were damaged later, by a crash of the machine or a full disk of a network, is passed over: the job
    resumes from the one before, and the damaged one is renamed. Numbers that are not finite are damage, too, and
    others than were saved.

    Attributes:
      evaluations: step -> `Evaluation.metrics` of the model after it.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        job: Mapping[str, Any],
        log: Callable[[str], None],
        evaluations: Mapping[int, Mapping[str, float]] | None = None,
    ):
        """Open the directory.

        Args:
          directory: of the checkpoints; created if need be.
          config: which to keep.
          job: what must not have changed for a job to resume, by name, as JSON; saved in every checkpoint.
          log: called with log lines for a person.
          evaluations: step -> `Evaluation.metrics` of the model after it, for all evaluations so far; those before a
            checkpoint are in it, too: a file of them may be lost in a crash, and with it which one is the best.

        Raises:
          CheckpointError: the checkpoints are another job's, all of them are damaged, or they are not on a disk that
            all processes share.
        """
        self._directory, self._config, self._job = directory, config, json.loads(json.dumps(job))
        self._log = log
        self.evaluations = dict(evaluations or {})
        self._damaged: dict[int, str] = {}
        self._response: Any = None
        self._written: int | None = None
        self._noted = threading.Event()
        self._before: int | None = None
        self._has_failed = False
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_orbax_log())
            self._checkpointer = self._open()
            stack.callback(self._close_orbax)
            self._check()
            self._stack = stack.pop_all()
        # Those of steps to come, as of checkpoints that somebody has removed, would have better ones removed.
        self._forget(after=self.latest or 0)

    @property
    def latest(self) -> int | None:
        """The step of the latest one that is not known to be damaged."""
        return next((step for step in reversed(self._steps()) if step not in self._damaged), None)

    @property
    def data(self) -> dict[str, Any] | None:
        """The position in the data of the latest one, before that is restored; None if there is none."""
        return None if self.latest is None else self._metadata(self.latest)[_DATA]

    @property
    def best(self) -> int | None:
        """The step of the best one, of equally good ones the first; None if none was evaluated."""
        return self._best(self._steps())

    @property
    def stale(self) -> int:
        """How many evaluations in a row, up to the latest, have found no better model than one before them."""
        best = self._best(list(self.evaluations))
        return sum(best is None or step > best for step in self.evaluations)

    def before(self, step: int) -> int | None:
        """Return the step of the latest one before a step."""
        return next((other for other in reversed(self._steps()) if other < step and other not in self._damaged), None)

    def tie(self) -> str | None:
        """Return a log line where scores do not tell which is the best."""
        scores = [found["score"] for found in self.evaluations.values() if "score" in found]
        if self._config.best != "score" or len(scores) < 2 or len(set(scores)) > 1:
            return None
        return f"the score was {scores[0]:.1%} after all {len(scores)} evaluations: the smallest loss decides"

    def check_room(self, state: TrainState, count: int, more: int = 0) -> None:
        """Raise a CheckpointError if the disk lacks room for `count` checkpoints and `more` bytes of other files."""
        # One more than are kept: the oldest is removed when the new one is complete.
        most = self._config.keep + (self._config.best is not None) + 1
        count = min(count, max(1, most - len(self._steps()))) if count else 0
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        needed = count * size + more

        def check() -> None:
            if (free := free_bytes(self._directory)) < needed:
                parts = [f"{counted(count, 'checkpoint')} of {size_text(size)}"] if count else []
                parts += [f"{size_text(more)} for the result"] if more else []
                raise CheckpointError(
                    f"{self._directory}: found {size_text(free)} free on the disk; expected {size_text(needed)}: "
                    f"{' and '.join(parts)}; free some, or lower checkpoint.keep"
                )

        by_first(check)

    def save(self, state: TrainState, data: dict[str, Any], number: int | None = None) -> None:
        """Start to write a state, which may be donated as soon as this returns; waits for the one before.

        `data` is the position in the data after the state's last step, as JSON; `number` is larger than those before,
        by default the state's step. OSError if the disk refuses, CheckpointError if it is full; also raised by the
        methods that wait.
        """
        self.wait()
        content = {"params": state.params, "opt_state": state.opt_state, "counts": _counts(state)}
        step = int(state.step) if number is None else number
        self._before = self.latest
        evaluations = {str(number): found for number, found in self.evaluations.items()}
        # The format has none of its own for large arrays.
        sums = {name: int(bit_sum(part)) for name, part in content.items()}
        metadata = {_DATA: data, _JOB: self._job, _EVALUATIONS: evaluations, _SUMS: sums}
        with self._writing(step):
            self._response = self._checkpointer.save_checkpointables_async(
                step, {_STATE: content}, force=True, custom_metadata=metadata
            )
            self._written = step
            self._noted.clear()
            self._response.on_complete(lambda done: self._note_sizes(step))

    def evaluated(self, step: int, found: Evaluation) -> None:
        """Note how good a checkpoint is, and remove those that are not kept for it."""
        self.evaluations[step] = found.metrics
        if self._config.best is None:
            return
        self.wait()
        steps = self._steps()
        for old in set(steps) - set(self._kept(steps)):
            self._checkpointer.delete(old)

    def wait(self) -> None:
        """Wait until what is being written is on disk."""
        response, self._response = self._response, None
        if response is not None:
            assert self._written is not None
            with self._writing(self._written):
                response.result()
            self._noted.wait(_NOTED_SECONDS)

    def restore(self, like: TrainState) -> Restored:
        """Load the latest one; if it is damaged, the one before, and so on.

        `like` has its arrays, abstract, sharded as they are to be loaded. CheckpointError if it does not fit the job,
        or all are damaged; in several processes, one is.
        """
        content = {"params": like.params, "opt_state": like.opt_state, "counts": _counts(like)}
        while (step := self.latest) is not None:
            try:
                found = self._load(step, content)
            except DamagedError as error:
                self._damaged[step] = str(error)
                if several():  # the others wait for this one in Orbax
                    self._end_damaged()
                continue
            if (fault := self._fault(step, found)) is None:
                break
            del found  # a device may not have room for two of them
            self._damaged[step] = str(fault)
        else:
            raise self._all_damaged()
        self._set_aside(step)
        counts = found["counts"]
        state = TrainState(found["params"], found["opt_state"], *(counts[name] for name in _COUNTS))
        return Restored(state, self._metadata(step)[_DATA])

    def restore_params(self, like: Leaves, step: int) -> Leaves:
        """Load the trained parameters of one of them, and no more; see `restore`."""
        self.wait()
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            check_sizes(self._path(step))
            with context:
                found = self._load(step, {"params": like})
            if (fault := self._fault(step, found)) is not None:
                raise fault
            return found["params"]
        except DamagedError as error:
            raise CheckpointError(
                f"{error}; remove this directory, and the same command exports the best of the others"
            ) from error

    def close(self) -> None:
        """Wait for what is being written, and close."""
        with self._stack:
            self.wait()

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _open(self) -> Any:
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = PART_BYTES
        return ocp.training.Checkpointer(
            self._directory.absolute(),
            # The caller decides when to save.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_Preservation(self._kept),
            cleanup_tmp_directories=True,
            context=context,
        )

    def _close_orbax(self) -> None:
        try:
            self._checkpointer.close()
        except Exception:
            if not self._has_failed:  # else it raises again what `wait` has
                raise

    def _steps(self) -> list[int]:
        return [info.step for info in self._checkpointer.checkpoints]

    def _best(self, steps: Sequence[int]) -> int | None:
        found = [step for step in steps if self._config.best in self.evaluations.get(step, {})]
        return max(found, key=self._goodness) if found else None

    def _goodness(self, step: int) -> tuple[float, float, int]:
        """Higher for a better one; of equal scores for the smaller loss, and then for the earlier."""
        found = self.evaluations[step]
        loss = found.get("loss", math.inf)
        return found["score"] if self._config.best == "score" else 0.0, -loss, -step

    def _kept(self, steps: Sequence[int]) -> Collection[int]:
        """The steps, out of these in their order, that the job is to keep."""
        best = self._best(steps)
        return {*steps[-self._config.keep :], *([] if best is None else [best])}

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Word the errors of writing a checkpoint."""
        try:
            with os_errors(self._path(step)):
                yield
        except Exception as error:
            self._has_failed = True
            if not isinstance(error, OSError) or error.errno not in FULL:
                raise
            after = "none is complete yet" if self._before is None else f"the one of step {self._before} is complete"
            safe = f"{after}; the same command resumes the job"
            raise CheckpointError(full_disk(self._path(step), safe)) from error

    def _note_sizes(self, step: int) -> None:
        try:
            if is_first():
                note_sizes(self._path(step))
        except OSError:
            pass  # as where a process is killed first: loading finds damage too
        finally:
            self._noted.set()

    def _check(self) -> None:
        """Check that the latest one is this job's, of which the metadata is read."""
        saved: dict[str, Any] = {}
        while self.latest is not None:
            try:
                check_sizes(self._path(self.latest))
                metadata = self._metadata(self.latest)
                saved = metadata[_JOB]
                evaluations = {int(step): found for step, found in metadata[_EVALUATIONS].items()}
                self.evaluations = evaluations | self.evaluations
                break
            except DamagedError as error:
                self._damaged[self.latest] = str(error)
        found = gathered(self.latest)
        if different := [index for index, step in enumerate(found) if step != found[0]]:
            raise CheckpointError(
                f"{self._directory}: found step {found[0]} in process 0 and step {found[different[0]]} in process "
                f"{different[0]}; expected one directory, on a disk that all processes share"
            )
        if self.latest is None:
            if self._damaged:
                raise self._all_damaged()
            return
        names = dict.fromkeys((*self._job, *saved))
        changed = [name for name in names if saved.get(name) != self._job.get(name)]
        unknown = [name for name in _DIGESTS if name in changed and name not in saved]
        for name in unknown:
            self._log(
                f"{self._path(self.latest)}: written by an earlier version, without a digest of the {name}: whether it "
                "is the same is not checked"
            )
        changed = [name for name in changed if name not in unknown]
        if changed:
            faults = [
                f"{name}: found {json.dumps(self._job.get(name))}; expected {json.dumps(saved.get(name))}, as saved"
                for name in changed
            ]
            raise CheckpointError(
                f"{self._path(self.latest)}: cannot resume from this checkpoint: {'; '.join(faults)}; "
                "restore the job file, or choose another output directory"
            )

    def _metadata(self, step: int) -> dict[str, Any]:
        try:
            found = self._checkpointer.checkpointables_metadata(step).custom_metadata or {}
            later = {name: found.get(name) or {} for name in (_EVALUATIONS, _SUMS)}  # earlier versions have none
            return {name: found[name] for name in (_DATA, _JOB)} | later
        except Exception as error:  # Orbax has many
            raise problem(self._path(step), error) from error

    def _load(self, step: int, content: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpointables(step, {_STATE: content})[_STATE]
        except Exception as error:  # Orbax has many
            found = problem(self._path(step), error)
            if isinstance(found, DamagedError) and (misfit := self._misfit(step, content)) is not None:
                found = CheckpointError(
                    f"{self._path(step)}: cannot resume from this checkpoint ({misfit}); expected one of a job with "
                    "the same model, frozen parts and optimizer"
                )
            raise found from error

    def _misfit(self, step: int, content: dict[str, Any]) -> str | None:
        """Say which array of the job the checkpoint lacks, or has in another shape; None if it says that it has all."""
        try:
            saved = _shapes(self._checkpointer.checkpointables_metadata(step).metadata[_STATE])
        except Exception:  # Orbax has many
            return None
        for name, shape in _shapes(content).items() if saved else ():
            if saved.get(name) != shape:
                return f"{name}: found {list(saved[name]) if name in saved else 'nothing'}; expected {list(shape)}"
        return None

    def _fault(self, step: int, found: dict[str, Any]) -> DamagedError | None:
        """Return what is wrong with the numbers that were loaded; all processes get the same answer."""
        sums = self._metadata(step)[_SUMS]
        changed = [name for name, part in found.items() if name in sums and int(bit_sum(part)) != sums[name]]
        if changed:
            return damaged(self._path(step), f"other numbers than were saved: {', '.join(changed)}")
        return None if is_finite(found) else damaged(self._path(step), "numbers that are not finite")

    def _all_damaged(self) -> CheckpointError:
        faults = [self._damaged[step] for step in sorted(self._damaged, reverse=True)]
        return CheckpointError(
            f"{'; '.join(faults)}; no other is left: restore one of them, or choose another output directory to "
            "start again",
            faults,
        )

    def _end_damaged(self) -> None:
        """Let the next start of this job in several processes pass over the damaged ones."""
        if (latest := self.latest) is None:
            raise self._all_damaged()
        *_, said = self._damaged.values()
        self._set_aside(latest, alone=True)
        raise CheckpointError(f"{said}: renamed; the same command resumes from step {latest}")

    def _set_aside(self, latest: int, *, alone: bool = False) -> None:
        """Rename the damaged ones, because their steps will be saved again; `alone` where this process finds them."""
        for step, said in sorted(self._damaged.items(), reverse=True):
            aside = self._directory / f"{step}{_DAMAGED}"

            def rename(step: int = step, aside: Path = aside) -> None:
                shutil.rmtree(aside, ignore_errors=True)
                (self._path(step)).rename(aside)

            if alone:
                with contextlib.suppress(OSError):  # another process may have done it
                    rename()
            else:
                by_first(rename)
            self._log(f"{said}: renamed to {aside.name}; the latest complete one is that of step {latest}")
        if self._damaged and not alone:
            self._checkpointer.close()
            self._checkpointer = self._open()
        self._damaged = {}
        self._forget(after=latest)

    def _forget(self, after: int) -> None:
        """Forget the evaluations after a step: the job will have others."""
        self.evaluations = {step: found for step, found in self.evaluations.items() if step <= after}


class _Preservation:
    """What Orbax asks which checkpoints to keep after a new one."""

    def __init__(self, kept: Callable[[Sequence[int]], Collection[int]]):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Answer for each checkpoint, from the earliest to the latest."""
        del context
        steps = [info.step for info in checkpoints]
        kept = self._kept(steps)
        return [step in kept for step in steps]


def abstract(tree: Any) -> Any:
    """Return the shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _counts(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _COUNTS}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape, whatever kinds of nodes the tree has: Orbax keeps named tuples as dictionaries."""
    return {
        ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
