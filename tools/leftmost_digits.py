"""A task that the packaged tiny model was never taught: which of one, two or three digits is leftmost.

Images of 112 x 112 pixels, digits side by side. The others differ from the leftmost one, so that the answer tells which
was read. "reading", which the model has learned, stands beside it: what becomes of the known while it learns the new?
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import PIL.Image

from glm4v_jax.tiny.digits import GROUNDING_SIZE, Example, Split, digits, examples, put_digit

Tier = Literal["left1", "left2", "left3", "reading"]
TIERS: tuple[Tier, ...] = get_args(Tier)
"""leftN: the leftmost of N digits."""
NEW = TIERS[:3]
"""What was never taught."""

QUESTION = "What digit is leftmost?"
_SIZES = {1: (40, 57), 2: (38, 53), 3: (32, 38)}
"""Number of digits -> their smallest size in pixels, and one more than their largest."""


def questions(tier: Tier, split: Split, count: int, seed: int = 0) -> list[Example]:
    """Return questions of a tier; the digits of the split are the leftmost in a new random order again and again."""
    if tier == "reading":
        return list(examples("reading", split, count, seed))
    number, total = int(tier.removeprefix("left")), len(digits(split).labels)
    draw = np.random.default_rng([seed, number, split == "train"])
    order = np.concatenate([draw.permutation(total) for _ in range(-(-count // total))])[:count]
    return [_question(f"{tier}/{split}:{place}", split, int(first), number, draw) for place, first in enumerate(order)]


def write_problems(directory: Path, counts: Mapping[Tier, int], seed: int) -> Path:
    """Write problems for a job with `rl`: images, and problems.jsonl with a domain for each tier.

    Returns:
      The path of problems.jsonl.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for tier, count in counts.items():
        for number, example in enumerate(questions(tier, "train", count, seed)):
            name = f"{tier}-{number}.png"
            example.media.save(directory / name)
            item, question = example.messages[0]["content"]
            messages = [{"role": "user", "content": [{**item, "image": name}, question]}]
            rows.append({"messages": messages, "answer": example.answer, "domain": tier, "key": example.source})
    path = directory / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _question(source: str, split: Split, first: int, number: int, draw: np.random.Generator) -> Example:
    data = digits(split)
    others = np.flatnonzero(data.labels != data.labels[first])
    chosen = [first, *draw.choice(others, number - 1, replace=False).tolist()]
    sizes = draw.integers(*_SIZES[number], number)
    gaps = np.sort(draw.integers(0, GROUNDING_SIZE - sizes.sum() + 1, number))  # left of each, all together
    lefts = gaps + np.cumsum(sizes) - sizes
    canvas = np.zeros((GROUNDING_SIZE, GROUNDING_SIZE), np.uint8)
    for index, size, left in zip(chosen, sizes.tolist(), lefts.tolist(), strict=True):
        put_digit(canvas, data.pixels[index], size, left, int(draw.integers(0, GROUNDING_SIZE - size + 1)))
    image = {"type": "image", "image": PIL.Image.fromarray(canvas).convert("RGB")}
    message = {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}
    return Example((message,), str(data.labels[first]), (), source)
