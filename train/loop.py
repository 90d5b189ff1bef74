"""A training job from its file to its result; it can be stopped at any point, and resumed."""

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax import process_index
from jax.sharding import Mesh

from glm4v_jax.checkpoints.orbax_write import by_first
from glm4v_jax.console.progress import Programs
from glm4v_jax.devices.compilation_cache import compile_times, compiling
from glm4v_jax.devices.distributed import errors_of_all, gathered, several
from glm4v_jax.devices.hardware import peak_flops
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.errors import ConfigError, counted
from glm4v_jax.files import model_fingerprint
from glm4v_jax.generate.warmup import programs
from train.checkpoints import abstract
from train.config import TrainConfig
from train.data.encoder import make_encoder
from train.data.epochs import count_steps, read_steps, write_steps
from train.data.placement import put
from train.data.records import Record
from train.data.stream import RowCounts, Stream
from train.evaluate import Evaluator
from train.job import (
    Job,
    check_memory,
    check_same,
    check_step,
    describe_data,
    identity,
    open_model,
    read_data,
)
from train.log import MetricsLog
from train.output import (
    ANSWERS,
    CHECKPOINTS,
    EPOCHS,
    PROFILE,
    REFERENCES,
    JobResult,
    Saver,
    check_room,
    ignore,
    open_checkpoints,
)
from train.plot import draw_metrics
from train.preemption import Stopping
from train.profiler import Profiler
from train.references import compute, encoded, table_of
from train.state import TrainState, bit_sum


