"""Decode a video with decord, PyAV or Pillow: one function in front, the same frames from each."""

import dataclasses
import io
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import PIL.ImageSequence

from glm4v_jax.errors import MediaError, naming

logger = logging.getLogger(__name__)

# A frame rate above this is a container's time base mistaken for one, as in raw H.264 streams (90,000).
MAX_FPS = 1000.0
# The size at which Pillow, and so the reference, takes an image for a decompression bomb: 178,956,970 pixels. To go
# beyond, raise `PIL.Image.MAX_IMAGE_PIXELS` as well.
MAX_PIXELS = 2 * (2**30 // 4 // 3)
# Frames of one video held in memory; an unsampled hour of 1080p would be 500 GB.
MAX_DECODED_BYTES = 16 * 2**30
# What browsers show a GIF frame for when its file gives no time.
_DEFAULT_GIF_SECONDS = 0.1
# What of a file is read to find its kind; no video container has this many bytes without a control character.
_HEAD_BYTES = 1024
# As much of a JPEG as is read to distinguish a photo from a stream of them (Motion JPEG).
_MOTION_JPEG_BYTES = 2**26
# Of a decoder's own words, what an error repeats.
_PROBLEM_CHARACTERS = 120
_PILLOW_SIGNATURES = (b"GIF87a", b"GIF89a", b"\x89PNG\r\n\x1a\n")


@dataclasses.dataclass
class VideoMetadata(Mapping[str, Any]):
    """What is known of a video, as in `transformers.video_utils`: attributes, and a mapping, so `dict(metadata)` works.

    Attributes:
        total_num_frames: frames of the whole video, before sampling.
        fps: frames per second of the whole video.
        width: columns, in pixels.
        height: rows, in pixels.
        duration: seconds.
        video_backend: which decoder read it: "decord", "pyav" or "pillow".
        frames_indices: indices of the frames that were taken, in the numbering of the whole video.
    """

    total_num_frames: int
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    duration: float | None = None
    video_backend: str | None = None
    frames_indices: Sequence[int] | None = None

    def __iter__(self) -> Iterator[str]:
        """The names of the fields."""
        return (field.name for field in dataclasses.fields(self))

    def __len__(self) -> int:
        """The number of fields."""
        return len(dataclasses.fields(self))

    def __getitem__(self, name: str) -> Any:
        """The field `name`."""
        if name not in tuple(self):
            raise KeyError(name)
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set the field `name`."""
        if name not in tuple(self):
            raise KeyError(name)
        setattr(self, name, value)

    @property
    def timestamps(self) -> list[float]:
        """Seconds of the frames that were taken.

        Raises:
            MediaError: `fps` or `frames_indices` is unknown.
        """
        if self.fps is None or self.frames_indices is None:
            raise MediaError("Cannot infer video `timestamps` when `fps` or `frames_indices` is None.")
        return [index / self.fps for index in self.frames_indices]


SampleIndices = Callable[[VideoMetadata], Any]


class _Reader(Protocol):
    """An open video: its numbers, and frames by index."""

    backend: str
    total: int
    fps: float | None
    height: int
    width: int

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Decode frames [T, H, W, 3] uint8, in the order of the indices, which may repeat."""
        ...


class _DecordReader:
    backend = "decord"

    def __init__(self, source: Path | bytes) -> None:
        import decord

        self._reader = decord.VideoReader(io.BytesIO(source) if isinstance(source, bytes) else str(source))
        self.total = len(self._reader)
        self.fps: float | None = float(self._reader.get_avg_fps())
        # The container's size is not exposed; the first frame has it, with the rotation applied.
        shape: tuple[int, ...] = self._reader[0].shape if self.total else (0, 0)
        self.height, self.width = shape[0], shape[1]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self._reader.get_batch(list(indices)).asnumpy()


class _PyavReader:
    backend = "pyav"

    def __init__(self, source: Path | bytes) -> None:
        import av

        self._container = av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), mode="r")
        if not self._container.streams.video:
            raise MediaError("found no video stream; expected a video")
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        self.fps = float(stream.average_rate) if stream.average_rate else None
        # Matroska and WebM do not store the number of frames: count packets, which decodes nothing.
        self.total = stream.frames or sum(packet.size > 0 for packet in self._container.demux(stream))
        self._container.seek(0)
        first = next(self._container.decode(video=0), None)
        shape: tuple[int, ...] = (0, 0) if first is None else self._to_rgb(first).shape
        self.height, self.width = shape[0], shape[1]

    @staticmethod
    def _to_rgb(frame: Any) -> np.ndarray:
        """RGB [H, W, 3], turned the way the container says, as decord and players do."""
        return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        wanted = set(indices)
        found: dict[int, np.ndarray] = {}
        self._container.seek(0)
        for index, frame in enumerate(self._container.decode(video=0)):
            if index in wanted:
                found[index] = self._to_rgb(frame)
                if len(found) == len(wanted):
                    break
        missing = sorted(wanted - found.keys())
        if missing:
            raise MediaError(
                f"found the end before frame {missing[0]}; expected {self.total} frames, as the container says"
            )
        return np.stack([found[index] for index in indices])


