"""Images and videos for tests: made ones, and those that packages ship."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

RNG = np.random.default_rng(0)


PHOTO = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def package_file(package: str, *parts: str) -> Path:
    """A file that a package ships, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0], *parts)


def png(image: PIL.Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


PNG = png(PIL.Image.fromarray(PHOTO))
NAMED = "/a photo of Zoë.png?name=é"
"""A path on a server, as a person writes it."""


def write_video(path, frames, rate=10, codec="libx264", **options):
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def every_tenth(metadata):
    return range(0, metadata.total_num_frames, 10)
