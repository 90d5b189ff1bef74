"""The pass rate of a checkpoint on each problem, before a training: `glm4v train levels`. Resumes where it stopped."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from glm4v_jax.devices.distributed import agree, is_first
from glm4v_jax.errors import DataError
from glm4v_jax.files import replacing
from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.engine import Request
from train.rl.judging import Task
from train.rl.levels import level_line
from train.rl.problems import Problems
from train.rl.rollouts import answer_text, seed_of, value_of
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
          DataError: the file is of another model or number of rollouts, or is none of pass rates.
        """
        if not self.path.is_file():
            return set()
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        keys = set()
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                keys.add(row["key"])
                found = row.get("model"), row.get("samples")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(
                    f"{self.path}:{number}: found no pass rate of a problem; expected one: pass --restart to measure "
                    "again, or --out for another file"
                ) from error
            if found != (self.model, self.samples):
                raise DataError(
                    f"{self.path}:{number}: found {found[1]} rollouts of model {found[0]}; expected {self.samples} of "
                    f"{self.model}: pass --restart to measure again, or --out for another file"
                )
        if len(whole) < len(text) and is_first():
            with replacing(self.path) as aside:
                aside.write_bytes(whole)
        return keys

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
    truncated: str = "force",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answer each problem that is not done some times, score the answers, and write its line.

    The draws of a problem depend on its key and the seed alone. Where several processes share the devices, all of them
    call this, and the first one scores and writes.

    `score`: texts -> rewards, such as `Judges.score`; `options`: see `rollouts.sampling_options`; `progress` is called
    with the number of problems that are done, and of all.
    """
    done = levels.done()
    agree("problems that are measured already", sorted(done))
    todo = [number for number, key in enumerate(problems.keys) if key not in done]
    requests = (
        Request(list(problems[number].messages), {"seed": seed_of(seed, problems.keys[number])}) for number in todo
    )
    completions: dict[int, list[Completion]] = {}
    finished = len(problems) - len(todo)
    progress(finished, len(problems))
    for completion in engine.generate_many(requests, samples=levels.samples, **options) if todo else ():
        number = todo[completion.index // levels.samples]
        of_one = completions.setdefault(number, [])
        of_one.append(completion)
        if len(of_one) < levels.samples:
            continue
        del completions[number]
        if is_first():
            item, key = problems.items[number], problems.keys[number]
            rewards = score([Task(problems.domains[number], answer_text(one), item) for one in of_one])
            scored = zip(of_one, rewards, strict=True)
            levels.add(key, [value_of(one, reward.value, truncated) for one, reward in scored])
        finished += 1
        progress(finished, len(problems))
