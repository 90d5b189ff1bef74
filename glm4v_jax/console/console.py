"""What the subcommands share: checks of options, and what they say while they work."""

import contextlib
import os
import pathlib
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
