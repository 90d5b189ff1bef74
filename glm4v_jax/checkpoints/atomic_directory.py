"""A directory that appears under its name when it is complete, and not before."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import is_orbax, made_directory

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk, or of a user's part of one, that has no room left."""

_UNFINISHED, _REPLACED, _LOCK = ".unfinished", ".replaced", ".lock"
_LISTED = 5


def place_of(target: Path) -> Path:
    """Return the absolute path, without any "..": its last part is the name of the directory."""
    return Path(os.path.abspath(target))


def is_unfinished(directory: str | Path) -> bool:
    """Return whether this is a name that `new_directory` gives to a directory before it is complete."""
    name = place_of(Path(directory)).name
    return name.startswith(".") and name.endswith(_UNFINISHED)


def left_of(target: Path) -> Path | None:
    """Return what a run that could not clean up has left: its output, or the checkpoint that it was to replace."""
    beside = (_beside(target, _UNFINISHED), _beside(target, _REPLACED))
    return next((path for path in beside if path.exists()), None)


def check_room(source: Path | None, target: Path, needed: int, *, overwrite: bool, dry_run: bool = False) -> None:
    """Check that a new directory of `needed` bytes can be made from `source`, before anything is read or written.

    `overwrite`: a checkpoint that is there may be replaced; nothing else ever is. Without `dry_run` one that a killed
    process had moved aside gets its name back.

    Raises:
      CheckpointError: something is there and may not be replaced; the target is the source, in it, or around it, or
        the root of a file system, which cannot be renamed; or too little is free on the disk.
    """
    _check_target(source, target, overwrite=overwrite, dry_run=dry_run)
    if (free := free_bytes(target)) < needed:
        raise CheckpointError(f"{target}: needs {needed:,} bytes, found {free:,} free on the disk; nothing was written")


def free_bytes(target: Path) -> int:
    """Return what is free on the disk of a directory, which need not exist."""
    place = place_of(target)
    return shutil.disk_usage(next(path for path in (place, *place.parents) if path.is_dir())).free


def _check_target(source: Path | None, target: Path, *, overwrite: bool, dry_run: bool) -> None:
    place = place_of(target)
    if os.path.ismount(place):
        raise CheckpointError(f"{target}: found a mount point, which cannot be replaced; expected a directory in it")
    if source is not None:
        here, there = source.resolve(), place.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise CheckpointError(
                f"{target}: found the source, or a directory in or around it; expected another directory"
            )
    replaced = _beside(place, _REPLACED)
    if not dry_run:
        _put_back(replaced, place)  # a process was killed between two renames: nothing is lost
    elif replaced.exists() and not place.exists():
        place = replaced
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise CheckpointError(f"{target}: found something that is not a directory; expected nothing, or a directory")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not _is_checkpoint(place):
        found = sorted(path.name for path in place.iterdir())
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise CheckpointError(
            f"{target}: found {', '.join(found[:_LISTED])}{more}, which is not a checkpoint; "
            "expected nothing, an empty directory, or a checkpoint to replace with --overwrite"
        )
    if not overwrite:
        raise CheckpointError(
            f"{target}: found a checkpoint; expected nothing, or an empty directory: --overwrite replaces it"
        )


def move_up(directory: Path) -> None:
    """Move the content of a directory into its parent, and remove it."""
    for entry in directory.iterdir():
        entry.rename(directory.parent / entry.name)
    directory.rmdir()


@contextlib.contextmanager
def new_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a directory to fill, which gets its name, and replaces what had it, when the body is done.

    Until then it is called `.NAME.unfinished`. Any error in the body removes it; what a killed process left is removed
    by the next one that writes the same directory. Parents are made; with `overwrite` a checkpoint may be there, which
    stays until the new directory is complete. CheckpointError if another process is writing it, or the disk is full.
    """
    target = place_of(target)
    unfinished, replaced = _beside(target, _UNFINISHED), _beside(target, _REPLACED)
    with made_directory(target.parent), locked(target):
        renamed = False
        try:
            if unfinished.exists():
                shutil.rmtree(unfinished)
            unfinished.mkdir()
            yield unfinished
            if target.exists() and overwrite:
                shutil.rmtree(replaced, ignore_errors=True)
                target.rename(replaced)
            unfinished.rename(target)  # an empty directory may be in its place
            renamed = True
        except OSError as error:
            if error.errno in FULL:
                raise CheckpointError(
                    full_disk(target, "what was written has been removed, the source is as it was")
                ) from error
            raise
        finally:
            if not renamed:  # else what has this name now belongs to the next run
                _put_back(replaced, target)
                shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def full_disk(target: Path, safe: str) -> str:
    """Word the error of a disk that is full; `safe` says what is as it was."""
    return f"{target}: found a full disk ({free_bytes(target):,} bytes free); expected room for the rest: {safe}"


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of a directory, a file beside it, which ends with the process, however that ends.

    Raises:
      CheckpointError: another process holds it.
      OSError: the disk has no locks, or cannot be written.
    """
    lock = filelock.FileLock(_beside(target, _LOCK))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise CheckpointError(
            f"{target}: found another process writing it, which holds {lock.lock_file}; expected none: wait for it to "
            "end, or choose another output directory; if it died with its host, remove that file"
        ) from error
    except OSError as error:
        if error.filename is None:  # of the lock itself, as on NFS without locks
            raise type(error)(error.errno, error.strerror, lock.lock_file) from error
        raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove an open file, but filelock does there
            Path(lock.lock_file).unlink()  # while it is held: the next process locks a file of its own
        lock.release()


def _beside(target: Path, ending: str) -> Path:
    target = place_of(target)
    return target.with_name(f".{target.name}{ending}")


def _put_back(replaced: Path, target: Path) -> None:
    """Undo the first of the two renames if the second did not happen."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)


def _is_checkpoint(directory: Path) -> bool:
    """Return whether a directory holds a checkpoint, or what remains of one."""
    return is_orbax(directory) or (directory / "config.json").is_file() or any(directory.glob("*.safetensors"))
