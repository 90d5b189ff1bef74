"""Fifteen prompts of every kind, and what `Engine` answers to them."""

import functools
import itertools

import numpy as np
import PIL.Image
from helpers_media import package_file

NEW_TOKENS = 24
PHOTOGRAPHS = [(451, 300), (300, 200), (240, 320), (150, 400)]
OTHER_PHOTOGRAPHS = [(430, 310), (290, 210), (230, 330), (160, 390)]
"""Width and height; those of the same place take the same shape of the ViT's program."""


def prompts(photographs=tuple(PHOTOGRAPHS)):
    """Messages of a user: a text, six images of digits, photographs, a prompt of two images, three videos."""
    from glm4v_jax.tiny.digits import held_out

    photos = [{"type": "image", "image": photograph(*size)} for size in photographs]
    digits = [example.prompt for task in ("reading", "grounding1", "grounding2") for example in held_out(task)[:2]]
    first, second = (found[0]["content"][0] for found in digits[:2])
    return [
        said("Which digits do you know?"),
        *digits,
        *(said("What is in this picture?", photo) for photo in photos),
        said("Which of them is larger?", first, second),
        *(example.prompt for example in held_out("motion")[:2]),
        said("Which way does it move?", {"type": "video", "video": _moving(10, 112, 84), "fps": 2.0}),
    ]


def said(question, *items):
    return [{"role": "user", "content": [*items, {"type": "text", "text": question}]}]


@functools.cache
def photograph(width, height):
    """A cat, cut or resized."""
    with PIL.Image.open(package_file("skimage", "data", "chelsea.png")) as image:
        return image.convert("RGB").resize((width, height))


def _moving(frames, width, height):
    image = np.asarray(photograph(451, 300))
    return [image[60 : 60 + height, x : x + width] for x in range(100, 100 + 8 * frames, 8)]


def answers(engine, asked):
    """The ids of each prompt and the greedy tokens after it."""
    found = []
    for messages in asked:
        prompt = engine.prompt(messages)
        done = engine.generate(prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
        found.append((prompt.input_ids.tolist(), list(done.tokens)))
    return found


def differences(found, expected):
    """How many prompt ids and how many answers are equal, and how those that are not go on from where they differ."""
    pairs = list(zip(found, expected, strict=True))
    counts = [sum(one[part] == other[part] for one, other in pairs) for part in (0, 1)]
    different = []
    for place, pair in enumerate(pairs):
        for part, (one, other) in enumerate(zip(*pair, strict=True)):
            if one != other:
                begin = next(i for i, (a, b) in enumerate(itertools.zip_longest(one, other)) if a != b)
                different.append((place, ("prompt", "answer")[part], begin, one[begin:], other[begin:]))
    return counts, "\n".join(map(str, different))
