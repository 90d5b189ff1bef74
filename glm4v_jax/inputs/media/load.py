"""Images and videos from wherever a person has them, as Pillow images and numpy arrays."""

import contextlib
import dataclasses
import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import PIL.Image
import PIL.ImageOps

from glm4v_jax.config.checks import PositiveNumber, checked
from glm4v_jax.errors import MediaError, counted
from glm4v_jax.inputs.media.array_layout import FIRST, infer_channel_format
from glm4v_jax.inputs.media.container import is_still_image, kind_of_file
from glm4v_jax.inputs.media.decode import (
    MAX_PIXELS,
    SampleIndices,
    VideoLimits,
    VideoMetadata,
    decode_video,
    shortened,
)
from glm4v_jax.inputs.media.fetch import (
    MAX_IMAGE_BYTES,
    describe,
    file_url_path,
    is_address,
    is_missing_path,
    open_source,
)
from glm4v_jax.inputs.media.threads import map_threads

__all__ = [
    "MAX_PIXELS", "SampledVideo", "VideoLimits", "VideoMetadata", "are_frames", "frame_files", "is_array",
    "is_path_like", "load_image", "load_video", "open_image",
]  # fmt: skip

_NUMBER = re.compile(r"(\d+)")
# GIF and WebP are videos as often as not.
_STILL_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# Pillow's modes of more than 8 bits a value: I, I;16 and its byte orders, F.
_DEEP_MODES = ("I", "F")


@dataclasses.dataclass(frozen=True, eq=False)
class SampledVideo:
    """Frames that have been sampled already: all of them are taken, whatever the options say.

    >>> video = SampledVideo(np.zeros((4, 56, 56, 3), np.uint8), fps=4)
    >>> video.metadata(2).timestamps
    [0.0, 0.25, 0.5, 0.75]

    Attributes:
        frames: a list of images or a directory of them, or an array [T, H, W, C] or [T, C, H, W], as `load_video` takes
            them.
        fps: at how many a second they were taken, for their timestamps; None takes the rate at which the processor
            samples videos.
    """

    frames: Any
    fps: float | None = None

    def __post_init__(self) -> None:
        """Check the rate.

        Raises:
            MediaError: it is not a positive number.
        """
        if self.fps is not None:
            checked("fps of the frames", self.fps, PositiveNumber, MediaError)

    def metadata(self, fps: float) -> VideoMetadata:
        """The metadata of a video that has these frames and no others; `fps` counts where they have no rate.

        Raises:
            MediaError: the frames are neither of these.
        """
        files = frame_files(self.frames)
        is_one = isinstance(self.frames, PIL.Image.Image) or getattr(self.frames, "ndim", 4) < 4
        if files is None and not is_one and not hasattr(self.frames, "__len__"):
            raise MediaError(f"frames: found {describe(self.frames)}; expected a list, a directory or an array of them")
        count = 1 if is_one else len(self.frames if files is None else files)
        rate = float(self.fps or fps)
        return VideoMetadata(total_num_frames=count, fps=rate, duration=count / rate, frames_indices=range(count))


def is_array(value: Any) -> bool:
    """Whether `value` is a numpy array or turns into one (a jax array, a torch tensor on the CPU)."""
    return (
        not isinstance(value, (PIL.Image.Image, str, bytes)) and hasattr(value, "__array__") and hasattr(value, "ndim")
    )


def is_path_like(value: Any) -> bool:
    """Whether `value` names or holds an encoded file: text, a path, bytes."""
    return isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike))


def frame_files(source: Any) -> list[Any] | None:
    """The images that a directory or a list of files holds, as frames of one video; None for other sources.

    Those of a directory are in the order of their names, numbers in them by their values: 2.png is before 10.png. Files
    that are not named as images are skipped, if some are.
    """
    if isinstance(source, (list, tuple)):
        return list(source) if source and all(map(is_path_like, source)) else None
    if isinstance(source, str) and source.lower().startswith("file://"):
        source = file_url_path(source)
    if not isinstance(source, (str, os.PathLike)) or not os.path.isdir(source):
        return None
    files = [path for path in Path(source).iterdir() if path.is_file() and not path.name.startswith(".")]
    known = PIL.Image.registered_extensions()
    named = [path for path in files if path.suffix.lower() in known]
    return sorted(
        named or files,
        key=lambda path: [int(part) if part.isdecimal() else part for part in _NUMBER.split(path.name)],
    )


