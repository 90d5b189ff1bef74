"""The pass rate of a checkpoint on each problem, before a training: `glm4v train levels`. Resumes where it stopped."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm4v_jax.devices.distributed import agree, is_first
from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.engine import Engine, Request
from train.rl.judging import Task
from train.rl.levels import Levels
from train.rl.problems import Problems
from train.rl.rollouts import answer_text, seed_of, value_of
from train.rl.verifiers import Reward


def measure(
    levels: Levels,
    problems: Problems,
    engine: Engine,
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
