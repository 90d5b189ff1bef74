"""What the subcommands share: checks of options, and what they say while they work."""

import contextlib
import json
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import rich.console
import tyro

from glm4v_jax.errors import CheckpointError, MediaError, MessageError

C = TypeVar("C")

ADDRESSES = ("http://", "https://", "file://", "data:")
"""How what is no path begins."""


class ListedError(MessageError):
    """Several things that are wrong, for a person a line each.

    Attributes:
      lines: what is wrong at all, and then with what.
    """

    def __init__(self, lines: Sequence[str]):
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


def named(place: str) -> str:
    """A place as a message names it, which shows an empty one too."""
    return place if place.strip() else repr(place)


def check_model(directory: str) -> None:
    """Misses a checkpoint's directory before anything slow begins.

    Raises:
      CheckpointError: there is none.
    """
    # Not pathlib: it takes an empty name for the current directory.
    if not os.path.isdir(directory):
        raise CheckpointError(
            f"--model {named(directory)}: not a directory; nothing is downloaded: give the directory of a "
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
            problems.append(f"{named(place)}: there is no such file")
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
            with contextlib.redirect_stderr(python_stderr), unsuspected_pictures():
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


@contextlib.contextmanager
def unsuspected_pictures() -> Iterator[None]:
    """Keeps Pillow from warning of pictures that are large, but not too large for this package."""
    with warnings.catch_warnings():
        # Not by its class: Pillow is slow to import, and not every run shows a picture.
        warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit of \d+ pixels, could be")
        yield


def one_line(error: Exception) -> str:
    """What an error says, in a line; that of a `ListedError` in several."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{named(str(error.filename))}: {error.strerror}"
    if isinstance(error, ListedError):
        return "\n  ".join(" ".join(line.split()) for line in error.lines)
    return " ".join(str(error).split())


def is_same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file; not if one of them leads nowhere."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives the name of a file beside `path`, which takes its place at the end of the block, or goes if that fails.

    Raises:
      OSError: what was raised inside, or by taking the place; it names `path`, whatever it was raised for.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException as error:
        # Of a file system that cannot be written, the first error says more.
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and str(error.filename) == str(aside):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps`, with null for what JSON has no number for: the logarithm of zero, and what is no number."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def parse(commands: Mapping[str, Callable[..., C]], arguments: Sequence[str], prog: str, description: str) -> C:
    """The subcommand that the arguments ask for; exits with status 0 for help, and 2 for options that it has not."""
    config = (tyro.conf.FlagCreatePairsOff,)
    if arguments and arguments[0] in commands:
        # By itself, so that complaints name the subcommand's help and not that of the program.
        name, *options = arguments
        return tyro.cli(commands[name], prog=f"{prog} {name}", args=options, config=config)
    return tyro.extras.subcommand_cli_from_dict(
        dict(commands), prog=prog, description=description, args=arguments, config=config
    )
