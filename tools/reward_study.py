"""Does learning by reward teach the packaged tiny model what it was never taught? `make rl`.

The jobs are those of a user: problems in files, a TOML file with [rl], `glm4v train`. What they learn is measured on
digits that no training has seen (`leftmost_digits`), beside controls that must not learn it:

- learning rate 0: nothing changes;
- rewards of another group: what is paid for has nothing to do with the answer;
- any box is paid: a verifier that does not look at what is in it. No job file can say so: the test at the start refuses
  such a verifier. The controls enter by `learn(control=)`.

With --all it also compares the curriculum with uniform draws, at equal numbers of answers, and writes the page.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import rich.console
from orbax.checkpoint import v1 as ocp

from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.compilation_cache import use_compilation_cache
from glm4v_jax.devices.mesh import current_mesh, use_mesh
from glm4v_jax.errors import Glm4vError
from glm4v_jax.generate.engine import Engine
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.model.runtime import Runtime
from glm4v_jax.tiny import TINY_CHECKPOINT
from tools.digit_scores import score
from tools.leftmost_digits import TIERS, Tier, questions, write_problems
from tools.reward_page import (
    ANY,
    DATA,
    LEARNS,
    OTHERS,
    STILL,
    UNIFORM,
    Measured,
    Run,
    Step,
    Study,
    compared,
    missed,
    paid,
    table,
    verdict,
    write,
)
from tools.score_tiny import answers
from train.checkpoints import abstract
from train.commands import main as train_command
from train.config import MODEL, load_config
from train.log import METRICS, read_log
from train.output import CHECKPOINTS
from train.rl.handover import Handover
from train.rl.judging import Task
from train.rl.loop import Control, learn
from train.rl.verifiers import Reward
from train.state import Layout, Leaves, split

SAMPLES, UPDATES, TEMPERATURE = 8, 2, 1.5
JOB = """\
model = {model}
out = "out"
steps = {steps}
freeze = []
dtype = "float32"
remat = "none"
mesh = "data=1"
seed = {seed}

[data]
files = ["problems.jsonl"]

[batch]
rows = {rows}
length = 128
vision_rows = 4
vision_length = 64

[optimizer]
learning_rate = 5e-4
schedule = "constant"
warmup = 0.0
b2 = 0.98
{optimizer}

[checkpoint]
every = {every}
keep = 100

[rl]
prompts = {prompts}
samples = {samples}
updates = {updates}
min_groups = {least}
truncated = "zero"

[rl.sampling]
slots = 32
think_budget = 8
answer_budget = 12
temperature = {temperature}

[rl.curriculum]
mode = "{mode}"
expansion_most = 2.0

