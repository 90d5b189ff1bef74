"""Images and videos for a conversation, each loaded once, when it is added."""

import dataclasses
import os
import shlex
from typing import TYPE_CHECKING, Any, Literal

from glm4v_jax.errors import MediaError, counted, not_there

if TYPE_CHECKING:
    from glm4v_jax.inputs.processor import Glm4vProcessor


@dataclasses.dataclass(frozen=True)
class Attachment:
    """An image or video.

    Attributes:
      kind: which of the two.
      place: path or address, as it was given.
      source: what a processor takes: a Pillow image, or a path or bytes of a video.
      about: size and number of tokens, for a person.
    """

    kind: Literal["image", "video"]
    place: str
    source: Any
    about: str


def attach(
    kind: Literal["image", "video"], place: str, processor: "Glm4vProcessor", fps: float | None = None
) -> Attachment:
    """Load an image, or look at a video, which may be a directory of its frames; `place` is a path or address.

    MediaError if it does not exist, or cannot be read or prepared.
    """
    from glm4v_jax.inputs.media.fetch import is_address

    if not is_address(place):
        place = os.path.expanduser(place)
        if not os.path.exists(place):
            raise MediaError(not_there(place, "an image or a video"))
    return _image(place, processor) if kind == "image" else _video(place, processor, fps)


def _image(place: str, processor: "Glm4vProcessor") -> Attachment:
    from glm4v_jax.inputs.media.load import load_image

    image = load_image(place)
    try:
        features = processor.image_processor(images=image)
    except MediaError as error:
        raise MediaError(f"{place}: {str(error).removeprefix('image 0: ')}") from error
    tokens = _tokens(features["image_grid_thw"], processor.image_processor.merge_size)
    return Attachment("image", place, image, f"{image.width} × {image.height} pixels, {counted(tokens, 'token')}")


def _video(place: str, processor: "Glm4vProcessor", fps: float | None) -> Attachment:
    from glm4v_jax.inputs.media.fetch import is_address, open_source
    from glm4v_jax.inputs.media.load import SampledVideo, frame_files
    from glm4v_jax.inputs.vision.settings import MediaWithOptions

    # A remote one is not fetched a second time; a directory stays a path.
    source: Any = open_source(place) if is_address(place) else place
    if frame_files(source) is not None:
        source = SampledVideo(source, fps)
    elif fps is not None:
        source = MediaWithOptions(source, {"fps": fps, "do_sample_frames": True})
    try:
        features = processor.video_processor(videos=source, return_metadata=True)
    except MediaError as error:
        raise MediaError(f"{place}: {str(error).removeprefix('video 0: ').removeprefix(f'{place}: ')}") from error
    (metadata,) = features["video_metadata"]
    tokens = _tokens(features["video_grid_thw"], processor.video_processor.merge_size)
    taken = len(metadata.frames_indices or ())
    frames = f"{taken} of {counted(metadata.total_num_frames or 0, 'frame')}"
    about = f"{metadata.width} × {metadata.height} pixels, {frames}, {counted(tokens, 'token')}"
    return Attachment("video", place, source, about)


def _tokens(grids: Any, merge_size: int) -> int:
    return int(grids.prod(axis=-1).sum()) // merge_size**2


def places(text: str) -> list[str]:
    """Split a line into paths or addresses: one with spaces in it, or several, quoted as in a shell.

    Raises:
      MediaError: there is none, or a quote is not closed.
    """
    from glm4v_jax.inputs.media.fetch import is_address

    text = text.strip()
    if text and (is_address(text) or os.path.exists(os.path.expanduser(text))):
        return [text]
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise MediaError(not_there(text, f"one, or several in quotes ({error})")) from error
    if not found:
        raise MediaError("FILE: found nothing; expected a path or an address")
    return found
