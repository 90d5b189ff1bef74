"""Thumbnails of the images and videos of a prompt as data addresses, so that a page needs no other file."""

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image

from glm4v_jax.errors import Glm4vError
from glm4v_jax.inputs.media.load import SampledVideo, frame_files, is_array, is_path_like, load_image, load_video
from glm4v_jax.inputs.text.messages import Message, extract_media
from glm4v_jax.inputs.vision.settings import MediaWithOptions

LONGEST_SIDE, FRAME_SIDE = 512, 192
"""The longest side of an image and of a video's frame, in pixels."""
MAX_FRAMES = 8
"""Frames of a video that are shown, evenly spread."""

_QUALITY = 85
_LARGEST_SHOWN, _SMALLEST_SHOWN = 400, 160
"""Longer side of an image on the page, in pixels; smaller ones are enlarged by an integer factor."""


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """An image, or a frame.

    Attributes:
      address: "data:image/jpeg;base64,...".
      width, height: on the page, in pixels.
      is_enlarged: whether this is larger than the thumbnail.
      time: of a frame, in seconds; None where it is unknown.
    """

    address: str
    width: int
    height: int
    is_enlarged: bool
    time: float | None = None


@dataclasses.dataclass(frozen=True)
class ShownMedia:
    """An image or a video of a prompt.

    Attributes:
      kind: "image" or "video".
      thumbnails: the image, or frames in order; none where there is a problem.
      size: width and height of the original, in pixels.
      frames: number of frames of the video.
      problem: why it cannot be shown.
    """

    kind: Literal["image", "video"]
    thumbnails: tuple[Thumbnail, ...]
    size: tuple[int, int] = (0, 0)
    frames: int = 0
    problem: str | None = None


def show(messages: Sequence[Message]) -> list[ShownMedia]:
    """Make the thumbnails of a prompt's images, and then of its videos; one that cannot be read has a `problem`.

    Args:
      messages: as chat templates take them.
    """
    try:
        images, videos = extract_media(messages, source="")
    except Glm4vError as error:
        return [ShownMedia("image", (), problem=str(error))]
    images, videos = ([MediaWithOptions.split(item)[0] for item in items] for items in (images, videos))
    return [*map(_show_image, images), *map(_show_video, videos)]


def _show_image(source: Any) -> ShownMedia:
    try:
        image = load_image(source)
    except (Glm4vError, OSError) as error:
        return ShownMedia("image", (), problem=str(error))
    return ShownMedia("image", (_thumbnail(image, LONGEST_SIDE, _LARGEST_SHOWN),), image.size)


def _show_video(source: Any) -> ShownMedia:
    try:
        frames, times, count = _frames(source)
    except (Glm4vError, OSError) as error:
        return ShownMedia("video", (), problem=str(error))
    thumbnails = [
        dataclasses.replace(_thumbnail(frame, FRAME_SIDE, FRAME_SIDE), time=time)
        for frame, time in zip(frames, times, strict=True)
    ]
    return ShownMedia("video", tuple(thumbnails), frames[0].size, count)


def _frames(source: Any) -> tuple[list[PIL.Image.Image], list[float | None], int]:
    """The frames of a video that are shown, their times, and how many it has."""
    fps = None
    if isinstance(source, SampledVideo):
        source, fps = source.frames, source.fps
    source = frame_files(source) or source
    if isinstance(source, PIL.Image.Image) or (is_array(source) and source.ndim == 3):
        source = [source]
    if not is_path_like(source) and len(source):
        indices = _spread(len(source))
        times = [index / fps if fps else None for index in indices]
        return [load_image(source[index]) for index in indices], times, len(source)
    array, metadata = load_video(source, lambda whole: _spread(whole.total_num_frames))
    times = [metadata.time_of(int(index)) for index in metadata.frames_indices or range(len(array))]
    return [load_image(frame) for frame in array], times, metadata.total_num_frames


def _spread(count: int) -> list[int]:
    return [int(index) for index in np.linspace(0, count - 1, min(count, MAX_FRAMES)).round()]


def _thumbnail(image: PIL.Image.Image, longest: int, largest_shown: int) -> Thumbnail:
    small = image.copy()
    small.thumbnail((longest, longest))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY)
    side = max(small.size)
    factor = min(largest_shown / side, max(1, -(-_SMALLEST_SHOWN // side)))
    width, height = (max(1, round(factor * pixels)) for pixels in small.size)
    address = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Thumbnail(address, width, height, factor > 1)
