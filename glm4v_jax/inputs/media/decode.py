"""Decode a video with decord, PyAV or Pillow: one function in front, the same frames from each."""

import dataclasses
import io
import logging
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import PIL.Image
import PIL.ImageSequence

from glm4v_jax.errors import MediaError, naming
from glm4v_jax.inputs.media.container import check_is_video, head_of, is_animated_image, warn_if_truncated

logger = logging.getLogger(__name__)

# A frame rate above this is a container's time base mistaken for one, as in raw H.264 streams (90,000).
MAX_FPS = 1000.0
# Frames further than this from where the rate puts them, in seconds and in frames, have times of their own; at two
# frames a second, as videos are sampled, half of this is already another frame.
_MAX_DRIFT_SECONDS, _MAX_DRIFT_FRAMES = 0.25, 0.5
# The size at which Pillow, and so the reference, takes an image for a decompression bomb: 178,956,970 pixels. To go
# beyond, raise `PIL.Image.MAX_IMAGE_PIXELS` as well.
MAX_PIXELS = 2 * (2**30 // 4 // 3)
# Frames of one video held in memory; an unsampled hour of 1080p would be 500 GB.
MAX_DECODED_BYTES = 16 * 2**30
# What browsers show a GIF frame for when its file gives no time.
_DEFAULT_GIF_SECONDS = 0.1
# Of a decoder's own words, what an error repeats.
_PROBLEM_CHARACTERS = 120
_INSTALL = "pip install 'glm4v_jax[video]'"


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
        frame_times: seconds of all frames of the whole video, where `fps` does not tell them: cameras of phones, screen
            recorders and animated images take frames as they come. Of the mapping only where it is set.
    """

    total_num_frames: int
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    duration: float | None = None
    video_backend: str | None = None
    frames_indices: Sequence[int] | None = None
    frame_times: Sequence[float] | None = None

    def __iter__(self) -> Iterator[str]:
        """The names of the fields."""
        names = (field.name for field in dataclasses.fields(self))
        return (name for name in names if name != "frame_times" or self.frame_times is not None)

    def __len__(self) -> int:
        """The number of fields."""
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        """The field `name`."""
        if name not in tuple(self):
            raise KeyError(name)
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set the field `name`."""
        if name not in (field.name for field in dataclasses.fields(self)):
            raise KeyError(name)
        setattr(self, name, value)

    def time_of(self, index: int) -> float | None:
        """Seconds of a frame of the whole video; None where they are unknown."""
        if self.frame_times is not None:
            return float(self.frame_times[index])
        return index / self.fps if self.fps else None

    @property
    def timestamps(self) -> list[float]:
        """Seconds of the frames that were taken.

        Raises:
            MediaError: `fps` or `frames_indices` is unknown.
        """
        if self.fps is None or self.frames_indices is None:
            raise MediaError("Cannot infer video `timestamps` when `fps` or `frames_indices` is None.")
        times = map(self.time_of, self.frames_indices)
        return [time for time in times if time is not None]


SampleIndices = Callable[[VideoMetadata], Any]


class VideoLimits(TypedDict, total=False):
    """What a video may be at most, before its frames are decoded.

    max_pixels: of a frame; where PyAV is not installed, one frame is decoded to know its size.
    max_decoded_bytes: of the frames that are taken.
    max_seconds: how long it may be.
    """

    max_pixels: int
    max_decoded_bytes: int
    max_seconds: float


class NoDecoderError(MediaError, ImportError):
    """No package that decodes videos is installed."""


class _NoRateError(MediaError):
    """A container says neither how fast its frames are shown nor when."""


class _Reader(Protocol):
    """An open video: its numbers, and frames by index.

    `fps` is what the container claims. `times` are the seconds at which its frames begin, from the first one on, and
    the end of the last one where it is known; None without.
    """

    backend: str
    total: int
    fps: float | None
    times: np.ndarray | None
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
        # [T, 2]: the beginnings and ends of all frames, from their packets.
        self.times: np.ndarray | None = _from_first(self._reader.get_frame_timestamp(list(range(self.total)))[:, 0])
        # The container's size is not exposed; the first frame has it, with the rotation applied.
        shape: tuple[int, ...] = self._reader[0].shape if self.total else (0, 0)
        self.height, self.width = shape[0], shape[1]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self._reader.get_batch(list(indices)).asnumpy()


class _PyavReader:
    backend = "pyav"

    def __init__(self, source: Path | bytes) -> None:
        self._source = source
        with self._opened() as container:
            if not container.streams.video:
                raise MediaError("found no video stream; expected a video")
            stream = container.streams.video[0]
            self.fps = float(stream.average_rate) if stream.average_rate else None
            tick = float(stream.time_base or 0)
            claimed, seconds = stream.frames, (stream.duration or 0) * tick
            # Not the container's count: Matroska and WebM have none. This decodes nothing.
            packets = [(packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size]
        shown = [stamp for stamp, is_discarded in packets if not is_discarded]
        self.total = len(shown)
        self._stamps = sorted(stamp for stamp in shown if stamp is not None)
        has_all = len(self._stamps) == self.total
        self.times: np.ndarray | None = _from_first(np.array(self._stamps, np.float64) * tick) if has_all else None
        # Fewer packets, but to the end: a video that was cut short without being written anew.
        is_whole = self.times is not None and seconds - self.times[-1] <= 2 * seconds / self.total
        if len(packets) < claimed and not is_whole:
            raise MediaError(f"found the end before frame {len(packets)}; expected {claimed}, as the container says")
        with self._opened() as container:
            first = next(container.decode(video=0), None)
        shape: tuple[int, ...] = (0, 0) if first is None else self._to_rgb(first).shape
        self.height, self.width = shape[0], shape[1]

    def _opened(self) -> Any:
        """The container from its beginning; raw streams cannot be rewound."""
        import av

        return av.open(io.BytesIO(self._source) if isinstance(self._source, bytes) else str(self._source), mode="r")

    @staticmethod
    def _to_rgb(frame: Any) -> np.ndarray:
        """RGB [H, W, 3], turned the way the container says, as decord and players do."""
        return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        wanted = sorted(set(indices), reverse=True)
        found: dict[int, np.ndarray] = {}
        with self._opened() as container:
            container.streams.video[0].thread_type = "AUTO"
            for index, frame in enumerate(container.decode(video=0)):
                # Not every packet shows a frame: VP8 has some that others only refer to. The frame after it stands in.
                if self.times is not None and frame.pts is not None:
                    index = bisect_right(self._stamps, frame.pts) - 1
                while wanted and wanted[-1] <= index:
                    found[wanted.pop()] = self._to_rgb(frame)
                if not wanted:
                    break
        if wanted:
            raise MediaError(
                f"found the end before frame {wanted[-1]}; expected {self.total} frames, as the container says"
            )
        return np.stack([found[index] for index in indices])


class _PillowReader:
    """Animated GIF, WebP and PNG, which Pillow composes frame by frame."""

    backend = "pillow"

    def __init__(self, source: Path | bytes) -> None:
        self._image = PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        self.width, self.height = self._image.size
        self.total = getattr(self._image, "n_frames", 1)
        times = [0.0]
        for frame in PIL.ImageSequence.Iterator(self._image):
            frame.load()  # Some formats give a frame's time only now.
            times.append(times[-1] + (frame.info.get("duration", 0) / 1000 or _DEFAULT_GIF_SECONDS))
        self.times: np.ndarray | None = np.array(times)
        self.fps: float | None = self.total / times[-1]

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


def _from_first(times: np.ndarray) -> np.ndarray | None:
    """Seconds from the first frame on; None where they do not ascend, as in containers that have none."""
    return times - times[0] if len(times) and (np.diff(times) > 0).all() else None


def _check_pixels(height: int, width: int, most: int) -> None:
    if height * width > most:
        raise MediaError(f"found frames of {height} x {width} pixels; expected at most {most} pixels")


def _claimed_size(source: Path | bytes) -> tuple[int, int]:
    """Height and width that the container claims, without a frame decoded; zeros where PyAV cannot say."""
    try:
        import av

        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), mode="r") as container:
            context = container.streams.video[0].codec_context
            return context.height or 0, context.width or 0
    except Exception:  # Not installed; or a file that a decoder will say more of.
        return 0, 0


