"""Reading the small files of a checkpoint directory."""

import json
import pathlib
from typing import Any

from glm4v_jax.errors import CheckpointError


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      CheckpointError: the file is missing, is not JSON, or holds something else than an object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint in Hugging Face layout")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


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
