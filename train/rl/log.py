"""What a job that learns by reward writes about its steps: figures of each, and some of its answers."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm4v_jax.errors import counted
from train.config import TrainConfig
from train.log import METRICS, JobLog
from train.rl.curriculum import Curriculum
from train.rl.cycle import CycleResult
from train.rl.problems import Problem
from train.rl.verifiers import FAILURES, UNREADABLE

ROLLOUTS = "rollouts.jsonl"
_SHOWN = 2
"""Groups of a step whose answers are written."""


class RewardLog(JobLog):
    """The figures of steps, in metrics.jsonl, and some of their answers, in rollouts.jsonl."""

    def __init__(self, directory: Path, config: TrainConfig, step: int, log: Callable[[str], None]):
        """Resume after step `step`; `log` is called with a log line every `config.log_every` steps."""
        super().__init__(directory, config, step, log, (METRICS, ROLLOUTS))

    def add(
        self, step: int, problems: Sequence[Problem], found: CycleResult, curriculum: Curriculum, **more: float
    ) -> None:
        """Write a step: its number, what became of the problems that were drawn, the curriculum after it, and more."""
        line: dict[str, Any] = {
            "step": step,
            **found.metrics(),
            **_shares(found),
            **more,
            "expansion": curriculum.expansion,
        }
        by_domain: dict[str, list[float]] = {}
        for problem, group in zip(problems, found.groups, strict=True):
            by_domain.setdefault(problem.domain, []).append(float(group.rewards.mean()))
        line |= {f"reward/{domain}": statistics.fmean(values) for domain, values in sorted(by_domain.items())}
        line["tiers"] = [[count, None if rate != rate else rate] for count, rate in curriculum.by_tier()]
        self.write(METRICS, line)
        for number in range(min(_SHOWN, len(problems))):
            self.write(ROLLOUTS, _shown(step, problems[number], found, number), ensure_ascii=False)
        drift, waiting = line.get("ratio_first_dev"), counted(found.waiting, "group")
        learned = f"nothing learned, {waiting} waiting" if drift is None else f"ratios off by {drift:.1e}"
        self.log_step(
            step,
            f"reward {line['reward']:.3f}, {line['valid']:.0%} of {line['groups']:.0f} groups valid, "
            f"{line['length']:.0f} tokens an answer, {learned}, rollout {line['seconds_rollout']:.1f} s, learning "
            f"{line.get('seconds_learning', 0.0):.1f} s",
        )


def _shares(found: CycleResult) -> dict[str, float]:
    """Fractions of the answers by the reason of their reward."""
    reasons = [reward.reason for rewards in found.rewards for reward in rewards]
    kinds = {"unreadable": UNREADABLE, "failed": FAILURES, "looped": {"loop"}}
    return {name: statistics.fmean(reason in some for reason in reasons) for name, some in kinds.items()}


def _shown(step: int, problem: Problem, found: CycleResult, number: int) -> dict[str, Any]:
    answers = zip(found.answers[number].completions, found.rewards[number], strict=True)
    return {
        "step": step, "key": problem.key, "domain": problem.domain, "source": problem.source,
        "answers": [
            {
                "text": one.text, "reward": reward.value, "reason": reward.reason,
                "parsed": json.loads(json.dumps(reward.parsed, default=str)),
            }
            for one, reward in answers
        ],
    }  # fmt: skip
