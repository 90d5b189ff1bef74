"""Reading the text files of a checkpoint directory."""

import pathlib

from glm4v_jax.errors import CheckpointError


def read_text(path: pathlib.Path) -> str:
    """The text in a file, which is UTF-8.

    Raises:
      CheckpointError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not valid UTF-8 ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