def are_frames(sources: Sequence[Any], *, by_name: bool = False) -> bool:
    """Whether a list of videos is one: several files of single images are its frames.

    >>> are_frames(["0.png", "1.png"], by_name=True), are_frames(["0.png"], by_name=True)
    (True, False)

    Args:
        sources: whatever a list of videos may have.
        by_name: judge all by their names, of files that may be elsewhere; else the first and the last of them are
            looked into: a thousand would take a while.
    """
    if len(sources) < 2 or not all(map(is_path_like, sources)):
        return False
    return all(map(_is_named_still, sources)) if by_name else _is_still(sources[0]) and _is_still(sources[-1])


def _is_named_still(name: Any) -> bool:
    """Whether a path or an address is by its name that of a single image."""
    return isinstance(name, str) and name.lower().partition("?")[0].endswith(_STILL_SUFFIXES)


def _is_still(source: Any) -> bool:
    """Whether a file, an address or bytes are a single image; an address is judged by its name."""
    if isinstance(source, str) and is_address(source) and not source.lower().startswith("file://"):
        return _is_named_still(source)
    try:
        return is_still_image(open_source(source))
    except (MediaError, OSError):
        return False


@contextlib.contextmanager
def naming_media(kind: str, index: int, source: Any) -> Iterator[None]:
    """Put the position of an image or video before media errors of the body, and its file name where they lack it."""
    try:
        yield
    except MediaError as error:
        name = getattr(source, "filename", "") if isinstance(source, PIL.Image.Image) else ""
        if isinstance(source, (str, os.PathLike)):
            name = describe(source)
        named = f" ({name})" if name and not str(error).startswith(f"{name}: ") else ""
        raise MediaError(f"{kind} {index}{named}: {error}") from error


def warn_if_clipped(image: PIL.Image.Image, name: str = "") -> None:
    """Warn where `image.convert("RGB")` clips an image of more than 8 bits, as it does in the reference.

    Args:
        image: a decoded image.
        name: what to call it; "" is its file name or its size.
    """
    if not image.mode.startswith(_DEEP_MODES):
        return
    largest = np.asarray(image).max()
    # Fractions would be black.
    if largest > 255 or (image.mode == "F" and largest <= 1):
        name = name or getattr(image, "filename", "") or f"Pillow image of {image.width} x {image.height} pixels"
        warnings.warn(
            f"{name}: has values {'above 255' if largest > 255 else 'up to 1'} (mode {image.mode}), which are "
            f"{'clipped to 255' if largest > 255 else 'rounded down'} as in the reference; scale the image to 8 bits "
            "first",
            stacklevel=2,
        )


def open_image(source: Any) -> PIL.Image.Image:
    """Open an encoded image, which is read when it is first used.

    A source is a path, `file://` or http(s) address, base64 data URL, base64 text, or the bytes of a file. MediaError,
    which names it, if the image cannot be found, fetched or read, or is too large.
    """
    name = describe(source)
    opened = open_source(source, max_bytes=MAX_IMAGE_BYTES)
    try:
        return PIL.Image.open(io.BytesIO(opened) if isinstance(opened, bytes) else opened)
    except PIL.Image.DecompressionBombError as error:
        raise MediaError(f"{name}: found too large an image ({error}); expected a smaller one") from error
    except Exception as error:  # Pillow's format readers raise many kinds of errors on broken files.
        found = "no readable image"
        if isinstance(opened, Path) and opened.is_dir():
            found = "a directory"
        elif isinstance(opened, bytes) and is_missing_path(source):
            found = "no such file, nor base64 of an image"
        elif not isinstance(error, PIL.UnidentifiedImageError):  # which says no more than that
            found = f"no readable image ({shortened(error)})"
        else:
            found = _unreadable(opened)
        advice = "; a directory of frames is a video" if found == "a directory" else ""
        raise MediaError(f"{name}: found {found}; expected an image{advice}") from error


