"""A directory that appears under its name when it is complete, and not before."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from glm4v_jax.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows, where two runs into one directory are the user's to avoid
    fcntl = None  # type: ignore[assignment]

_UNFINISHED, _REPLACED = ".unfinished", ".replaced"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_target(source: Path | None, target: Path, *, overwrite: bool) -> None:
    """Refuse a place for a new directory before anything is read or written.

    Raises:
      CheckpointError: something is there and is not to be replaced, or it is the source, in it, or around it.
    """
    if source is not None:
        here, there = source.resolve(), target.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise CheckpointError(f"{target}: found the source, or a directory in or around it; expected another place")
    _put_back(_beside(target, _REPLACED), target)  # a process was killed between two renames: nothing is lost
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target}: found something that is no directory; expected nothing, or a directory")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"{target}: exists and is not empty; --overwrite replaces it")


def check_space(target: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
      CheckpointError: too little is free where `target` will be; the message has both figures.
    """
    place = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(f"{target}: needs {needed:,} bytes, found {free:,} free on the disk; nothing was written")


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
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished, replaced = _beside(target, _UNFINISHED), _beside(target, _REPLACED)
    unfinished.mkdir(exist_ok=True)
    with _locked(unfinished, target):
        try:
            _empty(unfinished)
            yield unfinished
            if target.exists() and overwrite:
                shutil.rmtree(replaced, ignore_errors=True)
                target.rename(replaced)
            unfinished.rename(target)  # an empty directory may be in its place
        except OSError as error:
            if error.errno in _FULL:
                raise CheckpointError(_full(target)) from error
            raise
        finally:
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
    target = target.absolute()
    return target.with_name(f".{target.name}{ending}")


def _put_back(replaced: Path, target: Path) -> None:
    """Undoes the first of the two renames where the second did not come about."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)


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
