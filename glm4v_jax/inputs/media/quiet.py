"""What decoders log, kept off the screen."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def silent_decoders() -> Iterator[None]:
    """Keep what C libraries log to file descriptor 2 off the screen: the exception says it in words of ours.

    FFmpeg inside decord complains there before Python hears of it. Python's own standard error is not affected.
    """
    screen = os.dup(2)
    with open(screen, "w", encoding=sys.stderr.encoding) as python_stderr, open(os.devnull, "w") as nowhere:
        sys.stderr.flush()
        # A program may have sent it elsewhere, as with --quiet.
        redirected = contextlib.redirect_stderr(python_stderr) if _is_screen(sys.stderr) else contextlib.nullcontext()
        os.dup2(nowhere.fileno(), 2)
        try:
            with redirected, without_size_warnings():
                yield
        finally:
            os.dup2(screen, 2)


def _is_screen(stream: TextIO) -> bool:
    """Whether a stream writes to file descriptor 2."""
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):  # of a notebook, or in memory
        return False


@contextlib.contextmanager
def quiet_ffmpeg() -> Iterator[None]:
    """Keep FFmpeg inside decord from logging, and nothing else: what a library says before it aborts is still heard.

    For long work, where `silent_decoders` would hide too much.
    """
    try:
        import decord
    except (ImportError, OSError):  # not installed, or without a library it needs: then it does not log either
        yield
        return
    decord.logging.set_level(decord.logging.QUIET)
    try:
        yield
    finally:
        decord.logging.set_level(decord.logging.ERROR)  # as decord itself sets it


@contextlib.contextmanager
def without_size_warnings() -> Iterator[None]:
    """Keep Pillow from warning of images that are large, but not too large for this package."""
    with warnings.catch_warnings():
        # Not by its class: Pillow is slow to import, and not every run shows an image.
        warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit of \d+ pixels, could be")
        yield
