"""Questions about real handwritten digits, read, located, and seen moving: what the packaged tiny model is about.

The digits are those of scikit-learn's `load_digits`: 1,797 images of 8 x 8 pixels by 13 writers (the test set of
UCI's "Optical Recognition of Handwritten Digits"). 1,293 of them are for training, 144 for choosing between trainings,
360 are held out. The split is by image and not by writer, which the data does not name: *every writer is on all
sides*, so what is measured is new images of known hands.

Images are made of them at sizes that the released processor takes as they are, so that nothing is resized again:

- reading, 84 x 84: one digit; "What digit is this?"
- grounding, 112 x 112: one digit, or two different ones side by side or above one another; "Locate the 7." The answer
  is the box of the digit's ink.
- motion, 4 frames of 56 x 56: a digit that moves; "Which way does it move?"

Everything follows from the split, the task and the seed. The digits come with scikit-learn (the `demo` extra), which is
imported when they are asked for.
"""

import functools
import itertools
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image

from glm4v_jax.errors import DataError
from glm4v_jax.generate.text.thinking import ANSWER, BOX, END_ANSWER, END_BOX, END_THINK, THINK

Task = Literal["reading", "grounding1", "grounding2", "motion"]
Split = Literal["train", "validation", "held-out"]

TASKS: tuple[Task, ...] = ("reading", "grounding1", "grounding2", "motion")
"""`grounding1` and `grounding2` differ in how many digits an image has."""

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Name -> step along x and y, y pointing down as in images."""

NUM_TRAIN, NUM_VALIDATION, NUM_HELD_OUT = 1293, 144, 360
READING_SIZE, GROUNDING_SIZE, MOTION_SIZE = 84, 112, 56
NUM_FRAMES, FRAMES_PER_SECOND = 4, 2.0
STEP = 10
"""Coordinates are multiples of this, of 1,000: about a pixel of the images. So there are few different numbers."""

_SPLIT_SEED = 6
_INK = 4
"""Of 16: fainter pixels at a digit's rim are not counted to its box."""

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 from 0 to 1000."""


class Example(NamedTuple):
    """A question with its answer.

    messages: the user's with an image or a video, and the assistant's, as the chat template takes them.
    answer: what is to be in the answer's box: "7", "left", "[[120,340,560,780]]".
    boxes: of grounding, the box of the digit that is asked for, then those of the others; otherwise none.
    source: which one it is: "digits/reading/held-out:0".
    """

    messages: tuple[dict[str, Any], ...]
    answer: str
    boxes: tuple[Box, ...]
    source: str

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The question alone."""
        return [dict(self.messages[0])]

    @property
    def media(self) -> Any:
        """What is shown: an image, or the list of a video's frames uint8 [H, W, 3]."""
        item = self.messages[0]["content"][0]
        return item[item["type"]]


class Digits(NamedTuple):
    """N digits: pixels uint8 [N, 8, 8] from 0 to 16, labels int64 [N]."""

    pixels: np.ndarray
    labels: np.ndarray


@functools.cache
def digits(split: Split) -> Digits:
    """The digits of a side of the split.

    Raises:
        DataError: scikit-learn is not installed, or the split is unknown.
    """
    if split not in (known := typing.get_args(Split)):
        raise DataError(f"split: found {split!r}; expected one of {', '.join(known)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: found no scikit-learn; expected it: pip install scikit-learn") from error
    data = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(NUM_TRAIN + NUM_VALIDATION + NUM_HELD_OUT)
    parts = np.split(order, [NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION])
    chosen = parts[known.index(split)]
    return Digits(data.images[chosen].astype(np.uint8), data.target[chosen])


def examples(task: Task, split: Split, count: int, seed: int = 0) -> Iterator[Example]:
    """`count` questions of a task; digits of the split are taken in a new random order again and again.

    Raises:
        DataError: the task or the split is unknown, or scikit-learn is not installed.
    """
    _check_task(task)
    return _generated(task, split, len(digits(split).labels), count, seed)


def make_example(task: Task, split: Split, index: int, draw: np.random.Generator, source: str) -> Example:
    """The question about one digit of a split; all else of it is drawn.

    Raises:
        DataError: the task or the split is unknown, or scikit-learn is not installed.
    """
    _check_task(task)
    make = {"reading": _reading, "grounding1": _grounding_one, "grounding2": _grounding_two, "motion": _motion}[task]
    return make(digits(split), index, draw, source)


def held_out(task: Task) -> list[Example]:
    """Every held-out digit once, the same examples in every run; of two digits it is the one that is asked for.

    Raises:
        DataError: the task is unknown, or scikit-learn is not installed.
    """
    return list(examples(task, "held-out", NUM_HELD_OUT, seed=0))


def put_digit(canvas: np.ndarray, pixels: np.ndarray, size: int, left: int, top: int) -> None:
    """Draw a digit, uint8 [8, 8] from 0 to 16, into a canvas uint8 [H, W] as a square, light on what is dark."""
    tile = PIL.Image.fromarray((pixels.astype(np.float32) * (255 / 16)).round().astype(np.uint8))
    there = canvas[top : top + size, left : left + size]
    np.maximum(there, np.asarray(tile.resize((size, size), PIL.Image.Resampling.BILINEAR)), out=there)


def _check_task(task: Task) -> None:
    if task not in TASKS:
        raise DataError(f"task: found {task!r}; expected one of {', '.join(TASKS)}")


def _generated(task: Task, split: Split, num_digits: int, count: int, seed: int) -> Iterator[Example]:
    draw = np.random.default_rng([seed, TASKS.index(task), split == "train"])
    rounds = (index for _ in itertools.count() for index in draw.permutation(num_digits))
    for number, index in enumerate(itertools.islice(rounds, count)):
        yield make_example(task, split, int(index), draw, f"digits/{task}/{split}:{number}")


