"""What a job that learns by reward writes about its steps: figures of each, and some of its answers."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm4v_jax.devices.distributed import is_first
from glm4v_jax.errors import counted
from glm4v_jax.files import naming_file, to_json
from train.config import TrainConfig
from train.log import METRICS, truncate
from train.rl.curriculum import Curriculum
from train.rl.cycle import CycleResult
from train.rl.problems import Problem
from train.rl.verifiers import FAILURES, UNREADABLE
from train.trackers import Trackers

ROLLOUTS = "rollouts.jsonl"
_SHOWN = 2
"""Groups of a step whose answers are written."""


class RewardLog:
    """Appends to metrics.jsonl and rollouts.jsonl; lines after the step that a job resumes from are removed first.

    Only the first process writes.
    """

    def __init__(self, config: TrainConfig, directory: Path, step: int, log: Callable[[str], None]):
        """Resume after step `step`; `log` is called with a log line every `config.log_every` steps."""
        self._directory, self._config, self._log = directory, config, log
        self._trackers = Trackers(config, directory, step, log)
        if is_first():
            for name in (METRICS, ROLLOUTS):
                truncate(directory / name, step)

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
        self._write(METRICS, line)
        self._trackers.write("train", line)
        for number in range(min(_SHOWN, len(problems))):
            self._write(ROLLOUTS, _shown(step, problems[number], found, number))
        if step % self._config.log_every == 0 or step == self._config.steps:
            drift, waiting = line.get("ratio_first_dev"), counted(found.waiting, "group")
            learned = f"nothing learned, {waiting} waiting" if drift is None else f"ratios off by {drift:.1e}"
            self._log(
                f"step {step} of {self._config.steps}: reward {line['reward']:.3f}, {line['valid']:.0%} of "
                f"{line['groups']:.0f} groups valid, {line['length']:.0f} tokens an answer, {learned}, rollout "
                f"{line['seconds_rollout']:.1f} s, learning {line.get('seconds_learning', 0.0):.1f} s"
            )

    def close(self) -> None:
        """Close the trackers."""
        self._trackers.close()

    def _write(self, name: str, line: dict[str, Any]) -> None:
        if is_first():
            path = self._directory / name
            with naming_file(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(to_json(line, ensure_ascii=name == METRICS) + "\n")


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
