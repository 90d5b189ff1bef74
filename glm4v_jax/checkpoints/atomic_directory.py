"""A directory that appears under its name when it is complete, and not before."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import is_orbax

try:
    import fcntl
except ImportError:  # Windows, where two runs into one directory are the user's to avoid
    fcntl = None  # type: ignore[assignment]

_UNFINISHED, _REPLACED = ".unfinished", ".replaced"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LISTED = 5


def place_of(target: Path) -> Path:
    """The absolute path, with a name for its last part even if `target` ends with "..", as a shell would have it."""
    return Path(os.path.abspath(target))


def is_unfinished(directory: str | Path) -> bool:
    """Whether this is the name that a directory of `new_directory` has before it is complete."""
    name = place_of(Path(directory)).name
    return name.startswith(".") and name.endswith(_UNFINISHED)


def left_of(target: Path) -> Path | None:
    """What a run that could not clean up has left of its output, or of what it was to replace."""
    beside = (_beside(target, _UNFINISHED), _beside(target, _REPLACED))
    return next((path for path in beside if path.exists()), None)


def check_target(source: Path | None, target: Path, *, overwrite: bool, dry_run: bool = False) -> None:
    """Refuse a place for a new directory before anything is read or written.

    Args:
      source: what the new directory is made from, if there is one.
      target: the place.
      overwrite: whether a checkpoint that is there may be replaced; nothing else ever is.
      dry_run: change nothing; otherwise a checkpoint that a killed process had put aside gets its name back.

    Raises:
      CheckpointError: something is there and is not to be replaced, or it is the source, in it, or around it, or the
        root of a file system, which cannot be renamed.
    """
    place = place_of(target)
    if os.path.ismount(place):
        raise CheckpointError(f"{target}: found a mount point, which cannot be replaced; expected a directory in it")
    if source is not None:
        here, there = source.resolve(), place.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise CheckpointError(f"{target}: found the source, or a directory in or around it; expected another place")
    replaced = _beside(place, _REPLACED)
    if not dry_run:
        _put_back(replaced, place)  # a process was killed between two renames: nothing is lost
    elif replaced.exists() and not place.exists():
        place = replaced
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise CheckpointError(f"{target}: found something that is no directory; expected nothing, or a directory")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not _is_checkpoint(place):
        found = sorted(path.name for path in place.iterdir())
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise CheckpointError(
            f"{target}: exists and is not empty, and is no checkpoint: found {', '.join(found[:_LISTED])}{more}; "
            "expected nothing, an empty directory, or a checkpoint to replace with --overwrite"
        )
    if not overwrite:
        raise CheckpointError(f"{target}: exists and is not empty; --overwrite replaces it")


def check_space(target: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
      CheckpointError: too little is free where `target` will be; the message has both figures.
    """
    place = next(parent for parent in place_of(target).parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(f"{target}: needs {needed:,} bytes, found {free:,} free on the disk; nothing was written")


def check_room(source: Path | None, target: Path, needed: int, *, overwrite: bool, dry_run: bool = False) -> None:
    """`check_target` and `check_space`.

    Raises:
      CheckpointError: the place is taken, or the disk is too full.
    """
    check_target(source, target, overwrite=overwrite, dry_run=dry_run)
    check_space(target, needed)


def move_up(directory: Path) -> None:
    """Move what is in a directory to where that is, and remove it."""
    for entry in directory.iterdir():
        entry.rename(directory.parent / entry.name)
    directory.rmdir()


@contextlib.contextmanager
def new_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, which takes its name, and the place of what had it, when the body is done.

    Until then it is called `.NAME.unfinished`. Whatever ends the body removes it; what a killed process left is removed
    by the next one that writes to the same place.

    Args:
      target: its name; its parents are made.
      overwrite: whether something may be there; it stays until the new directory is complete.

    Raises:
      CheckpointError: another process is writing it, or the disk is full.
    """
    target = place_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished, replaced = _beside(target, _UNFINISHED), _beside(target, _REPLACED)
    unfinished.mkdir(exist_ok=True)
    with _locked(unfinished, target):
        renamed = False
        try:
            _empty(unfinished)
            yield unfinished
            if target.exists() and overwrite:
                shutil.rmtree(replaced, ignore_errors=True)
                target.rename(replaced)
            unfinished.rename(target)  # an empty directory may be in its place
            renamed = True
        except OSError as error:
            if error.errno in _FULL:
                raise CheckpointError(_full(target)) from error
            raise
        finally:
            if not renamed:  # or what has this name now is the next run's
                _put_back(replaced, target)
                shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path, target: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however it ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{target}: another process is writing it") from error
        yield
    finally:
        os.close(descriptor)


def _beside(target: Path, ending: str) -> Path:
    target = place_of(target)
    return target.with_name(f".{target.name}{ending}")


def _put_back(replaced: Path, target: Path) -> None:
    """Undoes the first of the two renames where the second did not come about."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)


def _is_checkpoint(directory: Path) -> bool:
    """Whether a directory holds a checkpoint, or what remains of one."""
    return is_orbax(directory) or (directory / "config.json").is_file() or any(directory.glob("*.safetensors"))


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _full(target: Path) -> str:
    free = shutil.disk_usage(target.parent).free
    gone = "what was written has been removed, the source is as it was"
    return f"{target}: the disk is full ({free:,} bytes free); {gone}"
