"""Errors of a job with the file and the field that they are about before the message."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from glm4v_jax.errors import DataError, Glm4vError, one_line
from train.config import TrainConfig


@contextlib.contextmanager
def naming_job(path: str | Path) -> Iterator[None]:
    """Put the job file before errors of the body that begin with one of its fields, as those of other files do not.

    >>> with naming_job("job.toml"):
    ...     raise DataError("eval.share: found 1 record; expected at least two")
    Traceback (most recent call last):
      ...
    glm4v_jax.errors.DataError: job.toml: eval.share: found 1 record; expected at least two
    """
    begins = tuple(f"{field.name}{end}" for field in dataclasses.fields(TrainConfig) for end in ":.")
    try:
        yield
    except Glm4vError as error:
        if not str(error).startswith(begins):
            raise
        raise type(error)(f"{path}: {error}", error.faults) from error


@contextlib.contextmanager
def naming_field(field: str) -> Iterator[None]:
    """Put a job's field before errors of the body, those of reading files included, which are `DataError` then.

    >>> with naming_field("data.files"):
    ...     open("none.jsonl")
    Traceback (most recent call last):
      ...
    glm4v_jax.errors.DataError: data.files: none.jsonl: found no such file or directory; expected one
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{field}: {one_line(error)}") from error
    except Glm4vError as error:
        said = str(error).removeprefix("mesh: ")  # the name of this field where it is an option
        raise type(error)(f"{field}: {said}", error.faults) from error
