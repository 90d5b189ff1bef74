"""A step of learning by reward: sample answers, score them, learn from the groups that say most, hand the weights over.

Synchronous: answers are always sampled from the weights of the moment. A step is a function of the training's state,
the problems, their rewards and the seed, so that a job resumes bit for bit from what it saved between two steps.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError, Glm4vError, counted
from glm4v_jax.generate.engine import Engine
from glm4v_jax.inputs.prompt import Prompt
from train.config import BatchConfig
from train.data.placement import put, stacked
from train.rl.config import RLConfig
from train.rl.groups import Group, most_balanced, num_samples
from train.rl.handover import Handover
from train.rl.packing import micro_batches
from train.rl.problems import Problem
from train.rl.rollouts import Answers, answer_text, is_cut, sample
from train.rl.step import PolicyMetrics, PolicyStep
from train.rl.verifiers import Reward
from train.state import Leaves, TrainState

ScoreAnswers = Callable[[Sequence[tuple[Problem, str]]], Sequence[Reward]]
"""[(problem, the text of an answer to it)] -> their rewards, in this order."""


class DriftError(Glm4vError):
    """The model does not give what was sampled the probability that the engine did."""


class CycleResult(NamedTuple):
    """What a step has found.

    groups: all that were sampled, in the order of the problems.
    learned: those that were learned from, earlier ones that had waited among them, in the order of their keys.
    waiting: number of those that wait for more, see `RLConfig.min_groups`.
    answers, rewards: what was sampled, and the reward of each, as `groups`.
    updates: metrics of each update; none where there was nothing to learn.
    seconds: of each phase.
    """

    groups: list[Group]
    learned: list[Group]
    waiting: int
    answers: list[Answers]
    rewards: list[list[Reward]]
    updates: list[PolicyMetrics]
    seconds: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """Return the figures of the step's line in metrics.jsonl, without those of domains and tiers."""
        rewards = np.stack([group.rewards for group in self.groups])
        lengths = np.array([len(rollout) for group in self.groups for rollout in group.rollouts])
        completions = [one for answers in self.answers for one in answers.completions]
        found = {
            "reward": rewards.mean(), "right": (rewards == 1).mean(), "all_right": (rewards == 1).all(axis=1).mean(),
            "all_wrong": (rewards == 0).all(axis=1).mean(), "valid": np.mean([group.is_valid for group in self.groups]),
            "groups": len(self.groups), "learned": len(self.learned), "waiting": self.waiting,
            "updates": len(self.updates),
            "cut": np.mean([is_cut(one) for one in completions]),
            "forced": np.mean([one.is_forced for one in completions]),
            "length": lengths.mean(), "length_p95": np.quantile(lengths, 0.95), "length_max": lengths.max(),
        }  # fmt: skip
        if self.updates:
            first, last = self.updates[0], self.updates[-1]
            found |= {f"ratio_first_{name}": getattr(first, f"ratio_{name}") for name in ("mean", "dev", "max")}
            names = ("ratio_dev", "clipped_low", "clipped_high", "divergence", "entropy")
            found |= {name: getattr(last, name) for name in names}
            found |= {name: getattr(last.update, name) for name in ("grad_norm", "learning_rate", "skipped")}
            found |= {"tokens": sum(float(one.tokens) for one in self.updates)}
        found |= {f"seconds_{name}": value for name, value in self.seconds.items()}
        return {name: float(value) for name, value in found.items()}