def _reading(data: Digits, index: int, draw: np.random.Generator, source: str) -> Example:
    size = int(draw.integers(44, 73))
    left, top = draw.integers(0, READING_SIZE - size + 1, 2)
    canvas = np.zeros((READING_SIZE, READING_SIZE), np.uint8)
    put_digit(canvas, data.pixels[index], size, int(left), int(top))
    label = str(data.labels[index])
    return _example({"type": "image", "image": _rgb(canvas)}, "What digit is this?", "One digit.", label, (), source)


def _grounding_one(data: Digits, index: int, draw: np.random.Generator, source: str) -> Example:
    return _grounding(data, [index], draw, source)


def _grounding_two(data: Digits, index: int, draw: np.random.Generator, source: str) -> Example:
    others = np.flatnonzero(data.labels != data.labels[index])
    return _grounding(data, [index, int(draw.choice(others))], draw, source)


def _grounding(data: Digits, indices: list[int], draw: np.random.Generator, source: str) -> Example:
    sizes = [int(size) for size in draw.integers(40, 57, len(indices))]
    corners = _apart(sizes, draw)
    canvas = np.zeros((GROUNDING_SIZE, GROUNDING_SIZE), np.uint8)
    boxes = []
    for index, size, (left, top) in zip(indices, sizes, corners, strict=True):
        put_digit(canvas, data.pixels[index], size, left, top)
        boxes.append(_box(data.pixels[index], size, left, top))
    labels = [str(label) for label in data.labels[indices]]
    answer = f"[[{','.join(map(str, boxes[0]))}]]"
    thought = f"Only {labels[0]}." if len(labels) == 1 else _which(labels, boxes)
    return _example(
        {"type": "image", "image": _rgb(canvas)}, f"Locate the {labels[0]}.", thought, answer, tuple(boxes), source
    )


def _which(labels: list[str], boxes: list[Box]) -> str:
    """What is where, and then once more the first, which is asked for: "3 left, 7 right: 7 right.".

    Said in this way, its place is what followed it a moment ago, and nothing has to be compared.
    """
    (x, y), (other_x, other_y) = (((x1 + x2) // 2, (y1 + y2) // 2) for x1, y1, x2, y2 in boxes)
    is_beside = abs(x - other_x) >= abs(y - other_y)
    first, second = ("left", "right") if is_beside else ("top", "bottom")
    if (x < other_x) if is_beside else (y < other_y):
        return f"{labels[0]} {first}, {labels[1]} {second}: {labels[0]} {first}."
    return f"{labels[1]} {first}, {labels[0]} {second}: {labels[0]} {second}."


def _motion(data: Digits, index: int, draw: np.random.Generator, source: str) -> Example:
    size, pace = int(draw.integers(20, 29)), int(draw.integers(3, 6))
    name = list(DIRECTIONS)[draw.integers(len(DIRECTIONS))]
    travel = pace * (NUM_FRAMES - 1)
    # The path has its middle anywhere, whatever the direction: the digit's position in one frame says little about it.
    middle = draw.integers(0, MOTION_SIZE - size - travel + 1, 2).tolist()
    start = [at + travel * (1 - step) // 2 for at, step in zip(middle, DIRECTIONS[name], strict=True)]
    frames = []
    for number in range(NUM_FRAMES):
        left, top = (at + step * pace * number for at, step in zip(start, DIRECTIONS[name], strict=True))
        frame = np.zeros((MOTION_SIZE, MOTION_SIZE), np.uint8)
        put_digit(frame, data.pixels[index], size, left, top)
        frames.append(np.asarray(_rgb(frame)))
    item = {"type": "video", "video": frames, "fps": FRAMES_PER_SECOND}
    return _example(item, "Which way does it move?", "It moves.", name, (), source)


def _apart(sizes: list[int], draw: np.random.Generator) -> list[tuple[int, int]]:
    """(left, top) of squares of these sizes that do not overlap, anywhere in an image of grounding."""
    while True:
        drawn = [draw.integers(0, GROUNDING_SIZE - size + 1, 2) for size in sizes]
        corners = [(int(left), int(top)) for left, top in drawn]
        if len(sizes) == 1:
            return corners
        (one, other), (size, other_size) = corners, sizes
        if any(a + size <= b or b + other_size <= a for a, b in zip(one, other, strict=True)):
            return corners


def _box(pixels: np.ndarray, size: int, left: int, top: int) -> Box:
    """The box of a digit's ink in multiples of `STEP`; 1000 becomes 990, so that no number has four digits."""
    edges = []
    for axis in (0, 1):
        is_ink = np.flatnonzero((pixels >= _INK).any(axis=axis))
        edges.append((is_ink[0], is_ink[-1] + 1))
    (x1, x2), (y1, y2) = edges
    pixel_edges = (left + x1 * size / 8, top + y1 * size / 8, left + x2 * size / 8, top + y2 * size / 8)
    scaled = [min(round(edge / GROUNDING_SIZE * 1000 / STEP) * STEP, 1000 - STEP) for edge in pixel_edges]
    return scaled[0], scaled[1], scaled[2], scaled[3]


def _rgb(canvas: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(canvas).convert("RGB")


def _example(
    item: dict[str, Any], question: str, thought: str, answer: str, boxes: tuple[Box, ...], source: str
) -> Example:
    said = f"{THINK}{thought}{END_THINK}{ANSWER}{BOX}{answer}{END_BOX}{END_ANSWER}"
    messages = (
        {"role": "user", "content": [item, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
    )
    return Example(messages, answer, boxes, source)
