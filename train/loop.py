"""A training job from its file to its result: it can be stopped at any point, and goes on from where it was."""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from glm4v_jax.config import Glm4vConfig
from glm4v_jax.distributed import any_of, gathered
from glm4v_jax.errors import Glm4vError
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.mesh import use_mesh
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.evaluate import Evaluation, Evaluator
from train.flops import peak_flops
from train.job import Job, check_same, check_step, make_mesh, read_data
from train.log import Log, Speed
from train.placement import put
from train.records import Record
from train.state import TrainState
from train.stream import Stream

CHECKPOINTS, ANSWERS, PROFILE = "checkpoints", "answers", "profile"
"""What a job writes into its directory, besides its result and its metrics."""

_BEFORE_PROFILE = 2
"""Steps that are not looked at: the first compiles, the second still waits for its data."""


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

    SIGTERM makes it save and return. What every step came to is a line of `metrics.jsonl` in `config.out`; the result
    is beside it, a checkpoint `model` or an `adapter`. Where several processes share the devices
    (`distributed.init_distributed`), all of them call this, with the same job; a signal to any of them is heard by all.

    Args:
      config: of the job.
      records: to learn from, in the place of those of `config.data.files`; taken by their number, in threads.
      profile: of so many steps, early in this run, a profile is written into `config.out`.
      tell: called with lines for a person: what is skipped, where it goes on from, how it goes.

    Raises:
      Glm4vError: what is wrong with the job, its model or its data.
      TrainError: too many steps one after another had to be left out.
    """
    tell = tell or _ignore
    model_config = Glm4vConfig.from_pretrained(config.model)
    mesh = make_mesh(config, model_config)
    data = read_data(config, records)
    check_same(config, data)
    processor = Glm4vProcessor.from_pretrained(config.model)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    stack = contextlib.ExitStack()
    with stack, use_mesh(mesh):
        stream = Stream(
            data.learned, processor, model_config, config.data, config.batch, mesh, seed=config.seed, tell=tell
        )
        stack.callback(stream.close)
        evaluator = None
        if config.eval is not None:
            evaluator = Evaluator(data.held, processor, model_config, config, config.eval, mesh, tell)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(out / CHECKPOINTS, config.checkpoint)))
        is_stopped = stack.enter_context(_stopping())
        job = Job.begin(config, model_config)
        state = job.state
        del job.state  # the steps give its buffers away
        if checkpoints.latest is not None:
            check_step(checkpoints.latest, config)
            state, where = checkpoints.restore(state)
            stream.set_state(where)
            tell(f"going on after step {int(state.step)}, from {out / CHECKPOINTS}")
        number = first = saved = int(state.step)
        log = stack.enter_context(contextlib.closing(Log(out, config, number, _speed(job, mesh), tell)))
        profiler = stack.enter_context(_Profiler(out / PROFILE, first + _BEFORE_PROFILE, profile))
        while number < config.steps and not any_of(is_stopped()):
            prepared = next(stream)
            profiler.at(number)
            state, metrics = job.step(state, job.frozen, put(prepared.batch, mesh))
            number += 1
            log.add(number, metrics)
            _check_streak(number - 1, log, config)
            evaluation = None
            if evaluator is not None and (number % evaluator.every == 0 or number == config.steps):
                evaluation = _evaluate(number, job, state, evaluator, log, out)
            is_looked_at = evaluation is not None and config.checkpoint.best is not None
            if number % config.checkpoint.every == 0 or number == config.steps or is_looked_at:
                log.flush()
                checkpoints.save(state, _state_of_all(prepared.state), evaluation)
                saved = number
        log.flush()
        if number > saved:
            checkpoints.save(state, _state_of_all(prepared.state))
        if number >= config.steps:
            params = _result(state, checkpoints, config, tell).params
            del state  # moments that nobody needs any more
            tell(f"the result is written: {job.export(params, out)}")
    return Result(number, number >= config.steps)


def _evaluate(number: int, job: Job, state: TrainState, evaluator: Evaluator, log: Log, out: Path) -> Evaluation:
    log.flush()
    since = time.perf_counter()
    answers = out / ANSWERS / f"step-{number:08d}.jsonl"
    found = evaluator(job.layout, state.params, job.frozen, job.dtype, answers)
    log.evaluated(number, found, time.perf_counter() - since)
    return found


def _result(
    state: TrainState, checkpoints: Checkpoints, config: TrainConfig, tell: Callable[[str], None]
) -> TrainState:
    """The state that the result is made of."""
    if config.checkpoint.best is None or (best := checkpoints.best) is None or best == int(state.step):
        return state
    tell(f"the result is that of step {best}, the best by {config.checkpoint.best}")
    return checkpoints.restore(state, best).state


def _check_streak(number: int, log: Log, config: TrainConfig) -> None:
    """Of the last step that is computed."""
    if log.streak >= config.max_skipped:
        raise TrainError(
            f"step {number}: found gradients of norm {log.grad_norm}, and {config.max_skipped} steps like that one "
            f"after another; expected norms up to max_grad_norm, {config.max_grad_norm}"
        )


def _state_of_all(state: dict[str, object]) -> dict[str, object]:
    """Of the lanes of all processes."""
    return functools.reduce(dict.__or__, gathered(state))


def _speed(job: Job, mesh: Mesh) -> Speed:
    batch = job.config.batch
    tokens = batch.micro_batches * batch.rows * batch.length
    patches = batch.micro_batches * batch.vision_rows * batch.vision_length
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return Speed(tokens, patches, job.flops, None if peak is None else peak * mesh.size)


class _Profiler:
    """A profile of some steps, for TensorBoard or Perfetto."""

    def __init__(self, directory: Path, first: int, count: int):
        self._directory, self._first = directory, first if count else math.inf
        self._last = first + count
        self._is_on = False

    def at(self, step: int) -> None:
        """Called before every step."""
        if step >= self._last:
            self._stop()
        elif step >= self._first and not self._is_on:
            jax.profiler.start_trace(str(self._directory))
            self._is_on = True

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "_Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, with which a machine that is taken away announces it."""
    asked: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        del frame
        asked.append(number)

    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def _ignore(line: str) -> None:
    del line