def train(
    config: TrainConfig,
    *,
    records: Sequence[Record] | None = None,
    profile: int = 0,
    log: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> JobResult:
    """Run a job, from its latest checkpoint if there is one.

    SIGTERM makes it save and return: one process after the step that is under way, or in the middle of an evaluation,
    whose results are then dropped; several processes some two steps later. The metrics of every step are a line of
    `metrics.jsonl` in `config.out`; the result is beside it, a checkpoint `model` or an `adapter`. Where several
    processes share the devices (`distributed.init_distributed`), all of them call this, with the same job; a signal to
    any of them stops all. What is wrong in one of them before the model is loaded is raised in all; whoever catches a
    later error ends the process, for which the others wait.

    Args:
      config: of the job.
      records: to train on, instead of those of `config.data.files`; indexed from threads.
      profile: write a profile of this many steps, early in the run, to `config.out`.
      log: called with log lines for a person.
      progress: called with bytes of weights read and bytes in all, while the model is loaded.

    Raises:
      Glm4vError: what is wrong with the job, its model or its data.
      TrainError: too many steps in a row had to be skipped, or the state is not finite.
    """
    if config.rl is not None:
        raise ConfigError("rl: found a table; expected none: such a job is run by train.rl.loop.learn")
    log = log or ignore
    with errors_of_all():
        model_config, mesh, processor = open_model(config, log)
        data = read_data(config, records)
        job_identity = identity(config, model_config, len(data.train), data.digest)
        digest = functools.partial(_digest, job_identity, model_fingerprint(config.model))
    check_same(config, data, job_identity)
    out = Path(config.out)
    stack = contextlib.ExitStack()
    with stack, use_mesh(mesh):
        checkpoints = stack.enter_context(open_checkpoints(config, job_identity, log))
        encoder = make_encoder(data.train, processor, model_config, config.data, config.batch)
        stream = Stream(
            encoder, model_config, config.data, config.batch, mesh, seed=config.seed, log=log, draws=data.draws,
            epochs=config.epochs,
        )  # fmt: skip
        stack.callback(stream.close)
        evaluator = None
        if config.eval is not None:
            evaluator = Evaluator(data.held_out, processor, model_config, config, config.eval, mesh, log)
        if epochs := config.epochs:
            epochs_digest = digest(epochs)
            # All records are encoded next. Memory is the same for any number of steps.
            check_memory(dataclasses.replace(config, steps=1 << 30, epochs=0), model_config)
            steps = read_steps(out / EPOCHS, epochs_digest) or count_steps(
                encoder, config.data, config.batch, mesh, epochs, seed=config.seed, log=log,
                step=checkpoints.latest or 0, lanes=checkpoints.data,
            )  # fmt: skip
            config = dataclasses.replace(config, steps=steps, epochs=0)
            log(f"{counted(epochs, 'epoch')} of {counted(len(data.train), 'record')} in {counted(steps, 'step')}")
        if checkpoints.latest is not None:
            check_step(checkpoints.latest, config)
        stopping = stack.enter_context(Stopping(mesh))
        check_room(config, model_config, checkpoints)
        compiled = stack.enter_context(compile_times())
        stack.enter_context(compiling(Programs(_programs(config), lambda text: log(text) if text else None)))
        job, state = Job.start(config, model_config, progress)
        log(job.describe(describe_data(config, data), mesh))
        if config.preference is not None and config.preference.has_reference:
            weights = job.weights(state.params)
            model_sum = int(bit_sum((state.params, job.frozen)))  # of whatever model, and adapter, the job starts from
            samples = functools.partial(encoded, encoder, config.data.threads)
            encoder.references = table_of(
                out / REFERENCES, digest(model_sum), len(data.train),
                lambda: compute(weights, samples(), config.batch, model_config, mesh), log,
            )  # fmt: skip
            if evaluator is not None:
                evaluator.compare_with(weights)
            del weights
        if checkpoints.latest is not None:
            like = abstract(state)
            del state  # a device may not have room for two of them
            state, lanes = checkpoints.restore(like)
            stream.set_state(lanes)
            log(f"resuming after step {int(state.step)}, from {out / CHECKPOINTS}")
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        kept_metrics = MetricsLog(
            out, config, int(state.step), job.flops, None if peak is None else peak * mesh.size, log, compiled
        )
        metrics_log = stack.enter_context(contextlib.closing(kept_metrics))
        profiler = stack.enter_context(Profiler(out / PROFILE, profile, log))
        if epochs:
            by_first(lambda: write_steps(out / EPOCHS, epochs_digest, config.steps))
        saver = Saver(checkpoints, config, int(state.step))
        run = _Steps(job, stream, evaluator, saver, metrics_log, stopping, profiler, mesh, out, log, set())
        state, is_complete = run.run(state)
        number = int(state.step)
        if is_complete:
            best = None
            if config.checkpoint.best is not None:
                best = checkpoints.best
                if best is None:
                    log(f"found no finite {config.checkpoint.best} of a checkpoint: exporting that of the last step")
                elif (line := checkpoints.tie()) is not None:
                    log(line)
            params = state.params
            del state  # the optimizer's state is not needed any more
            if best is not None and best != number:
                log(f"exporting step {best}, the best by {config.checkpoint.best}")
                shapes = abstract(params)
                del params
                params = checkpoints.restore_params(shapes, best)
            log(f"exported: {job.export(params, out)}")
        draw_metrics(out, log)
    return JobResult(number, is_complete)


class _Steps(NamedTuple):
    """What the steps of a run need."""

    job: Job
    stream: Stream
    evaluator: Evaluator | None
    saver: Saver
    metrics_log: MetricsLog
    stopping: Stopping
    profiler: Profiler
    mesh: Mesh
    out: Path
    log: Callable[[str], None]
    named: set[int]
    """Processes whose first bad row has been named."""

    def run(self, state: TrainState) -> tuple[TrainState, bool]:
        """Take all remaining steps, or until the job is asked to stop; the state is donated.

        Returns:
          The state after the last step, which is saved unless that was skipped; and whether everything is done that
          comes before the export.
        """
        config, job = self.job.config, self.job
        number = saved = self.saver.first
        lanes = None
        is_due = is_stopped = False
        if number and config.is_evaluated(number) and number not in self.saver.checkpoints.evaluations:
            is_stopped = not self._evaluate(state)  # what it resumes after was saved, and then the job ended
        while number < config.steps and not (is_stopped or self._is_over() or self.stopping.is_asked()):
            batch, lanes = next(self.stream)
            self.profiler.before_step()
            state, metrics = job.step(state, job.frozen, put(batch, self.mesh))
            self.stopping.ask()
            number += 1
            self.profiler.after_step(metrics)
            self.metrics_log.add(number, metrics, self._row_fields(lanes))
            self._check_streak()
            is_due = is_due or config.is_saved(number)
            if is_due:
                self._flush()
                if self._save(state, self.of_all_processes(lanes)):
                    saved, is_due = number, False
            if config.is_evaluated(number):
                self._flush()
                try:
                    is_stopped = not self._evaluate(state)
                except Exception:
                    # Several processes may not all have come here, and saving would wait for the others for ever.
                    if number > saved and not several():
                        self._save(state, lanes)
                    raise
        self._flush()
        self.profiler.end()
        if lanes is not None:
            lanes = self.of_all_processes(lanes)
            if number > saved and not self._save(state, lanes):
                self.log(f"step {number} was skipped, and is not saved")
            counts = RowCounts.of(lanes)
            self.log(
                f"{number - self.saver.first} steps in this run, {int(state.skipped)} of all skipped; rows read: "
                f"{counts.rows:,}, of which {counts.dropped:,} were too long and {counts.skipped:,} could not be read"
            )
            if number >= config.steps and (left := self.stream.left(lanes)):
                self.log(f"{counted(left, 'row')} left: some could not be read when steps were counted")
        if (is_over := self._is_over()) and number < config.steps:
            found = counted(self.saver.checkpoints.stale, "evaluation")
            self.log(f"ended after step {number} of {config.steps}: {found} without a better {config.checkpoint.best}")
        return state, (number >= config.steps or is_over) and not is_stopped

    def _is_over(self) -> bool:
        """Whether evaluations have found no better model for too long."""
        options = self.job.config.eval
        return options is not None and options.patience is not None and self.saver.checkpoints.stale >= options.patience

    def _save(self, state: TrainState, lanes: dict[str, Any]) -> bool:
        """Save, see `Saver.save`."""
        return self.saver.save(self.metrics_log.step, state, self.metrics_log.streak, lanes)

    def _evaluate(self, state: TrainState) -> bool:
        """Evaluate, and return whether it was not stopped meanwhile."""
        assert self.evaluator is not None
        number, since = self.metrics_log.step, time.perf_counter()
        answers = self.out / ANSWERS / f"step-{number:08d}.jsonl"
        found = self.evaluator(self.job.weights(state.params), answers, self.stopping.is_asked_now)
        if found is None:
            self.log(f"the evaluation after step {number} was stopped")
            return False
        self.metrics_log.evaluated(number, found, time.perf_counter() - since)
        self.saver.checkpoints.evaluated(number, found)
        return True

    def of_all_processes(self, lanes: dict[str, Any]) -> dict[str, Any]:
        """Return the states of the lanes of all processes, and log the first bad row of each but this one."""
        everyone = gathered(lanes)
        for process, states in enumerate(everyone):
            bad = next((lane["bad"] for lane in states.values() if lane["bad"]), None)
            if bad is not None and process != process_index() and process not in self.named:
                self.named.add(process)
                self.log(f"process {process}: {bad}")
        return functools.reduce(dict.__or__, everyone)

    def _row_fields(self, lanes: dict[str, Any]) -> dict[str, Any]:
        """Fields of metrics.jsonl about the rows that this process's lanes have read."""
        counts = RowCounts.of(lanes)
        epoch = round(self.stream.epochs(lanes), 4)
        return {"epoch": epoch, "rows_dropped": counts.dropped, "rows_skipped": counts.skipped}

    def _flush(self) -> None:
        self.metrics_log.flush()
        self._check_streak()

    def _check_streak(self) -> None:
        """Check the steps whose metrics have been read."""
        found = self.metrics_log
        self.saver.check_streak(found.step, found.streak, found.grad_norm)


def _digest(*parts: Any) -> str:
    """Digest what decides a file of a job: its identity, the files of its model, and more.

    Tokenizer, chat template and processors are among those of the model: they decide how records are encoded.
    """
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _programs(config: TrainConfig) -> dict[str, str]:
    """The jitted functions that a job runs, and what a person calls them."""
    found = {"step": "training step"}
    if config.preference is not None and config.preference.has_reference:
        found |= {"_logprobs": "log probabilities before the training"}
    if config.eval is not None:
        found["evaluation_loss"] = "loss of the evaluation"
        found |= programs() if config.eval.generate else {}
    return found
