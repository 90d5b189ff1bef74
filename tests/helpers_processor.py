"""Prompts, images and clips for tests of the processor."""

import io
import json

import numpy as np
import PIL.Image

HEAD = "[gMASK]<sop><|user|>\n"


TAIL = "<|assistant|>\n"


IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"


VIDEO = "<|begin_of_video|><|video|><|end_of_video|>"


PAD, BOI, EOI, IMG, BOV, EOV = 256, 266, 267, 270, 268, 269


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def clip(frames, height=56, width=84, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


# Grids (1, 6, 10) and (1, 6, 6): 15 and 9 tokens.
WIDE, SQUARE = noise(84, 140), noise(84, 84, seed=2)


def metadata(frames, fps, **more):
    return {"total_num_frames": frames, "fps": fps, "duration": frames / fps, **more}


# One step of eight bits, normalised: the frames of videos are resized by torchvision there and by Pillow here.
ONE_STEP = 1.01 / 255 / 0.26130258


def assert_same(found, expected):
    """Every entry equals the reference's exactly, but for the pixels of videos, which are within one step."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        value = np.asarray(value)
        if name == "pixel_values_videos":
            np.testing.assert_allclose(found[name], value, rtol=0, atol=ONE_STEP)
            continue
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert isinstance(found[name], np.ndarray)
        if name != "pixel_values":
            assert found[name].dtype == np.int64


def image_tokens(n):
    return [BOI, *[IMG] * n, EOI]


def png(array):
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def edit(directory, name, **changes):
    path = directory / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


# A clip of 40 frames at 10 a second: 4 temporal patches of 6 tokens, at 0, 1, 2 and 3 seconds; "0" is 15.
VIDEO_IDS = [BOV, *(i for second in range(4) for i in [*image_tokens(6), 15 + second]), EOV]
