"""What the subcommands share: checks of options, and what they say while they work."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator

import rich.console

from glm4v_jax.errors import CheckpointError, MediaError

ADDRESSES = ("http://", "https://", "file://", "data:")
"""How what is no path begins."""


def check_model(directory: str) -> None:
    """Misses a checkpoint's directory before anything slow begins.

    Raises:
      CheckpointError: there is none.
    """
    # Not pathlib: it takes an empty name for the current directory.
    if not os.path.isdir(directory):
        raise CheckpointError(
            f"--model {directory or repr(directory)}: not a directory; nothing is downloaded: give the directory of a "
            "downloaded checkpoint"
        )


def check_files(places: Iterable[str]) -> None:
    """Misses files before anything slow begins.

    Raises:
      MediaError: some are not there, or are directories; the message names all of them.
    """
    problems = []
    for place in places:
        if place.startswith(ADDRESSES):
            continue
        path = pathlib.Path(place)
        if not place or not path.exists():
            problems.append(f"{place or repr(place)}: there is no such file")
        elif path.is_dir():
            problems.append(f"{place}: is a directory; expected a picture or a video")
    if problems:
        raise MediaError("; ".join(problems))


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Says what is going on, to a person: where standard error is no terminal, nothing is shown."""
    console = rich.console.Console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def silent_decoders() -> Iterator[None]:
    """Keeps what C libraries log to file descriptor 2 off the screen: the exception says it in words of ours.

    FFmpeg inside decord complains there before Python hears of it. Python's own standard error is not affected.
    """
    screen = os.dup(2)
    with open(screen, "w", encoding=sys.stderr.encoding) as python_stderr, open(os.devnull, "w") as nowhere:
        sys.stderr.flush()
        os.dup2(nowhere.fileno(), 2)
        try:
            with contextlib.redirect_stderr(python_stderr):
                yield
        finally:
            os.dup2(screen, 2)


@contextlib.contextmanager
def quiet_ffmpeg() -> Iterator[None]:
    """Keeps FFmpeg inside decord from logging, and nothing else: what a library says before it aborts is still heard.

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


def one_line(error: Exception) -> str:
    """What an error says, in a line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
