"""A job that learns by reward, from its file to its result; it can be stopped at any point, and resumed."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.compilation_cache import compile_times
from glm4v_jax.devices.distributed import agree, check_devices, errors_of_all, gathered
from glm4v_jax.devices.mesh import reshaped, use_mesh
from glm4v_jax.errors import ConfigError, counted, naming
from glm4v_jax.generate.engine import Engine
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.model.runtime import Runtime
from glm4v_jax.planning.mesh_presets import mesh_for
from train.checkpoints import SAMPLING_DIGEST, abstract
from train.config import TrainConfig
from train.data.encoder import encode_options
from train.data.samples import limited
from train.job import Job, check_step, identity, open_model
from train.optimizers import KEPT, learning_rate
from train.output import CHECKPOINTS, JobResult, Saver, check_room, ignore, open_checkpoints
from train.plot import draw_metrics
from train.preemption import Stopping
from train.rl.config import RLConfig
from train.rl.curriculum import Curriculum, Outcome
from train.rl.cycle import Cycle
from train.rl.handover import Handover
from train.rl.judging import Judges, Task, check_failures, score_shared
from train.rl.levels import read_levels
from train.rl.log import RewardLog
from train.rl.loss import Objective
from train.rl.problems import Problem, Problems, check_lengths, problems_of
from train.rl.rollouts import media_tokens, sampling_options, seed_of
from train.rl.self_test import self_test
from train.rl.step import PolicyStep
from train.rl.verifiers import Reward, make_verifiers
from train.state import TrainState

Control = Callable[[Sequence[Task], Sequence[Reward]], Sequence[Reward]]
"""What was scored in a step, all answers to a problem after one another, and its rewards -> those to learn from."""


def learn(
    config: TrainConfig,
    *,
    log: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    checking: Callable[[int, int], None] | None = None,
    control: Control | None = None,
) -> JobResult:
    """Run a job with `rl`, from its latest checkpoint if there is one.

    The metrics of every step are a line of `metrics.jsonl` in `config.out`, some of its answers lines of
    `rollouts.jsonl`; the result is beside them, a checkpoint `model` or an `adapter`. SIGTERM makes it save and return
    after the step that is under way. Where several processes share the devices, all of them call this.

    Args:
      config: of the job.
      log: called with log lines for a person.
      progress: called with bytes of weights read and bytes in all, while the model is loaded.
      checking: called before that with the number of problems whose length has been checked, and of all.
      control: for experiments: gives the rewards to learn from instead of the verifiers', which alone the test at the
        start is about. A job file cannot name one. It depends on its arguments alone, or the job does not resume.

    Raises:
      Glm4vError: what is wrong with the job, its model, its problems or their verifiers.
      TrainError: too many steps in a row had to be skipped, or the state is not finite.
    """
    rl = config.rl
    if rl is None:
        raise ConfigError("rl: found none; expected the table of a job that learns by reward")
    log = log or ignore
    with errors_of_all():
        model_config, mesh, processor = open_model(config, log)
        engine_mesh = mesh
        if rl.sampling.engine_mesh != "same":
            with naming("rl.sampling.engine_mesh"):
                engine_mesh = reshaped(mesh, mesh_for(rl.sampling.engine_mesh, model_config).shape)
                check_devices(engine_mesh)
        limits = limited(processor, encode_options(config.data, config.batch))
        problems = problems_of(config, limits)
        with naming("data.levels"):
            rates = read_levels(config.data.levels, problems.keys)
        job_identity = _identity(config, model_config, problems, rates)
        verifiers = make_verifiers(rl.verifiers, processor.thinking)
    agree("the job or its problems", job_identity)
    curriculum = Curriculum(
        problems.keys, problems.domains, rl.curriculum, prompts=rl.prompts, seed=config.seed, levels=problems.levels,
        rates=rates,
    )  # fmt: skip
    out = Path(config.out)
    with contextlib.ExitStack() as stack, use_mesh(mesh):
        judges = stack.enter_context(Judges(verifiers))
        with errors_of_all():
            judges.start()
            self_test(judges, problems.examples())
        checkpoints = stack.enter_context(open_checkpoints(config, job_identity, log))
        if (position := checkpoints.data) is not None:
            check_step(int(position["step"]), config)
        else:
            with errors_of_all():
                check_lengths(problems, limits, config.batch.length - rl.sampling.longest, checking)
        check_room(config, model_config, checkpoints)
        stopping = stack.enter_context(Stopping(mesh))
        job, state = Job.start(config, model_config, progress)
        log(_describe(job, problems, mesh))
        step = 0
        if checkpoints.latest is not None:
            like = abstract(state)
            del state  # a device may not have room for two of them
            state, saved = checkpoints.restore(like)
            step = int(saved["step"])
            curriculum.set_state(saved["curriculum"])
            log(f"resuming after step {step}, from {out / CHECKPOINTS}")
        compiled = stack.enter_context(compile_times())
        reward_log = stack.enter_context(contextlib.closing(RewardLog(out, config, step, log)))
        scorer = _Scorer(judges, rl, control)
        cycle = make_cycle(job, state, limits, mesh, engine_mesh)
        saver = Saver(checkpoints, config, checkpoints.latest or 0)
        steps = _Steps(cycle, problems, curriculum, scorer, saver, reward_log, stopping, config, compiled)
        state, step = steps.run(state, step)
        is_complete = step >= config.steps
        if not int(state.step) and step:
            least = rl.least_groups
            log(
                f"warning: {counted(step, 'step')}: found {f'fewer than {least} groups' if least > 1 else 'no group'} "
                "whose answers have different rewards; nothing was learned, and the weights are those that the job "
                "started with"
            )
        if is_complete:
            params = state.params
            del state  # the optimizer's state is not needed any more
            cycle.engine.release(weights=True)
            checkpoints.wait()
            log(f"exported: {job.export(params, out)}")
        draw_metrics(out, log)
    return JobResult(step, is_complete)


def make_cycle(job: Job, state: TrainState, processor: Glm4vProcessor, mesh: Mesh, engine_mesh: Mesh) -> Cycle:
    """Return the steps of a job, with an engine that has the weights of `state`."""
    config, rl = job.config, job.config.rl
    assert rl is not None
    objective = Objective(rl.clip_low, rl.clip_high, rl.sampling.temperature, media_tokens(job.model))
    step = _policy_step(
        job.layout, job.optimizer, objective, dtype=job.dtype, remat=config.remat, max_grad_norm=config.max_grad_norm,
        learning_rate=learning_rate(config.optimizer, config.num_updates),
    )  # fmt: skip
    handover = Handover(job.layout, state.params, job.frozen, job.dtype, mesh, engine_mesh)
    runtime = Runtime.of(handover(state.params), engine_mesh, GenerationConfig.from_pretrained(config.model))
    engine = Engine(runtime, processor, num_slots=rl.sampling.slots)
    engine.reserve(config.batch.length)  # of the longest prompt with its answer: each growth would compile
    return Cycle(engine, step, handover, job.frozen, rl, config.batch, job.model, mesh)


_policy_step = functools.lru_cache(maxsize=KEPT)(PolicyStep)
"""For equal arguments the same one, as `train.step.make_step`."""


class _Scorer:
    """Scores the answers of a step, a share in each process."""

    def __init__(self, judges: Judges, config: RLConfig, control: Control | None = None):
        self._judges, self._most, self._control = judges, config.max_failures, control

    def __call__(self, texts: Sequence[tuple[Problem, str]]) -> Sequence[Reward]:
        tasks = [Task(problem.domain, text, problem.item) for problem, text in texts]
        share = {"index": jax.process_index(), "count": jax.process_count()}
        rewards = score_shared(self._score, tasks, **share, gather=gathered)
        check_failures(tasks, rewards, self._most)
        return rewards if self._control is None else self._control(tasks, rewards)

    def _score(self, tasks: Sequence[Task]) -> list[Reward]:
        with errors_of_all():
            return self._judges.score(tasks)


@dataclasses.dataclass
class _Steps:
    """What the steps of a run need."""

    cycle: Cycle
    problems: Problems
    curriculum: Curriculum
    score: _Scorer
    saver: Saver
    log: RewardLog
    stopping: Stopping
    config: TrainConfig
    compiled: Sequence[float]

    def run(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Take all remaining steps, or until the job is asked to stop; the state is donated.

        Returns:
          The state after the last step, and its number; it is saved with the last step after which no groups waited.
        """
        saved, is_due = step, False
        number = self.saver.first  # of the checkpoint: counts updates, and steps that had nothing to learn from
        settled = step, number, self.curriculum.state()
        while step < self.config.steps and not self.stopping.is_asked_now():
            step += 1
            programs = len(self.compiled)
            drawn = [self.problems[number] for number in self.curriculum.draw(step)]
            state, found = self.cycle(state, drawn, self.score, seed_of(self.config.seed, step), step)
            # Sampled and scored in all processes alike.
            both = found.groups, found.learned
            agree(f"the rewards of step {step}", [[(one.key, one.rewards.tolist()) for one in each] for each in both])
            number += max(len(found.updates), 1)
            if found.updates:
                self.saver.check_streak(step, int(state.streak), float(found.updates[-1].update.grad_norm))
            samples = self.cycle.config.samples
            self.curriculum.update(
                [Outcome(group.key, float(group.rewards.mean()), samples, group.is_valid) for group in found.groups]
            )
            self.log.add(step, drawn, found, self.curriculum, compiles=len(self.compiled) - programs)
            if not found.waiting or step == self.config.steps:
                settled = step, number, self.curriculum.state()
            is_due = is_due or self.config.is_saved(step)
            if is_due and settled[0] > saved and self._save(state, *settled):
                saved, is_due = settled[0], False
        if settled[0] > saved:
            self._save(state, *settled)
        return state, step

    def _save(self, state: TrainState, step: int, number: int, curriculum: dict[str, Any]) -> bool:
        """Save, see `Saver.save`; `step` is the last one after which no groups waited.

        A job that resumes samples those that do again.
        """
        data = {"step": step, "curriculum": curriculum}
        return self.saver.save(step, state, int(state.streak), data, number)


def _identity(config: TrainConfig, model: Glm4vConfig, problems: Problems, rates: dict[str, float]) -> dict[str, Any]:
    """Return what a job must keep to resume from its checkpoints, by name."""
    assert config.rl is not None
    found = identity(config, model, len(problems), problems.fingerprint())
    options, defaults = GenerationConfig.from_pretrained(config.model), GenerationConfig()
    replaced = sampling_options(config.rl, model)  # by the job's own, such as a temperature
    kept = sorted(vars(options).keys() - replaced.keys())
    sampling = [(name, value) for name in kept if (value := getattr(options, name)) != getattr(defaults, name)]
    more = {"pass rates of data.levels": sorted(rates.items()), SAMPLING_DIGEST: sampling}
    return found | {name: hashlib.blake2b(repr(of).encode(), digest_size=8).hexdigest() for name, of in more.items()}


def _describe(job: Job, problems: Problems, mesh: Mesh) -> str:
    domains = ", ".join(f"{problems.domains.count(name):,} of {name}" for name in sorted(set(problems.domains)))
    return job.describe(f"{counted(len(problems), 'problem')} ({domains})", mesh)
