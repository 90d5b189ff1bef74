"""Whether the files of a checkpoint are what was written: found by their sizes before anything is loaded."""

import errno
import json
import re
from pathlib import Path

import jax

from glm4v_jax.checkpoints.orbax_write import os_errors
from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import replacing

_SIZES = "sizes.json"
"""File of a checkpoint: path of each other file -> its bytes."""

# What TensorStore and the system say of files that can be read, and are not complete, is damage. This is not:
_TROUBLE = re.compile("(RESOURCE_EXHAUSTED|UNAVAILABLE|PERMISSION_DENIED|DEADLINE_EXCEEDED|ABORTED|CANCELLED)")
_GONE = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_SAID = 160


class DamagedError(CheckpointError):
    """Files of a checkpoint are missing, or are not what was written."""


def note_sizes(path: Path) -> None:
    """Write the sizes of a checkpoint's files beside them; OSError if the directory is gone or cannot be written."""
    sizes = _sizes_in(path)
    with replacing(path / _SIZES) as aside:
        aside.write_text(json.dumps(sizes), encoding="utf-8")


def check_sizes(path: Path) -> None:
    """Check that a checkpoint's files have the sizes that were noted, if they were.

    Raises:
      DamagedError: one has another size, or is missing.
    """
    try:
        expected = json.loads((path / _SIZES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # of an earlier version, or not noted, or damaged itself
    found = _sizes_in(path)
    for name, size in expected.items():
        if found.get(name) != size:
            bytes_found = f"{found[name]:,} bytes" if name in found else "nothing"
            raise damaged(path, f"{name}: {bytes_found} of {size:,}")


def damaged(path: Path, what: str) -> DamagedError:
    """Return the error of a damaged checkpoint."""
    return DamagedError(f"{path}: found damaged files ({what}); expected a complete checkpoint")


def problem(path: Path, error: BaseException) -> Exception:
    """Return the error to raise for Orbax's: that of the machine, if it is one, or of a damaged checkpoint."""
    while "incompatible handler" in str(error) and (inner := error.__cause__ or error.__context__) is not None:
        error = inner  # says why
    try:
        with os_errors(path):
            raise error
    except (MemoryError, jax.errors.JaxRuntimeError) as trouble:
        return trouble
    except OSError as trouble:
        if trouble.errno not in _GONE:
            return trouble
    except BaseException:
        if _TROUBLE.match(str(error)):
            return CheckpointError(f"{path}: found {_text(error)}; expected to read it")
    return damaged(path, _text(error))


def _sizes_in(path: Path) -> dict[str, int]:
    """Path of a file in a checkpoint -> its bytes; without those that NFS keeps while a process still reads them."""
    names = (file for file in path.rglob("*") if _SIZES not in file.name and not file.name.startswith(".nfs"))
    files = filter(Path.is_file, names)
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def _text(error: BaseException) -> str:
    """What an error says, in a line, without TensorStore's settings; of a long text, what stands last is the cause."""
    said = " ".join(str(error).partition("[tensorstore_spec")[0].split())
    if len(said) > _SAID:
        said = f"{said.partition(':')[0]}: ... {said[-_SAID:]}"
    return f"{type(error).__name__}: {said}" if isinstance(error, LookupError) or not said else said
