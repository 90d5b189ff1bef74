"""What the packaged tiny model can do, on all held-out digits, through the engine that answers everybody.

python -m tools.score_tiny [DIRECTORY]
"""

import argparse
import dataclasses
import itertools
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rich.console

from glm4v_jax.generate.engine import Engine
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.tiny import TINY_CHECKPOINT
from glm4v_jax.tiny.digits import NUM_FRAMES, NUM_HELD_OUT, TASKS, Example, Split, Task, examples
from tools.digit_scores import Row, constant_box, majority_direction, nearest_neighbour, score, table

AIMS: dict[Task, float] = {"reading": 0.95, "grounding1": 0.85, "grounding2": 0.6, "motion": 0.95}
NAMES: dict[Task, str] = {
    "reading": "reading",
    "grounding1": "grounding, one digit",
    "grounding2": "grounding, two digits",
    "motion": "motion",
}
NEW_TOKENS = 48
"""More than any answer has."""
SLOTS = 16


def answers(engine: Engine, questions: Sequence[Example], *, flat: bool = False) -> list[str]:
    """The answers to questions, greedy, in their order; `flat`: of `flattened` prompts."""
    prompts = [engine.prompt(example.prompt) for example in questions]
    if flat:
        prompts = [flattened(prompt) for prompt in prompts]
    found = [""] * len(prompts)
    for completion in engine.generate_many(prompts, do_sample=False, max_new_tokens=NEW_TOKENS):
        found[completion.index] = completion.text
    return found


def flattened(prompt: Prompt) -> Prompt:
    """A prompt with its tokens in one line: M-RoPE no longer says where in an image or when in a video one is."""
    positions = np.broadcast_to(np.arange(len(prompt), dtype=np.int32), (3, len(prompt)))
    return dataclasses.replace(prompt, position_ids=positions)


def shuffled_frames(example: Example, seed: int = 0) -> Example:
    """An example of motion with its frames in any other order: what is left of it without time."""
    user, assistant = example.messages
    item, question = user["content"]
    orders = [order for order in itertools.permutations(range(NUM_FRAMES)) if order != tuple(range(NUM_FRAMES))]
    order = orders[np.random.default_rng(seed).integers(len(orders))]
    changed = {**item, "video": [item["video"][index] for index in order]}
    return example._replace(messages=({**user, "content": [changed, question]}, assistant))


def baseline(task: Task, truth: Sequence[Example]) -> float:
    """A task's accuracy without the model: nearest neighbour, one box for all, or the most frequent direction."""
    if task == "reading":
        return nearest_neighbour()
    if task == "motion":
        return majority_direction(truth).accuracy
    return constant_box(task, truth).accuracy


def measure(engine: Engine, split: Split = "held-out", count: int = NUM_HELD_OUT) -> list[Row]:
    """The rows of the table, of `count` questions each: every task, and the tasks again without what they need.

    The split "validation" is for choosing between trainings.
    """
    rows, ablated = [], []
    for task in TASKS:
        truth = list(examples(task, split, count))
        rows.append(Row(NAMES[task], score(answers(engine, truth), truth), AIMS[task], baseline(task, truth)))
        name = NAMES[task]
        if task == "motion":
            changed = [shuffled_frames(example, number) for number, example in enumerate(truth)]
            ablated.append(Row(f"{name}, frames shuffled", score(answers(engine, changed), truth)))
        if task != "reading":
            ablated.append(Row(f"{name}, positions flat", score(answers(engine, truth, flat=True), truth)))
    return rows + ablated


def missed(rows: Sequence[Row]) -> list[str]:
    """What of the aims is not reached, one line each."""
    return [
        f"{row.name}: found accuracy {row.scores.accuracy:.1%} and format {row.scores.format:.1%}; expected at least "
        f"{row.aim:.0%} and 100%"
        for row in rows
        if row.aim is not None and (row.scores.accuracy < row.aim or row.scores.format < 1)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.score_tiny", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=TINY_CHECKPOINT, help="of the checkpoint")
    parser.add_argument("--split", choices=typing.get_args(Split), default="held-out")
    parser.add_argument("--count", type=int, default=NUM_HELD_OUT, help="questions of each task")
    arguments = parser.parse_args()
    engine = Engine.from_pretrained(arguments.directory, num_slots=SLOTS)
    rows = measure(engine, arguments.split, arguments.count)
    console = rich.console.Console()
    console.print(table(rows), markup=False, soft_wrap=True)
    for line in missed(rows):
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