class _PillowReader:
    """Animated GIF, WebP and PNG, which Pillow composes frame by frame."""

    backend = "pillow"

    def __init__(self, source: Path | bytes) -> None:
        self._image = PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        self.width, self.height = self._image.size
        self.total = getattr(self._image, "n_frames", 1)
        seconds = 0.0
        for frame in PIL.ImageSequence.Iterator(self._image):
            frame.load()  # Some formats give a frame's time only now.
            seconds += frame.info.get("duration", 0) / 1000 or _DEFAULT_GIF_SECONDS
        self.fps: float | None = self.total / seconds

    def read(self, indices: Sequence[int]) -> np.ndarray:
        found = {}
        for index in sorted(set(indices)):
            self._image.seek(index)
            found[index] = np.asarray(self._image.convert("RGB"))
        return np.stack([found[index] for index in indices])


_READERS: dict[str, Callable[[Path | bytes], _Reader]] = {
    "decord": _DecordReader,
    "pyav": _PyavReader,
    "pillow": _PillowReader,
}


def _head(source: Path | bytes, size: int = _HEAD_BYTES) -> bytes:
    if isinstance(source, bytes):
        return source[:size]
    with source.open("rb") as file:
        return file.read(size)


def _is_animated_image(head: bytes) -> bool:
    return head.startswith(_PILLOW_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _is_still_image(head: bytes, source: Path | bytes) -> bool:
    """Whether a file is one image, which FFmpeg would take for a video without size or of one frame."""
    if head.startswith(b"\xff\xd8\xff"):
        data = _head(source, _MOTION_JPEG_BYTES)
        # Photos of several views (MPO) hold several images too, and say so.
        return b"\xff\xd9\xff\xd8\xff" not in data or b"MPF\0" in data
    if head.startswith((b"II*\0", b"MM\0*")) or (head[:2] == b"BM" and head[6:10] == bytes(4)):
        return True
    if head[4:8] == b"ftyp":
        return head[8:12] in (b"avif", b"heic", b"heix", b"mif1")
    if not _is_animated_image(head):
        return False
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return getattr(image, "n_frames", 1) == 1
    except Exception:  # Broken: the reader will say how.
        return False


def _check_kind(head: bytes, source: Path | bytes) -> None:
    """Refuse files that are plainly not videos, before a decoder prints about them."""
    found = None
    if head.startswith(b"%PDF-"):
        found = "a PDF"
    elif _is_text(head):
        found = "text"
    elif _is_still_image(head, source):
        found = "an image"
    if found is not None:
        raise MediaError(f"found {found}; expected a video")


def _is_text(head: bytes) -> bool:
    """Whether a file begins as prose does. FFmpeg would show it as a video of a terminal."""
    return bool(head) and not any(byte < 32 and byte not in b"\t\n\f\r" for byte in head)


def _plan(
    reader: _Reader, sample_indices_fn: SampleIndices | None, max_pixels: int, max_decoded_bytes: int
) -> VideoMetadata:
    """The metadata of an open video, with the frames to take, within the limits."""
    if reader.total <= 0 or reader.height <= 0 or reader.width <= 0:
        raise MediaError(
            f"found {reader.total} frames of {reader.height} x {reader.width} pixels; expected at least one"
        )
    if reader.height * reader.width > max_pixels:
        raise MediaError(
            f"found frames of {reader.height} x {reader.width} pixels; expected at most {max_pixels} pixels"
        )
    fps = reader.fps
    if fps is not None and not (math.isfinite(fps) and 0 < fps <= MAX_FPS):
        fps = None
    metadata = VideoMetadata(
        total_num_frames=reader.total,
        fps=fps,
        width=reader.width,
        height=reader.height,
        duration=None if fps is None else reader.total / fps,
        video_backend=reader.backend,
    )
    if sample_indices_fn is None:
        indices = list(range(reader.total))
    elif fps is None:
        raise MediaError(
            f"found no usable frame rate ({reader.fps}); expected one in the container: decode it yourself and pass "
            "the frames with `video_metadata`, or set `do_sample_frames=False`"
        )
    else:
        indices = [int(index) for index in sample_indices_fn(metadata)]
    outside = [index for index in indices if not 0 <= index < reader.total]
    if not indices or outside:
        raise MediaError(f"found sampled frames {outside or indices}; expected some of 0 to {reader.total - 1}")
    size = len(set(indices)) * reader.height * reader.width * 3
    if size > max_decoded_bytes:
        raise MediaError(
            f"found {len(indices)} frames of {reader.height} x {reader.width} pixels, {size} bytes; expected at most "
            f"{max_decoded_bytes}: sample fewer frames"
        )
    metadata.frames_indices = indices
    return metadata


def decode_video(
    source: Path | bytes,
    name: str,
    sample_indices_fn: SampleIndices | None = None,
    *,
    backend: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_decoded_bytes: int = MAX_DECODED_BYTES,
) -> tuple[np.ndarray, VideoMetadata]:
    """Decode the frames that `sample_indices_fn` asks for, and no others into memory.

    Animated GIF, WebP and PNG go to Pillow, everything else to decord, or to PyAV where decord is not installed or
    cannot read the file (AV1, for one).

    Args:
        source: a file, or its content.
        name: what to call the source in errors.
        sample_indices_fn: metadata of the whole video -> indices of the frames to take; None takes all.
        backend: "decord", "pyav" or "pillow" to force one.
        max_pixels: largest frame.
        max_decoded_bytes: largest array of frames.

    Returns:
        frames [T, H, W, 3] uint8 RGB, and the metadata with `frames_indices` set.

    Raises:
        MediaError: the video cannot be decoded, is truncated, has no frames, or passes a limit.
        ImportError: neither decord nor PyAV is installed.
    """
    if backend is not None and backend not in _READERS:
        raise MediaError(f"backend: found {backend!r}; expected one of {', '.join(sorted(_READERS))}")
    try:
        head = _head(source)
        with naming(name, MediaError):
            _check_kind(head, source)
    except OSError as error:
        raise MediaError(f"{name}: found an unreadable file ({error}); expected a video") from error
    backends = ("pillow",) if _is_animated_image(head) else ("decord", "pyav")
    verdict = "found no readable video, perhaps a truncated or corrupt one; expected a video"
    problems: list[str] = []
    cause: Exception | None = None
    for candidate in backends if backend is None else (backend,):
        try:
            reader = _READERS[candidate](source)
        except ImportError:
            logger.debug("%s is not installed", candidate)
            continue
        except Exception as error:  # Decoders raise what they like on broken files: RuntimeError, EOFError, their own.
            if isinstance(error, MediaError):
                verdict = str(error)
            else:
                problems.append(f"{candidate}: {_shortened(error)}")
            cause = error
            continue
        try:
            metadata = _plan(reader, sample_indices_fn, max_pixels, max_decoded_bytes)
        except MediaError as error:
            raise MediaError(f"{name}: {error}") from error
        try:
            return reader.read(metadata.frames_indices or ()), metadata
        except Exception as error:  # As above.
            if isinstance(error, MediaError):
                verdict = str(error)
            else:
                problems.append(f"{candidate}: {_shortened(error)}")
            cause = error
    if cause is None:
        raise ImportError(f"{name}: found no decoder; expected decord or PyAV: pip install decord (or av)")
    details = f" ({'; '.join(problems)})" if problems else ""
    raise MediaError(f"{name}: {verdict}{details}") from cause


def _shortened(error: Exception) -> str:
    """The start of a decoder's message, without error numbers, places in C++ and decord's stack trace."""
    lines = str(error).strip().splitlines()
    line = re.sub(r"^(\[\d\d:\d\d:\d\d\] \S+:\d+: |\[Errno -?\d+\] )", "", lines[0]) if lines else repr(error)
    return line if len(line) <= _PROBLEM_CHARACTERS else line[: _PROBLEM_CHARACTERS - 3] + "..."