@dataclasses.dataclass
class Cycle:
    """What the steps of a job need.

    Attributes:
      engine: samples; it has the weights of the state that the next step is given.
      step, handover: made of the same layout.
      frozen: leaves that are not trained.
      config: of learning by reward.
      batch: shape of a micro-batch.
      model: of the model.
      mesh: of the training.
      releases: whether the engine's weights and caches are freed while a step learns, so that a device needs room for
        the larger of both, and not for their sum.
      waiting: groups of earlier steps that are still to be learned from; the weights have not changed since.
    """

    engine: Engine
    step: PolicyStep
    handover: Handover
    frozen: Leaves
    config: RLConfig
    batch: BatchConfig
    model: Glm4vConfig
    mesh: Mesh
    releases: bool = True
    waiting: list[Group] = dataclasses.field(default_factory=list)

    def __call__(
        self, state: TrainState, problems: Sequence[Problem], score: ScoreAnswers, seed: int, step: int
    ) -> tuple[TrainState, CycleResult]:
        """Take a step; the state is donated.

        Problems are in the same order, and rewards the same, in all processes. `step` is its number in the job, from 1,
        which the schedule of the learning rate goes by; for `seed` see `rollouts.seed_of`.

        Raises:
          DriftError: the ratios before the first update are not 1: something that was sampled is not what was learned.
          Glm4vError: a prompt cannot be prepared, or does not fit a row.
        """
        phases = _Phases()

        def check(number: int, prompt: Prompt) -> None:
            if len(prompt) + self.config.sampling.longest > self.batch.length:
                raise DataError(
                    f"{problems[number].source}: found a prompt of {counted(len(prompt), 'token')}; expected at most "
                    f"{self.batch.length - self.config.sampling.longest:,}: a row, batch.length, also has the answer"
                )

        answers = sample(self.engine, [list(one.messages) for one in problems], self.config, seed, check)
        phases.end("rollout")
        n = self.config.samples
        texts = [(one, answer_text(said)) for one, of in zip(problems, answers, strict=True) for said in of.completions]
        scored = score(texts)
        rewards = [list(scored[i * n : (i + 1) * n]) for i in range(len(problems))]
        phases.end("scoring")
        groups = [
            found.group(problem.key, [reward.value for reward in own], self.config.truncated)
            for problem, found, own in zip(problems, answers, rewards, strict=True)
        ]
        learned = most_balanced([*self.waiting, *groups], self.config.prompts)
        is_enough = len(learned) >= self.config.least_groups
        self.waiting, learned = ([], learned) if is_enough else (learned, [])
        updates = list[PolicyMetrics]()
        if learned:
            state, updates = self._learn(state, learned, step, phases)
            jax.block_until_ready(state.params)
            phases.end("learning")
            self.engine.update(self.handover(state.params))
            jax.block_until_ready(self.engine.runtime.text.leaves)
            phases.end("handover")
        return state, CycleResult(groups, learned, len(self.waiting), answers, rewards, updates, phases.seconds)

    def _learn(
        self, state: TrainState, groups: list[Group], step: int, phases: "_Phases"
    ) -> tuple[TrainState, list[PolicyMetrics]]:
        """Take the updates of a step, each on its part of the groups: of fewer than `prompts` groups fewer updates.

        The learning rates are the last ones of those that the schedule has for the step: the last step, whatever was
        learned from before, has the last of all.
        """
        if self.releases:
            self.engine.release(weights=True)
        config = self.config
        count = max(round(config.updates * len(groups) / config.prompts), 1)
        found = list[PolicyMetrics]()
        first = step * config.updates - count  # in the schedule
        for i in range(count):
            part = groups[i::count]
            phases.end("learning")
            packed = micro_batches(part, self.batch, self.model, average=config.average, advantage=config.advantage)
            phases.end("packing")
            tokens = sum(rollout.num_sampled for group in part for rollout in group.rollouts)
            total = num_samples(part) if config.average == "sample" else tokens
            batches = (put(stacked([one]), self.mesh) for one in packed)
            state, metrics = self.step(state, self.frozen, batches, total, first + i)
            found.append(metrics)
            limit = config.max_ratio_drift or (1e-3 if self.engine.runtime.dtype == jnp.float32 else 2e-2)
            if len(found) == 1 and not (drift := float(metrics.ratio_dev)) <= limit:
                raise DriftError(
                    f"rl.max_ratio_drift: found a mean |ratio - 1| of {drift:.2g} before the first update; expected at "
                    f"most {limit:g}: the engine and the training compute different probabilities"
                )
        return state, found


class _Phases:
    """Seconds of the phases of a step, each from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now
