"""The named errors of this package.

Every one of them is a `ValueError`, so that code written against the reference (which raises plain `ValueError`) keeps
working, and every message names the file or field, what was found, and what was expected.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path


class Glm4vError(ValueError):
    """Base of all errors that a user's input can cause; the command line prints them as one line.

    Attributes:
      faults: what is wrong, one by one; the message alone where that is one thing.
    """

    def __init__(self, message: str = "", faults: Sequence[str] = ()):
        super().__init__(message)
        self.faults = tuple(faults) or (message,)


class ConfigError(Glm4vError):
    """A configuration is contradictory, incomplete or not that of a GLM-4.1V model."""


class CheckpointError(Glm4vError):
    """A directory is not a checkpoint, or its tensors are missing, unexpected, misshapen, truncated or corrupt."""


class MemoryShortageError(Glm4vError):
    """What is to be loaded does not fit into memory; the message has both numbers, and what would fit."""


class MediaError(Glm4vError):
    """An image or video cannot be fetched, decoded or prepared."""


class MessageError(Glm4vError):
    """A conversation has an unknown role or content type, or its placeholders and media do not match."""


class GenerationError(Glm4vError):
    """Generation was asked for something impossible: a prompt too long, a negative temperature, ..."""


class DataError(Glm4vError):
    """A row of training or evaluation data is not what it should be; the message says where it stands."""


@contextlib.contextmanager
def naming(
    place: object, raised: type[Glm4vError] | None = None, *, begins: str | tuple[str, ...] = ""
) -> Iterator[None]:
    """Put the file or field that errors of the body are about before their message.

    >>> with naming("data.files"):
    ...     open("none.jsonl")
    Traceback (most recent call last):
      ...
    glm4v_jax.errors.DataError: data.files: none.jsonl: found no such file or directory; expected one

    Args:
      place: the file or field; what a message repeats of its end is left out.
      raised: the class to raise; by default that of the error, or `DataError` for an `OSError`, which others let pass.
      begins: only messages that begin with one of these are meant, and no `OSError`.
    """
    try:
        yield
    except OSError as error:
        if raised is not None or begins:
            raise
        raise DataError(f"{place}: {one_line(error)}") from error
    except Glm4vError as error:
        said = str(error)
        if not said.startswith(begins):
            raise
        repeated, colon, rest = said.partition(": ")
        # Whole words of a field, or the name of a file: "lora" stays after "/models/lora".
        if colon and re.search(rf"(?:^|[._-]|/(?=\S*\.)){re.escape(repeated)}\Z", str(place)):
            said = rest
        raise (raised or type(error))(f"{place}: {said}", error.faults if len(error.faults) > 1 else ()) from error


_LISTED = 20


def raise_listed(problems: Sequence[Glm4vError], place: str, things: str) -> None:
    """Raise the only problem, or a `MessageError` with the first of several invalid things of a place, if any.

    Its message has several lines, which `one_line` keeps.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        faults = [" ".join(str(problem).split()) for problem in problems]
        more = [f"and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        found = f"{place}: found {len(faults)} invalid {things}; expected none:"
        raise MessageError("\n".join([found, *faults[:_LISTED], *more]), faults)


def not_there(place: str | os.PathLike[str], expected: str, field: str = "", kind: str = "file") -> str:
    """What to say of a file or directory that does not exist.

    >>> not_there("cat.png", "an image")
    'cat.png: found no such file; expected an image'
    >>> not_there("cat.png", "an image", "--image")
    '--image: found cat.png, no such file; expected an image'

    Args:
      place: its path.
      expected: what it should be.
      field: the option or field that names it.
      kind: "file" or "directory".
    """
    name = named(os.fspath(place))
    found = f"{field}: found {name}," if field else f"{name}: found"
    return f"{found} no such {kind}; expected {expected}"


def counted(number: int, thing: str, plural: str = "") -> str:
    """Return a number with what is counted.

    >>> counted(1, "device"), counted(1024, "device"), counted(0, "batch", "batches")
    ('1 device', '1,024 devices', '0 batches')
    """
    return f"{number:,} {thing if number == 1 else plural or f'{thing}s'}"


def named(place: str) -> str:
    """A place as a message names it, which shows an empty one too."""
    return place if place.strip() else repr(place)


def one_line(error: BaseException) -> str:
    """What an error says, in a line; that of `raise_listed` in several."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        kind = str(error.strerror).lower().removeprefix("no such ")
        return not_there(str(error.filename), "one", kind=kind)
    if isinstance(error, NotADirectoryError) and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        return f"{next((p for p in (path, *path.parents) if p.is_file()), path)}: found a file; expected a directory"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{named(str(error.filename))}: {error.strerror}"
    lines = str(error).split("\n") if isinstance(error, Glm4vError) and len(error.faults) > 1 else [str(error)]
    return "\n  ".join(" ".join(line.split()) for line in lines)
