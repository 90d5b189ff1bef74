"""The pass rate of a checkpoint on each problem, before a training: `glm4v train levels`. Resumes where it stopped."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from glm4v_jax.devices.distributed import agree, is_first
from glm4v_jax.errors import DataError
from glm4v_jax.files import replacing
from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.engine import Request
from train.rl.config import SamplingConfig
from train.rl.judging import Task
from train.rl.levels import level_line
from train.rl.problems import Problems
from train.rl.verifiers import Reward


class Sampler(Protocol):
    """What answers prompts: an `Engine`."""

    def generate_many(self, prompts: Any, **options: Any) -> Iterator[Completion]:
        """See `Engine.generate_many`."""


@dataclasses.dataclass(frozen=True)
class Levels:
    """A file of pass rates, with a line for each problem that is done.

    Attributes:
      path: the file.
      model: fingerprint of the checkpoint.
      samples: rollouts of each problem.
    """

    path: Path
    model: str
    samples: int

    def done(self) -> set[str]:
        """Return the keys of the lines that are there; a last line that was cut off is removed.

        Raises:
          DataError: the file is of another model, or of another number of rollouts.
        """
        if not self.path.is_file():
            return set()
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        for number, line in enumerate(lines, 1):
            found = line.get("model"), line.get("samples")
            if found != (self.model, self.samples):
                raise DataError(
                    f"{self.path}:{number}: found {found[1]} rollouts of model {found[0]}; expected {self.samples} of "
                    f"{self.model}: pass --restart to measure again, or --out for another file"
                )
        if len(whole) < len(text) and is_first():
            with replacing(self.path) as aside:
                aside.write_bytes(whole)
        return {line["key"] for line in lines}

    def add(self, key: str, rewards: Sequence[float]) -> None:
        """Write the line of a problem."""
        line = {**json.loads(level_line(key, rewards)), "model": self.model}
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")


def measure(
    levels: Levels,
    problems: Problems,
    engine: Sampler,
    score: Callable[[Sequence[Task]], list[Reward]],
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answer each problem that is not done some times, score the answers, and write its line.

    The draws of a problem depend on its key and the seed alone. Where several processes share the devices, all of them
    call this, and the first one writes.

    Args:
      levels: the file.
      problems: of the job.
      engine: of the checkpoint.
      score: texts -> rewards, such as `Judges.score`.
      options: of the generation, see `sampling_options`.
      seed: of the draws.
      progress: called with the number of problems that are done, and of all.
    """
    done = levels.done()
    agree("problems that are measured already", hashlib.blake2b(repr(sorted(done)).encode(), digest_size=8).digest())
    todo = [number for number, key in enumerate(problems.keys) if key not in done]
    requests = (
        Request(list(problems[number].messages), {"seed": seed_of(problems.keys[number], seed)}) for number in todo
    )
    texts: dict[int, list[str]] = {}
    finished = len(problems) - len(todo)
    progress(finished, len(problems))
    for completion in engine.generate_many(requests, samples=levels.samples, **options) if todo else ():
        number = todo[completion.index // levels.samples]
        of_one = texts.setdefault(number, [])
        of_one.append(answer_text(completion))
        if len(of_one) < levels.samples:
            continue
        del texts[number]
        item, key = problems.items[number], problems.keys[number]
        rewards = score([Task(problems.domains[number], text, item) for text in of_one])
        if is_first():
            levels.add(key, [reward.value for reward in rewards])
        finished += 1
        progress(finished, len(problems))


def sampling_options(sampling: SamplingConfig, *, is_forced: bool) -> dict[str, Any]:
    """Return the options of the engine for rollouts: all of them, whatever the checkpoint's own are.

    Args:
      sampling: of the job.
      is_forced: whether a thought that uses up its budget is closed, and the answer begun.
    """
    budgets: dict[str, Any] = {"max_new_tokens": sampling.longest}
    if is_forced and sampling.think_budget:
        budgets = {"think_budget": sampling.think_budget, "answer_budget": sampling.answer_budget}
    return {
        **budgets, "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "top_k": sampling.top_k, "repetition_penalty": 1.0,
    }  # fmt: skip


def answer_text(completion: Completion) -> str:
    """Return what verifiers read: the text, with the beginning of a thought that the prompt has opened."""
    return ("<think>" if completion.thinking.begins_open else "") + completion.text


def seed_of(key: str, seed: int) -> int:
    """Return the seed of a problem's draws."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=4).digest(), "little")