[rl.verifiers]
{verifiers}
"""


class Size(NamedTuple):
    """How large a run is.

    steps, every, prompts, rows: of the job.
    problems: of each tier.
    held_out: questions of each tier that are asked after the training.
    """

    steps: int = 17
    every: int = 6
    prompts: int = 16
    rows: int = 16
    problems: tuple[int, ...] = (200, 200, 200, 600)
    held_out: int = 120

    @property
    def settings(self) -> str:
        """The job in words."""
        return (
            f"{self.steps} steps of up to {self.prompts} groups of {SAMPLES} answers that are learned from, {UPDATES} "
            f"updates a step and none from fewer than\n  {self.least} groups, clipped at 0.2 and 0.28, AdamW at 5e-4 "
            f"with b2 = 0.98. Answers are sampled at temperature {TEMPERATURE:g}, and\n  those that are cut, at 20 "
            "tokens, have no reward"
        )

    @property
    def least(self) -> int:
        """Groups that an update needs."""
        return max(self.prompts // 4, 1)


QUICK = Size(steps=2, every=1, prompts=2, rows=4, problems=(3, 3, 3, 3), held_out=2)


def other_groups(tasks: Sequence[Task], rewards: Sequence[Reward]) -> Sequence[Reward]:
    """Give each group the rewards of the next one."""
    del tasks
    return [*rewards[SAMPLES:], *rewards[:SAMPLES]]


def any_box(tasks: Sequence[Task], rewards: Sequence[Reward]) -> Sequence[Reward]:
    """Pay for every answer in a box, right or wrong."""
    del tasks
    right = Reward(1.0, None, "right")
    return [right if one.reason in ("right", "partly", "wrong", "unreadable") else one for one in rewards]


class Arm(NamedTuple):
    """What is compared.

    mode: of the curriculum.
    optimizer: further lines of the job.
    control: gives other rewards than the verifiers.
    """

    mode: str = "rlcs"
    optimizer: str = ""
    control: Control | None = None


ARMS = {
    LEARNS: Arm(),
    UNIFORM: Arm(mode="uniform"),
    STILL: Arm(optimizer="group_learning_rates = { vision = 0, merger = 0, llm = 0 }"),
    OTHERS: Arm(control=other_groups),
    ANY: Arm(control=any_box),
}
SHORT = [(LEARNS, 0), (LEARNS, 1), (STILL, 0), (OTHERS, 0), (ANY, 0)]
"""(arm, seed) of `make rl`."""
ALL = [*SHORT, (LEARNS, 2), *((UNIFORM, seed) for seed in range(3))]


def write_job(directory: Path, arm: Arm, seed: int, size: Size) -> Path:
    """Write the problems and the file of a job; return the path of the latter."""
    write_problems(directory, dict(zip(TIERS, size.problems, strict=True)), seed)
    text = JOB.format(
        model=json.dumps(str(TINY_CHECKPOINT)), steps=size.steps, seed=seed, optimizer=arm.optimizer, every=size.every,
        prompts=size.prompts, rows=size.rows, samples=SAMPLES, updates=UPDATES, least=size.least, mode=arm.mode,
        temperature=TEMPERATURE,
        verifiers="\n".join(f'{tier} = {{ kind = "counting" }}' for tier in TIERS),
    )  # fmt: skip
    path = directory / "job.toml"
    path.write_text(text, encoding="utf-8")
    return path


class Measure:
    """Asks checkpoints about held-out digits, greedily; compiled once for all of them."""

    def __init__(self, count: int):
        """Load the packaged model.

        Args:
          count: questions of each tier.
        """
        self._questions = {tier: questions(tier, "held-out", count) for tier in TIERS}
        params, layout = _params(TINY_CHECKPOINT)
        self._like = abstract(params)
        mesh = current_mesh()
        self._handover = Handover(layout, params, {}, jnp.float32, mesh)
        runtime = Runtime.of(self._handover(params), mesh, GenerationConfig.from_pretrained(TINY_CHECKPOINT))
        self._engine = Engine(runtime, Glm4vProcessor.from_pretrained(TINY_CHECKPOINT), num_slots=32)
        self.base = self(params)

    def __call__(self, params: Leaves) -> dict[Tier, float]:
        """Return the accuracy of each tier."""
        self._engine.update(self._handover(params))
        return {tier: score(answers(self._engine, asked), asked).accuracy for tier, asked in self._questions.items()}

    def curve(self, out: Path, steps: Sequence[Step]) -> Iterator[Measured]:
        """Measure what a job has kept, and its result, whose weights are rounded as those that it began with."""
        yield Measured(0, self.base)
        context = ocp.Context()
        context.pytree.loading.partial_load = True  # without the optimizer's state
        after = {step.updates: step.rollouts for step in reversed(steps)}  # of equal ones the first
        numbers = sorted(int(path.name) for path in (out / CHECKPOINTS).iterdir() if path.name.isdigit())
        for number in numbers[:-1]:
            with context:
                found = ocp.load_checkpointables(out / CHECKPOINTS / str(number), {"state": {"params": self._like}})
            yield Measured(after[number], self(found["state"]["params"]))
        yield Measured(steps[-1].rollouts, self(_params(out / MODEL)[0]))


def _params(directory: Path) -> tuple[Leaves, Layout]:
    """The parameters of a checkpoint as a training has them."""
    with use_mesh():
        model = load_model(directory, Glm4vConfig.from_pretrained(directory), dtype="float32", stacked=True)
        return split(model, lambda path: True)[0], Layout.of(model)


def run(directory: Path, name: str, seed: int, size: Size, measure: Measure) -> Run:
    """Take a run, unless it has been taken: one that is complete is read from its directory."""
    arm = ARMS[name]
    job = write_job(directory, arm, seed, size)
    digest = hashlib.blake2b(f"{job.read_text(encoding='utf-8')}{size}".encode(), digest_size=8).hexdigest()
    done = directory / "run.json"
    if done.is_file() and (found := json.loads(done.read_text(encoding="utf-8")))["job"] == digest:
        return Run.of(found["run"])
    shutil.rmtree(directory / "out", ignore_errors=True)  # of a part of a run nobody would know the seconds
    before = time.process_time()
    if arm.control is None:
        if status := train_command([str(job)]):
            sys.exit(status)
    else:
        learn(load_config(job), log=lambda line: print(line, file=sys.stderr), control=arm.control)
    seconds = time.process_time() - before
    if not (directory / "out" / MODEL).is_dir():  # asked to stop, by SIGTERM
        sys.exit(f"{directory}: stopped; the same command with --out takes the runs that are missing")
    steps = list(_steps(directory / "out"))
    curve = tuple(measure.curve(directory / "out", steps))
    result = Run(name, seed, seconds, tuple(steps), curve)
    done.write_text(json.dumps({"job": digest, "run": result.as_json()}), encoding="utf-8")
    return result


def _steps(out: Path) -> Iterator[Step]:
    rollouts = updates = 0
    for line in read_log(out / METRICS):
        rollouts += round(line["groups"]) * SAMPLES
        updates += max(round(line["updates"]), 1)
        yield Step(rollouts, updates, line["reward"], line["valid"])


def main(given: Sequence[str] | None = None) -> None:
    """Learn, measure, report; the exit status is 1 if an aim is missed."""
    parser = argparse.ArgumentParser(prog="python -m tools.reward_study", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="keep the runs in this directory, and take only those that it lacks")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--all", action="store_true", help="compare the curriculum with uniform draws; write the page")
    extent.add_argument("--quick", action="store_true", help="two steps of one run: it works, and shows nothing")
    parser.add_argument("--data", type=Path, default=DATA, help="where the figures of --all go")
    arguments = parser.parse_args(given)
    console = rich.console.Console()
    use_compilation_cache()
    size = QUICK if arguments.quick else Size()
    wanted = ALL if arguments.all else SHORT
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        try:
            measure = Measure(size.held_out)
            runs = [
                run(out / f"{name}-{seed}".replace(",", "").replace(" ", "_"), name, seed, size, measure)
                for name, seed in (wanted[:1] if arguments.quick else wanted)
            ]
        except Glm4vError as error:
            sys.exit(f"error: {error}")
    shown = [table(runs), *([paid(runs)] if any(one.arm == ANY for one in runs) else [])]
    shown += [compared(runs), verdict(runs)] if arguments.all else []
    console.print("\n\n".join(shown), markup=False, soft_wrap=True)
    if arguments.all:
        study = Study(size.settings, size.held_out, tuple(runs))
        arguments.data.write_text(study.as_json(), encoding="utf-8")
        write(arguments.data)
    if not arguments.quick and (problems := missed(runs)):
        sys.exit("\n".join(["error: an aim is missed", *problems]))


if __name__ == "__main__":
    main()
