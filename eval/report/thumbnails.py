"""The pictures and videos of a prompt, small, as data addresses: a page that has them needs no other file."""

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image

from glm4v_jax.errors import Glm4vError
from glm4v_jax.inputs.media.load import SampledVideo, is_array, is_path_like, load_image, load_video
from glm4v_jax.inputs.text.messages import Message, extract_media

LONGEST_SIDE, FRAME_SIDE = 512, 192
"""Of a picture and of a video's frame, at most, in pixels."""
MAX_FRAMES = 8
"""Of a video; of more, so many are shown, evenly spread."""

_QUALITY = 85
_LARGEST_SHOWN, _SMALLEST_SHOWN = 400, 160
"""Of a picture's longer side on the page, in pixels; smaller ones are enlarged by a whole number."""


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """A picture, or a frame.

    Attributes:
      address: "data:image/jpeg;base64,...".
      width, height: on the page, in pixels.
      is_enlarged: whether they are more than there are.
      time: of a frame, in seconds; None where nothing is known of it.
    """

    address: str
    width: int
    height: int
    is_enlarged: bool
    time: float | None = None


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture or a video of a prompt.

    Attributes:
      kind: which of the two.
      thumbnails: the picture, or frames in order; none where there is a problem.
      size: width and height of the original, in pixels.
      frames: how many the video has.
      problem: why it cannot be shown.
    """

    kind: Literal["picture", "video"]
    thumbnails: tuple[Thumbnail, ...]
    size: tuple[int, int] = (0, 0)
    frames: int = 0
    problem: str | None = None


def show(messages: Sequence[Message]) -> list[Shown]:
    """The pictures of a prompt, and then its videos; one that cannot be read is a `Shown` that says so.

    Args:
      messages: as chat templates take them.
    """
    try:
        pictures, videos = extract_media(messages, source="")
    except Glm4vError as error:
        return [Shown("picture", (), problem=str(error))]
    return [*map(_show_picture, pictures), *map(_show_video, videos)]


def _show_picture(source: Any) -> Shown:
    try:
        image = load_image(source)
    except (Glm4vError, OSError) as error:
        return Shown("picture", (), problem=str(error))
    return Shown("picture", (_thumbnail(image, LONGEST_SIDE, _LARGEST_SHOWN),), image.size)


def _show_video(source: Any) -> Shown:
    try:
        frames, times, count = _frames(source)
    except (Glm4vError, OSError) as error:
        return Shown("video", (), problem=str(error))
    thumbnails = [
        dataclasses.replace(_thumbnail(frame, FRAME_SIDE, FRAME_SIDE), time=time)
        for frame, time in zip(frames, times, strict=True)
    ]
    return Shown("video", tuple(thumbnails), frames[0].size, count)


def _frames(source: Any) -> tuple[list[PIL.Image.Image], list[float | None], int]:
    """Frames of a video that are shown, their times, and how many it has."""
    fps = None
    if isinstance(source, SampledVideo):
        source, fps = source.frames, source.fps
    if isinstance(source, PIL.Image.Image) or (is_array(source) and source.ndim == 3):
        source = [source]
    if not is_path_like(source) and len(source):
        indices = _spread(len(source))
        frames, count = [load_image(source[index]) for index in indices], len(source)
    else:
        array, metadata = load_video(source, lambda whole: _spread(whole.total_num_frames))
        frames, count, fps = [load_image(frame) for frame in array], metadata.total_num_frames, metadata.fps
        indices = [int(index) for index in metadata.frames_indices or range(len(frames))]
    return frames, [index / fps if fps else None for index in indices], count


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
