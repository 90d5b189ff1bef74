"""What the tests of commands share."""

import json

import numpy as np
import PIL.Image
import pytest

from glm4v_jax.cli import main
from glm4v_jax.tiny import TINY_CHECKPOINT

ROOT = TINY_CHECKPOINT.parents[2]


def refuse_weights(monkeypatch):
    """Make the test fail if weights are asked for."""
    monkeypatch.setattr(
        "glm4v_jax.checkpoints.load.load_runtime", lambda *_, **__: pytest.fail("the weights were loaded")
    )


def save_noise(path, height=56, width=84, kind=None, seed=0):
    """Write an image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path, kind)


def save_video(path):
    """Write two seconds at two frames per second, as an animated image."""
    frames = [PIL.Image.fromarray(np.full((56, 84, 3), 60 * index, np.uint8)) for index in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)


def refused(capfd, *arguments):
    """Run `glm4v generate`; expect status 1 and one line of error; return the line."""
    assert main.main(["generate", *map(str, arguments)]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("glm4v: error: ")
    return lines[0]


def keyed(path, field):
    """The lines of a file of answers by the name of their prompt, which is in one line only."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    lines = {line[field]: line for line in found}
    assert len(lines) == len(found)
    return lines
