"""A training job from its file to its result: it can be stopped at any point, and goes on from where it was."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.distributed import gathered, several
from glm4v_jax.devices.hardware import peak_flops
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.errors import Glm4vError
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.checkpoints import Checkpoints, abstract
from train.config import TrainConfig
from train.data.placement import put
from train.data.records import Record
from train.data.stream import Prepared, Stream, counts_of
from train.evaluate import Evaluation, Evaluator
from train.job import Job, check_place, check_same, check_step, identity, make_mesh, read_data
from train.log import Log, Speed
from train.preemption import Stopping
from train.profiler import Profiler
from train.state import TrainState

CHECKPOINTS, ANSWERS, PROFILE = "checkpoints", "answers", "profile"
"""What a job writes into its directory, besides its result and its metrics."""


class TrainError(Glm4vError):
    """A job cannot go on: its gradients are no numbers, or too large, step after step."""


class Result(NamedTuple):
    """How a job ended.

    step: the last one.
    is_done: whether that was the last of all; otherwise it was asked to stop.
    """

    step: int
    is_done: bool


def train(
    config: TrainConfig,
    *,
    records: Sequence[Record] | None = None,
    profile: int = 0,
    tell: Callable[[str], None] | None = None,
) -> Result:
    """Run a job, from its latest checkpoint if there is one.

    SIGTERM makes it save and return: of one process behind the step that is under way, or in the middle of an
    evaluation, which is then not written down; of several some two steps later. What every step came to is a line of
    `metrics.jsonl` in `config.out`; the result is beside it, a checkpoint `model` or an `adapter`. Where several
    processes share the devices (`distributed.init_distributed`), all of them call this, with the same job; a signal to
    any of them is heard by all.

    Args:
      config: of the job.
      records: to learn from, in the place of those of `config.data.files`; taken by their number, in threads.
      profile: of so many steps, early in this run, a profile is written into `config.out`.
      tell: called with lines for a person: what is learned from, what is skipped, where it goes on from, how it goes.

    Raises:
      Glm4vError: what is wrong with the job, its model or its data.
      TrainError: too many steps one after another had to be left out.
    """
    tell = tell or _ignore
    model_config = Glm4vConfig.from_pretrained(config.model)
    mesh = make_mesh(config, model_config)
    data = read_data(config, records)
    check_same(config, data)
    check_place(config)
    processor = Glm4vProcessor.from_pretrained(config.model)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    stack = contextlib.ExitStack()
    with stack, use_mesh(mesh):
        kept = Checkpoints(out / CHECKPOINTS, config.checkpoint, identity(config, model_config, data))
        checkpoints = stack.enter_context(contextlib.closing(kept))
        if checkpoints.latest is not None:
            check_step(checkpoints.latest, config)
        stream = Stream(
            data.learned, processor, model_config, config.data, config.batch, mesh, seed=config.seed, tell=tell
        )
        stack.callback(stream.close)
        evaluator = None
        if config.eval is not None:
            evaluator = Evaluator(data.held, processor, model_config, config, config.eval, mesh, tell)
        stopping = stack.enter_context(Stopping(mesh))
        job, state = Job.begin(config, model_config)
        tell(job.describe(data, mesh))
        if checkpoints.latest is not None:
            like = abstract(state)
            del state  # a device may not hold two of them
            state, where = checkpoints.restore(like)
            stream.set_state(where)
            tell(f"going on after step {int(state.step)}, from {out / CHECKPOINTS}")
        log = stack.enter_context(contextlib.closing(Log(out, config, int(state.step), _speed(job, mesh), tell)))
        profiler = stack.enter_context(Profiler(out / PROFILE, profile, tell))
        run = _Run(job, stream, evaluator, checkpoints, log, stopping, profiler, mesh, out, tell)
        state, is_complete = run.steps(state)
        number = int(state.step)
        if is_complete:
            best = checkpoints.best if config.checkpoint.best is not None else None
            params = state.params
            del state  # moments that nobody needs any more
            if best is not None and best != number:
                tell(f"the result is that of step {best}, the best by {config.checkpoint.best}")
                shapes = abstract(params)
                del params
                params = checkpoints.restore_params(shapes, best)
            tell(f"the result is written: {job.export(params, out)}")
    return Result(number, is_complete)


class _Run(NamedTuple):
    """What the steps of a run need."""

    job: Job
    stream: Stream
    evaluator: Evaluator | None
    checkpoints: Checkpoints
    log: Log
    stopping: Stopping
    profiler: Profiler
    mesh: Mesh
    out: Path
    tell: Callable[[str], None]

    def steps(self, state: TrainState) -> tuple[TrainState, bool]:
        """All that are left, or until it is asked to stop; the state is given away.

        Returns:
          The state behind the last step, which is saved; and whether everything is done that comes before the result.
        """
        config, job, log = self.job.config, self.job, self.log
        number = first = saved = int(state.step)
        prepared = None
        is_stopped = False
        while number < config.steps and not (is_stopped or self.stopping.is_heard()):
            prepared = next(self.stream)
            self.profiler.before_step()
            state, metrics = job.step(state, job.frozen, put(prepared.batch, self.mesh))
            self.stopping.ask()
            number += 1
            self.profiler.after_step(metrics)
            log.add(number, metrics, prepared)
            self._check_streak()
            evaluation = None
            if self.evaluator is not None and (number % self.evaluator.every == 0 or number == config.steps):
                evaluation = self._evaluate(self.evaluator, state, prepared)
                is_stopped = evaluation is None
            is_looked_at = evaluation is not None and config.checkpoint.best is not None
            if number % config.checkpoint.every == 0 or number == config.steps or is_looked_at:
                self._flush()
                self._save(state, prepared, evaluation)
                saved = number
        self._flush()
        self.profiler.end()
        if prepared is not None:
            if number > saved:
                self._save(state, prepared)
            self._tell_counts(state, prepared, number - first)
        return state, number >= config.steps and not is_stopped

    def _evaluate(self, evaluator: Evaluator, state: TrainState, prepared: Prepared) -> Evaluation | None:
        """None where it was asked to stop meanwhile."""
        self._flush()
        number, job, since = self.log.step, self.job, time.perf_counter()
        answers = self.out / ANSWERS / f"step-{number:08d}.jsonl"
        try:
            found = evaluator(job.layout, state.params, job.frozen, job.dtype, answers, self.stopping.is_asked_now)
        except Exception:
            # Several processes may not all have come here; who waits for the others then never ends.
            if not several():
                self._save(state, prepared)
            raise
        if found is None:
            self.tell(f"the evaluation behind step {number} was stopped")
        else:
            self.log.evaluated(number, found, time.perf_counter() - since)
        return found

    def _save(self, state: TrainState, prepared: Prepared, evaluation: Evaluation | None = None) -> None:
        self.checkpoints.save(state, _of_all(prepared), evaluation)

    def _flush(self) -> None:
        self.log.flush()
        self._check_streak()

    def _check_streak(self) -> None:
        """Up to the last step that is computed."""
        config, log = self.job.config, self.log
        if log.streak >= config.max_skipped:
            raise TrainError(
                f"step {log.step}: found gradients of norm {log.grad_norm}, and {config.max_skipped} steps like that "
                f"one after another; expected norms up to max_grad_norm, {config.max_grad_norm}"
            )

    def _tell_counts(self, state: TrainState, prepared: Prepared, steps: int) -> None:
        counts, skipped = counts_of(_of_all(prepared)), int(state.skipped)
        self.tell(
            f"{steps} steps in this run, {skipped} of all were left out; rows read: {counts.rows:,}, of which "
            f"{counts.dropped:,} were too long and {counts.skipped:,} could not be read"
        )


def _of_all(prepared: Prepared) -> dict[str, Any]:
    """The state of the lanes of all processes."""
    return functools.reduce(dict.__or__, gathered(prepared.state))


def _speed(job: Job, mesh: Mesh) -> Speed:
    batch = job.config.batch
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return Speed(batch.tokens, batch.patches, job.flops, None if peak is None else peak * mesh.size)


def _ignore(line: str) -> None:
    del line