def _unreadable(opened: Path | bytes) -> str:
    """What a file is that Pillow does not know."""
    kind = kind_of_file(opened)
    if kind == "an image":
        kind = "of a kind that Pillow does not read, such as HEIC"
    elif kind == "a video":
        kind = "a video, which --video and videos= take"
    return "no readable image" if kind is None else f"no readable image ({kind})"


def load_image(source: Any, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Load an image the way `transformers.image_utils.load_image` does.

    The image is turned as its EXIF data says and converted to RGB by Pillow: alpha is dropped without compositing,
    palettes are looked up, 16-bit grey is clipped with a warning, and of an animation the first frame is taken.

    Args:
        source: path, `file://` or http(s) address, base64 data URL, base64 text, the bytes of an encoded file, a Pillow
            image, or an array [H, W], [H, W, C] or [C, H, W] of uint8.
        max_pixels: largest image, checked before it is decoded.

    Returns:
        An RGB Pillow image.

    Raises:
        MediaError: the image cannot be found, fetched or decoded, or is too large; the message names it.
    """
    name = describe(source)
    if isinstance(source, PIL.Image.Image):
        image = source
    elif is_array(source):
        image = _image_of_array(np.asarray(source))
    elif is_path_like(source):
        image = open_image(source)
    else:
        raise MediaError(
            f"source: found {name}; expected a path, an address, bytes, base64 text, a Pillow image or an array"
        )
    width, height = image.size
    if width * height > max_pixels:
        raise MediaError(f"{name}: found {width} x {height} pixels; expected at most {max_pixels} pixels")
    try:
        image = PIL.ImageOps.exif_transpose(image)
        converted = image.convert("RGB")
    except Exception as error:  # As above; a truncated file shows only here, where Pillow decodes.
        raise MediaError(f"{name}: found a truncated or corrupt image ({error}); expected a complete one") from error
    warn_if_clipped(image, name)
    return converted


def decode_pillow(image: PIL.Image.Image) -> None:
    """Decode a Pillow image that may not have been yet.

    Raises:
        MediaError: its file is truncated or corrupt.
    """
    try:
        image.load()
    except Exception as error:  # Pillow's format readers raise many kinds of errors on broken files.
        name = getattr(image, "filename", "") or "Pillow image"
        raise MediaError(f"{name}: found a truncated or corrupt image ({error}); expected a complete one") from error


def _image_of_array(array: np.ndarray) -> PIL.Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise MediaError(f"array: found {array.dtype} {list(array.shape)}; expected uint8 [H, W, C] or [C, H, W]")
    try:
        return PIL.Image.fromarray(np.ascontiguousarray(array))
    except (TypeError, ValueError) as error:
        raise MediaError(f"array: found shape {list(array.shape)} ({error}); expected an image") from error


def load_video(
    source: Any,
    sample_indices_fn: SampleIndices | None = None,
    *,
    metadata: VideoMetadata | Mapping[str, Any] | None = None,
    do_convert_rgb: bool = True,
    backend: str | None = None,
    **limits: Unpack[VideoLimits],
) -> tuple[np.ndarray, VideoMetadata]:
    """Load the frames of a video.

    Args:
        source: path, `file://` or http(s) address, data URL or bytes of an encoded video or animated image; a
            directory of images, see `frame_files`; a list of images (whatever `load_image` takes);
            or an array [T, H, W, C] or [T, C, H, W].
        sample_indices_fn: metadata of the whole video -> indices of the frames to take. From an encoded video only
            these are kept in memory. None takes all.
        metadata: what is known of a list or an array; an encoded video brings its own.
        do_convert_rgb: convert Pillow frames of other modes to RGB.
        backend: "decord", "pyav" or "pillow" to force a decoder.
        **limits: of encoded videos; see `VideoLimits`.

    Returns:
        The frames: uint8 RGB [T, H, W, 3] from encoded videos and images, and arrays in the layout and type they
        came in. And the metadata, with `frames_indices` as taken.

    Raises:
        MediaError: no frames; not found, not decodable, truncated or too large; frames of different sizes; or
            sampling asked of image files without metadata, which have no time.
    """
    name = describe(source)
    if is_path_like(source):
        opened = open_source(source)
        if not (isinstance(opened, Path) and opened.is_dir()):
            try:
                return decode_video(opened, name, sample_indices_fn, backend=backend, **limits)
            except MediaError as error:
                if not isinstance(opened, bytes) or not is_missing_path(source):
                    raise
                problem = str(error).removeprefix(f"{name}: ")
                found = f"no such file, nor base64 of a video ({problem})"
                raise MediaError(f"{name}: found {found}; expected a video") from error
        source = frame_files(opened)
    if isinstance(source, PIL.Image.Image) or (is_array(source) and source.ndim == 3):
        source = [source]
    if is_array(source):
        frames = np.asarray(source)
    elif isinstance(source, (list, tuple)):
        if sample_indices_fn is not None and metadata is None and any(is_path_like(frame) for frame in source):
            raise MediaError(
                "Sampling frames from a list of images is not supported without `video_metadata`, which says how fast "
                "they were taken; set `do_sample_frames=False` to take all"
            )
        frames = _stack_frames(source, name, do_convert_rgb)
    else:
        raise MediaError(
            f"source: found {name}; expected a path, an address, bytes, a list of frames or an array of frames"
        )
    if frames.ndim != 4 or 0 in frames.shape:
        raise MediaError(
            f"frames: found shape {list(frames.shape)}; expected [T, H, W, C] or [T, C, H, W], at least one frame"
        )

    taken = _metadata_of_frames(frames, metadata)
    if sample_indices_fn is not None:
        indices = [int(index) for index in sample_indices_fn(taken)]
        if max(indices) >= len(frames):
            raise MediaError(
                f"video_metadata: found {taken.total_num_frames} frames; expected {len(frames)}, as the video has"
            )
        frames, taken.frames_indices = frames[indices], indices
    return frames, taken


def _stack_frames(sources: Sequence[Any], name: str, do_convert_rgb: bool) -> np.ndarray:
    """Frames [T, H, W, C] or [T, C, H, W] of a list of images, arrays and paths."""
    if not sources:
        raise MediaError(f"{name}: found no frames; expected at least one")

    def frame(source: Any) -> np.ndarray:
        if isinstance(source, PIL.Image.Image):
            if not do_convert_rgb or source.mode == "RGB":
                return np.asarray(source)
            warn_if_clipped(source)
            return np.asarray(source.convert("RGB"))
        if is_array(source):
            return np.asarray(source)
        return np.asarray(load_image(source))

    for source in sources:
        # Pillow decodes lazily and not thread-safely, and one image may stand twice in the list.
        if isinstance(source, PIL.Image.Image):
            decode_pillow(source)
    frames = map_threads(frame, sources)
    for index, array in enumerate(frames):
        if array.shape != frames[0].shape:
            raise MediaError(
                f"{name}: found frame {index}{_in_brackets(sources[index])} of shape {list(array.shape)} and frame 0"
                f"{_in_brackets(sources[0])} of {list(frames[0].shape)}; expected one size"
            )
    return np.stack(frames)


def _in_brackets(source: Any) -> str:
    return f" ({describe(source)})" if isinstance(source, (str, os.PathLike)) else ""


def _sides(frames: np.ndarray) -> tuple[int, int]:
    height, width = frames.shape[2:4] if infer_channel_format(frames.shape, (1, 3, 4)) == FIRST else frames.shape[1:3]
    return height, width


def _metadata_of_frames(frames: np.ndarray, metadata: VideoMetadata | Mapping[str, Any] | None) -> VideoMetadata:
    """A copy of the caller's metadata; without one, what the frames themselves say."""
    if metadata is not None:
        known = VideoMetadata(**{"total_num_frames": None, **metadata})
        if known.total_num_frames is None:
            known.total_num_frames = len(frames)
        if known.frame_times is not None and len(known.frame_times) != known.total_num_frames:
            found, expected = counted(len(known.frame_times), "time"), counted(known.total_num_frames, "frame")
            raise MediaError(f"video_metadata: frame_times: found {found}; expected one for each of {expected}")
        if known.height is None and known.width is None:
            with contextlib.suppress(MediaError):
                known.height, known.width = _sides(frames)
        return known
    height, width = _sides(frames)
    return VideoMetadata(
        total_num_frames=len(frames), height=height, width=width, frames_indices=list(range(len(frames)))
    )
