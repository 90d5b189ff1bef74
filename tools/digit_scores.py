"""How well answers about digits are, and how well they would be without a model.

Answers are read as every answer of the model is: `generate.text.thinking` finds the box, `generate.text.boxes` the
coordinates.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bench.report import Table
from eval.metrics.boxes import IOU, iou
from glm4v_jax.errors import DataError
from glm4v_jax.generate.text.boxes import find_boxes
from glm4v_jax.generate.text.thinking import ANSWER, BOX, END_ANSWER, END_BOX, END_THINK, THINK, is_well_formed, parse
from glm4v_jax.tiny.digits import DIRECTIONS, Example, Task, digits, examples


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of the answers to the examples of one task, shares from 0 to 1.

    Attributes:
        count: how many answers.
        accuracy: of reading and motion, answers that are right; of grounding, Acc@0.5: one box, that of the digit
            asked for, with an IoU of at least 0.5.
        format: answers of the form `<think>...</think><answer>...</answer>` with exactly one thing in a box.
        wrong_object: of grounding with two digits, answers that box the other one; None elsewhere.
        mean_iou: of grounding, with the box of the digit asked for, 0 where there is not exactly one; None elsewhere.
    """

    count: int
    accuracy: float
    format: float
    wrong_object: float | None = None
    mean_iou: float | None = None


def is_in_format(text: str) -> bool:
    """Whether a generated text is a thought and an answer with one box; the end token `</answer>` may lack."""
    closed = text if parse(text).is_answer_closed else f"{text}{END_ANSWER}"
    return is_well_formed(closed) and len(parse(text).boxed) == 1


def score(answers: Sequence[str], truth: Sequence[Example]) -> Scores:
    """The scores of generated texts, tags included, by examples of one task; DataError if there are none, or others."""
    if len(answers) != len(truth) or not truth:
        raise DataError(f"answers: found {len(answers)}, expected one for each of {len(truth)} examples, at least one")
    in_format = float(np.mean([is_in_format(answer) for answer in answers]))
    if not truth[0].boxes:
        right = [_boxed(answer) == example.answer for answer, example in zip(answers, truth, strict=True)]
        return Scores(len(answers), float(np.mean(right)), in_format)
    found = [find_boxes(answer) for answer in answers]
    overlaps = [_overlaps(boxes, example) for boxes, example in zip(found, truth, strict=True)]
    wrong = [max(other, default=0.0) >= IOU for _, *other in overlaps]
    return Scores(
        len(answers),
        accuracy=float(np.mean([named >= IOU for named, *_ in overlaps])),
        format=in_format,
        wrong_object=float(np.mean(wrong)) if len(truth[0].boxes) > 1 else None,
        mean_iou=float(np.mean([named for named, *_ in overlaps])),
    )


class Row(NamedTuple):
    """A row of `table`; aim and baseline, which is without a model, are accuracies, None where there is none."""

    name: str
    scores: Scores
    aim: float | None = None
    baseline: float | None = None


def nearest_neighbour() -> float:
    """Accuracy of reading by the nearest training digit, in the 8 x 8 pixels from which the images are made."""
    known, asked = digits("train"), digits("held-out")
    inks, others = (d.pixels.reshape(len(d.labels), -1).astype(np.int64) for d in (asked, known))
    # |a - b|^2 less |a|^2, which is the same for all neighbours.
    distances = (others**2).sum(axis=1) - 2 * inks @ others.T
    return float(np.mean(known.labels[distances.argmin(axis=1)] == asked.labels))


def constant_box(task: Task, truth: Sequence[Example]) -> Scores:
    """Grounding by one box whatever the image shows: the training box that is right most often in training.

    Not the mean box: with two digits in an image that is between them and never right.
    """
    known = [example.boxes[0] for example in examples(task, "train", 1000)]
    hits = [sum(iou(box, other) >= IOU for other in known) for box in known[:100]]
    best = known[int(np.argmax(hits))]
    return score([_said(f"[[{','.join(map(str, best))}]]")] * len(truth), truth)


def majority_direction(truth: Sequence[Example]) -> Scores:
    """Motion by the most frequent direction of training examples."""
    known = [example.answer for example in examples("motion", "train", 2000)]
    return score([_said(max(DIRECTIONS, key=known.count))] * len(truth), truth)


def table(rows: Sequence[Row]) -> str:
    """Results in Markdown, a line a row."""
    cells = [
        (
            name, *map(_percent, (scores.accuracy, aim, baseline, scores.wrong_object)),
            "" if scores.mean_iou is None else f"{scores.mean_iou:.2f}", _percent(scores.format), scores.count,
        )
        for name, scores, aim, baseline in rows
    ]  # fmt: skip
    columns = ("task", "accuracy", "aim", "baseline", "wrong object", "mean IoU", "format", "n")
    return str(Table("", columns, cells))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _said(answer: str) -> str:
    return f"{THINK}{END_THINK}{ANSWER}{BOX}{answer}{END_BOX}{END_ANSWER}"


def _boxed(answer: str) -> str | None:
    """What stands in the answer's box; None where there is not exactly one."""
    boxed = parse(answer).boxed
    return boxed[0] if len(boxed) == 1 else None


def _overlaps(boxes: Sequence[Sequence[float]], example: Example) -> list[float]:
    """IoU of the one box found with each box of the example; zeros where there is not exactly one."""
    if len(boxes) != 1:
        return [0.0] * len(example.boxes)
    return [iou(boxes[0], box) for box in example.boxes]
