"""What is said about the packaged tiny model: its figures as JSON, and with what they mean as Markdown."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.digit_scores import Row, table

_TEXT = """\
# The tiny model of the package

`glm4v_jax.tiny.TINY_CHECKPOINT`, which answers wherever no other model is named, has the shape of GLM-4.1V (ViT,
merger, decoder with M-RoPE, the released chat template and processors) and 1.3 million parameters, {size:.1f} MB in
bfloat16 with its tokenizer. `make tiny` trains it from random weights with the training loop of `train`, as any job,
and writes this page.

It knows handwritten digits and nothing else. Three questions about them, in these words, are what it has learned:

- "What digit is this?" about an image of 84 x 84 pixels with one digit;
- "Locate the 7." about one of 112 x 112 with one digit or two, answered with a box from 0 to 1000;
- "Which way does it move?" about four frames of 56 x 56.

Asked anything else, it says something that means nothing.

## Figures

On {count} held-out digits a task, greedy, through the engine and the parser of thoughts and boxes that every model
gets:

{table}

- The digits are those of scikit-learn's `load_digits`, by 13 writers. The data do not name them, so that *every
  writer is on both sides*: these are new digits by known hands.
- accuracy of grounding is Acc@0.5: one box, of the digit that is asked for, with an IoU of at least 0.5. "wrong
  object" is the share of answers that box the other digit. Who ignores which digit is asked for gets at most half of
  two digits right.
- baselines: the nearest training digit in the 8 x 8 pixels that the images are made of (pixels that the model never
  sees at that size, and in their place); the box that is right most often in training; the most frequent direction.
- "frames shuffled" are the videos of motion in any order but theirs: what is left is what the frames say without
  time.
- "positions flat" are the prompts with all tokens in one line, as in a model without M-RoPE. The ViT has positions of
  its own, so that the decoder is not blind to where things are; and the frames of a video keep their order in the line,
  which is all that motion takes.

{steps} steps in {training:.0f} s and {measuring:.0f} s for the figures, on two cores of a CPU; seed {seed}. The same
seed gives the same digits in the same order, and on one machine the same model; another machine rounds differently,
and after so many steps ends elsewhere, about as good.
"""


class Run(NamedTuple):
    """How the model was made.

    steps, seed: of the training.
    weights: SHA-256 of the checkpoint's weights, whose figures these are.
    size: of the checkpoint, in bytes.
    seconds: that "training" and "measuring" took.
    """

    steps: int
    seed: int
    weights: str
    size: int
    seconds: Mapping[str, float]


def as_json(run: Run, rows: Sequence[Row]) -> str:
    """The figures."""
    found = [row._asdict() | {"scores": dataclasses.asdict(row.scores)} for row in rows]
    return json.dumps(run._asdict() | {"rows": found}, indent=2) + "\n"


def as_markdown(run: Run, rows: Sequence[Row]) -> str:
    """The page about them."""
    return _TEXT.format(
        size=run.size / 1e6, count=rows[0].scores.count, table=table(rows), steps=run.steps, seed=run.seed,
        training=run.seconds["training"], measuring=run.seconds["measuring"],
    )  # fmt: skip
