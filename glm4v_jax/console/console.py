"""What the subcommands share: checks of options, and what they say while they work."""

import contextlib
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import rich.console
import tyro

from glm4v_jax.errors import CheckpointError, MediaError, named

C = TypeVar("C")

MODEL = "GLM4V_MODEL"
"""The variable of the environment that names the model where no option does."""


def check_model(directory: str) -> None:
    """Misses a checkpoint's directory before anything slow begins.

    Raises:
      CheckpointError: there is none.
    """
    # Not pathlib: it takes an empty name for the current directory.
    if not os.path.isdir(directory):
        option = f"${MODEL}" if directory and directory == os.environ.get(MODEL) else "--model"
        raise CheckpointError(
            f"{option} {named(directory)}: not a directory; nothing is downloaded: give the directory of a "
            "downloaded checkpoint"
        )


def check_files(places: Iterable[str]) -> None:
    """Misses files before anything slow begins.

    Raises:
      MediaError: some are not there, or are directories; the message names all of them.
    """
    from glm4v_jax.inputs.media.fetch import is_address

    problems = []
    for place in places:
        if is_address(place):
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


def is_same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file; not if one of them leads nowhere."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


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