def _plan(
    reader: _Reader,
    sample_indices_fn: SampleIndices | None,
    max_pixels: int,
    max_decoded_bytes: int,
    max_seconds: float,
) -> VideoMetadata:
    """The metadata of an open video, with the frames to take, within the limits."""
    if reader.total <= 0 or reader.height <= 0 or reader.width <= 0:
        raise MediaError(
            f"found {reader.total} frames of {reader.height} x {reader.width} pixels; expected at least one"
        )
    _check_pixels(reader.height, reader.width, max_pixels)
    metadata = _timed(
        VideoMetadata(
            total_num_frames=reader.total, width=reader.width, height=reader.height, video_backend=reader.backend
        ),
        reader,
    )
    if (metadata.duration or 0) > max_seconds:
        raise MediaError(f"found {metadata.duration:.0f} seconds of video; expected at most {max_seconds:g}")
    if sample_indices_fn is None:
        indices = list(range(reader.total))
    elif metadata.fps is None:
        raise _NoRateError(
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


def _timed(metadata: VideoMetadata, reader: _Reader) -> VideoMetadata:
    """Add the rate, the duration and, where the rate does not tell them, the times of the frames.

    The rate that a container claims counts, as in the reference, where the times of the frames agree with it; recorders
    claim that of their clock, or none.
    """
    fps = reader.fps
    if fps is not None and not (math.isfinite(fps) and 0 < fps <= MAX_FPS):
        fps = None
    times = reader.times
    if times is not None and not _agree(times, fps):
        # Of a single frame without its end, there is no rate to find. Six digits are as many as times have, and keep
        # a rate of ten from being 10.000001, which takes other frames.
        fps = float(f"{(len(times) - 1) / times[-1]:.6g}") if len(times) > 1 else 1.0
        if not _agree(times, fps):
            end = float(times[-1]) + (len(times) == reader.total) / fps
            return dataclasses.replace(metadata, fps=fps, duration=end, frame_times=times[: reader.total].tolist())
    return dataclasses.replace(metadata, fps=fps, duration=None if fps is None else reader.total / fps)


def _agree(times: np.ndarray, fps: float | None) -> bool:
    """Whether frames are shown at times where a rate puts them."""
    if fps is None:
        return False
    drift = np.abs(times - np.arange(len(times)) / fps).max()
    return bool(drift <= min(_MAX_DRIFT_FRAMES / fps, _MAX_DRIFT_SECONDS))


def decode_video(
    source: Path | bytes,
    name: str,
    sample_indices_fn: SampleIndices | None = None,
    *,
    backend: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_decoded_bytes: int = MAX_DECODED_BYTES,
    max_seconds: float = math.inf,
) -> tuple[np.ndarray, VideoMetadata]:
    """Decode the frames that `sample_indices_fn` asks for, and no others into memory.

    Animated GIF, WebP and PNG go to Pillow, everything else to decord, or to PyAV where decord is not installed or
    cannot read the file (AV1, or what browsers record). A Matroska or WebM file that ends long before its
    container says is read as far as it goes, with a warning.

    Args:
        source: a file, or its content.
        name: what to call the source in errors.
        sample_indices_fn: metadata of the whole video -> indices of the frames to take; None takes all.
        backend: "decord", "pyav" or "pillow" to force one.
        max_pixels: largest frame.
        max_decoded_bytes: largest array of frames.
        max_seconds: longest video.

    Returns:
        frames [T, H, W, 3] uint8 RGB, and the metadata with `frames_indices` set.

    Raises:
        MediaError: the video cannot be decoded, is truncated, has no frames, or passes a limit.
        NoDecoderError: neither decord nor PyAV is installed.
    """
    if backend is not None and backend not in _READERS:
        raise MediaError(f"backend: found {backend!r}; expected one of {', '.join(sorted(_READERS))}")
    try:
        head = head_of(source)
        with naming(name, MediaError):
            check_is_video(head, source)
    except OSError as error:
        raise MediaError(f"{name}: found an unreadable file ({error}); expected a video") from error
    backends = ("pillow",) if is_animated_image(head) else ("decord", "pyav")
    if "pillow" not in backends:  # The readers decode a frame to know its size.
        with naming(name, MediaError):
            _check_pixels(*_claimed_size(source), max_pixels)
    verdict = "found no readable video, perhaps a truncated or corrupt one; expected a video"
    problems: list[str] = []
    hint = ""
    cause: Exception | None = None
    for candidate in backends if backend is None else (backend,):
        try:
            reader = _READERS[candidate](source)
        except ImportError:
            logger.debug("%s is not installed", candidate)
            if candidate == "pyav":
                hint = f"; PyAV reads more kinds of video: {_INSTALL}"
            continue
        except Exception as error:  # Decoders raise what they like on broken files: RuntimeError, EOFError, their own.
            if isinstance(error, MediaError):
                verdict = str(error)
            else:
                problems.append(f"{candidate}: {shortened(error)}")
            cause = error
            continue
        try:
            metadata = _plan(reader, sample_indices_fn, max_pixels, max_decoded_bytes, max_seconds)
        except _NoRateError as error:
            verdict, cause = str(error), error
            continue
        except MediaError as error:
            raise MediaError(f"{name}: {error}") from error
        try:
            frames = reader.read(metadata.frames_indices or ())
        except Exception as error:  # As above.
            if isinstance(error, MediaError):
                verdict = str(error)
            else:
                problems.append(f"{candidate}: {shortened(error)}")
            cause = error
            continue
        warn_if_truncated(source, name, metadata.duration)
        return frames, metadata
    if cause is None:
        raise NoDecoderError(f"{name}: found no decoder; expected decord or PyAV: {_INSTALL}")
    details = f" ({'; '.join(problems)})" if problems else ""
    raise MediaError(f"{name}: {verdict}{details}{hint}") from cause


def shortened(error: Exception) -> str:
    """The start of what a decoder says, without error numbers, places in C++ and stack traces."""
    lines = str(error).strip().splitlines()
    line = re.sub(r"^(\[\d\d:\d\d:\d\d\] \S+:\d+: |\[Errno -?\d+\] )", "", lines[0]) if lines else repr(error)
    return line if len(line) <= _PROBLEM_CHARACTERS else line[: _PROBLEM_CHARACTERS - 3] + "..."
