"""What a file is, and how long a video is, by its first bytes: before a decoder reads it, or prints about it."""

import io
import math
import re
import struct
import warnings
from pathlib import Path

import PIL.Image

from glm4v_jax.errors import MediaError

# What of a file is read to find its kind; no video container has this many bytes without a control character.
_HEAD_BYTES = 1024
# As much of a JPEG as is read to distinguish a photo from a stream of them (Motion JPEG).
_MOTION_JPEG_BYTES = 2**26
# As much of Matroska as is read to find how long the video was when it was written.
_HEADER_BYTES = 2**14
# As much of its end may be missing: other tracks, and the pauses that they end with, are part of a container.
_MISSING_SECONDS, _MISSING_FRACTION = 1.0, 0.05
_MATROSKA = b"\x1a\x45\xdf\xa3"
_PILLOW_SIGNATURES = (b"GIF87a", b"GIF89a", b"\x89PNG\r\n\x1a\n")


def head_of(source: Path | bytes, size: int = _HEAD_BYTES) -> bytes:
    """Read how a file begins; OSError if it cannot be read."""
    if isinstance(source, bytes):
        return source[:size]
    with source.open("rb") as file:
        return file.read(size)


def is_animated_image(head: bytes) -> bool:
    """Whether a file may hold several images for Pillow, by how it begins: GIF, PNG or WebP."""
    return head.startswith(_PILLOW_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def is_still_image(source: Path | bytes) -> bool:
    """Whether a file is one image, which FFmpeg would take for a video without size or of one frame.

    Raises:
        OSError: it cannot be read.
    """
    head = head_of(source)
    if head.startswith(b"\xff\xd8\xff"):
        data = head_of(source, _MOTION_JPEG_BYTES)
        # Photos of several views (MPO) hold several images too, and say so.
        return b"\xff\xd9\xff\xd8\xff" not in data or b"MPF\0" in data
    if head.startswith((b"II*\0", b"MM\0*")) or (head[:2] == b"BM" and head[6:10] == bytes(4)):
        return True
    if head[4:8] == b"ftyp":
        return head[8:12] in (b"avif", b"heic", b"heix", b"mif1")
    if not is_animated_image(head):
        return False
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return getattr(image, "n_frames", 1) == 1
    except Exception:  # Broken: the reader will say how.
        return False


def check_is_video(head: bytes, source: Path | bytes) -> None:
    """Refuse files that are plainly not videos, before a decoder prints about them.

    Raises:
        MediaError: it is not a video, or a truncated AVI.
    """
    found = kind_of_file(source, head)
    if found not in (None, "a video"):
        frames = "; frames of a video are a directory, or a list of several" if found == "an image" else ""
        raise MediaError(f"found {found}; expected a video{frames}")
    # Of a truncated one in memory, decord ends the process.
    if _is_avi(head):
        expected = 8 + int.from_bytes(head[4:8], "little")
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size < expected:
            raise MediaError(f"found the end after {size} bytes; expected {expected} bytes, as the container says")


def kind_of_file(source: Path | bytes, head: bytes | None = None) -> str | None:
    """Say what a file is, by how it begins: "a video", "text", ...; None where that does not show it.

    `head` is its beginning, where that has been read. OSError if it cannot be read.
    """
    head = head_of(source) if head is None else head
    if not head:
        return "an empty file"
    if head.startswith(b"%PDF-"):
        return "a PDF"
    if _is_text(head):
        return "an SVG drawing" if b"<svg" in head else "text"
    if is_still_image(source):
        return "an image"
    is_video = head.startswith((_MATROSKA, b"FLV\x01", b"\0\0\1\xba", b"OggS")) or head[4:8] in (b"ftyp", b"moov")
    return "a video" if is_video or _is_avi(head) else None


def _is_avi(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] == b"AVI "


def _claimed_seconds(source: Path | bytes) -> float | None:
    """How long a Matroska or WebM file says it is; None of others, whose end decoders miss themselves.

    decord does not say, and PyAV may not be installed.
    """
    head = head_of(source, _HEADER_BYTES)
    if not head.startswith(_MATROSKA):
        return None
    info = head.partition(b"\x15\x49\xa9\x66")[2]
    found = re.search(rb"\x44\x89(?:\x88(.{8})|\x84(.{4}))", info, re.DOTALL)
    if found is None:
        return None
    scale = re.search(rb"\x2a\xd7\xb1\x83(.{3})", info, re.DOTALL)
    ticks = struct.unpack(">d", found[1])[0] if found[1] else struct.unpack(">f", found[2])[0]
    return float(ticks * (int.from_bytes(scale[1], "big") if scale else 10**6) / 1e9)


def warn_if_truncated(source: Path | bytes, name: str, seconds: float | None) -> None:
    """Warn if a video has frames for fewer seconds than its container says: it is probably truncated."""
    claimed = _claimed_seconds(source)
    if claimed is None or seconds is None or not math.isfinite(claimed):
        return
    if claimed - seconds > max(_MISSING_SECONDS, _MISSING_FRACTION * claimed):
        warnings.warn(
            f"{name}: found {seconds:.1f} s of video; expected {claimed:.1f} s, as the container says: the file is "
            "probably truncated",
            stacklevel=3,
        )


def _is_text(head: bytes) -> bool:
    """Whether a file begins as prose does. FFmpeg would show it as a video of a terminal."""
    return bool(head) and not any(byte < 32 and byte not in b"\t\n\f\r" for byte in head)
