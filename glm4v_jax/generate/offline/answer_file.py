"""The file that the answers of a batch are appended to, and that a later run resumes.

One JSON object per line, in the order of completion. Every line has a `key`, a digest of what it is the answer to. A
line is written at once, so what a killed process leaves is complete lines and perhaps the beginning of one. A lock file
beside it keeps other processes out, from before it is read until it is closed.
"""

import errno
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Self

import filelock

from glm4v_jax.errors import GenerationError
from glm4v_jax.files import naming_file, replacing, to_json


def open_answers(open_file: Callable[[], "AnswerFile"], keys: Mapping[int | str, str]) -> "AnswerFile":
    """Open the file of answers: in several processes the first one opens and writes it, and shares what is done.

    `keys`: name -> digest of what is asked, for all prompts. MessageError if another process has other keys; and what
    `open_file` raises.
    """
    from glm4v_jax.devices.distributed import agree, has_joined, is_first, shared

    if not has_joined():
        return open_file()
    import numpy as np

    agree("prompts, model and options", list(keys.items()))
    file = open_file() if is_first() else _UnwrittenAnswers()
    is_done = shared(np.array([name in file.done for name in keys], np.bool_))
    file.done = {name for name, done in zip(keys, is_done.tolist(), strict=True) if done}
    return file


class AnswerFile:
    """Finished lines of earlier runs, and place for more."""

    def __init__(
        self, path: str, field: str, keys: Mapping[int | str, str], *, restart: bool, keep_others: bool = False
    ):
        """Open.

        Args:
          path: of the file, which need not exist.
          field: the field of a line for its prompt's name, as "index" or "file".
          keys: name -> digest of what is asked, for all prompts.
          restart: replace the content, with the first answer, instead of resuming.
          keep_others: keep finished lines of names that are not in `keys`; refuse them otherwise.

        Raises:
          OSError: the file cannot be read or written, or another process is writing it.
          GenerationError: it was not written by this program, or for other prompts or options.
        """
        self.done: set[int | str] = set()
        """Names of the answered prompts."""
        self._field, self._keys, self._keep_others = field, keys, keep_others
        self._path = pathlib.Path(path)
        target = self._path.resolve()  # of a link, what it leads to
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(self._path.parent))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "found a directory; expected a file", path)
        self._lock = filelock.FileLock(target.with_name(f".{target.name}.lock"))
        try:
            self._lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing it", path) from error
        self._file: BinaryIO | None = None
        self._new: pathlib.Path | None = None
        """Removed if nothing is written to it: whatever ended the run, as too little memory, leaves no trace."""
        self._replaced: pathlib.Path | None = None
        """Emptied with the first answer, and not before."""
        try:
            if restart:
                self._check_own()
            elif target.exists():
                lines, is_clean = self._read()
                if not is_clean:
                    with replacing(target) as aside:
                        aside.write_bytes(b"".join(lines))
                        shutil.copymode(target, aside)
            is_new = not target.exists()
            self._file = target.open("ab")
            self._new = target if is_new else None
            self._replaced = target if restart and not is_new else None
            self._start = 0 if restart else self._file.tell()
        except BaseException:
            self.close()
            raise

    def append(self, name: int | str, line: Mapping[str, Any]) -> None:
        """Write the answer to a prompt as a line."""
        assert self._file is not None
        with naming_file(self._path):
            if self._replaced is not None:
                self._file.close()
                self._file, self._replaced = self._replaced.open("wb"), None
            self._new = None
            self._file.write(_encoded({self._field: name, "key": self._keys[name], **line}))
            self._file.flush()

    def written(self) -> tuple[int, int]:
        """Count answers and errors of this run in the file, also where Ctrl-C comes between a line and its count."""
        if self._replaced is not None:
            return 0, 0
        with self._path.open("rb") as file:
            file.seek(self._start)
            lines = [json.loads(line) for line in file if line.endswith(b"\n")]
        failed = sum("error" in line for line in lines)
        return len(lines) - failed, failed

    def close(self) -> None:
        """Close the file and remove the lock."""
        try:
            if self._file is not None:
                with naming_file(self._path):
                    self._file.close()  # a full disk refuses the rest once more
                if self._new is not None:
                    self._new.unlink()
        finally:
            if self._lock.is_locked:
                pathlib.Path(self._lock.lock_file).unlink(missing_ok=True)
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self) -> tuple[list[bytes], bool]:
        """The finished lines, and whether that is all there is."""
        lines, is_clean = [], True
        for number, line in enumerate(self._path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n") and self._is_beginning(line):
                is_clean = False
                continue
            name, is_finished = self._check(line, number)
            if not is_finished or name in self.done:
                is_clean = False
                continue
            if name in self._keys:
                self.done.add(name)
            lines.append(line)
        return lines, is_clean

    def _check_own(self) -> None:
        """Keep `restart` from emptying another kind of file; GenerationError if it is not a file of answers."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            line = file.readline()
        if line and not self._is_beginning(line):
            raise GenerationError(f"{self._path}: found no file of answers to replace; expected one, or another --out")

    def _is_beginning(self, line: bytes) -> bool:
        """Whether a line can be the beginning of one of `append`."""
        start = _encoded({self._field: 0})[: -len("0}\n")]
        return line.startswith(start) or start.startswith(line)

    def _check(self, line: bytes, number: int) -> tuple[int | str, bool]:
        """The name in a line, and whether the line is an answer and not an error.

        Raises:
          GenerationError: it was not written by `append`, or answers something else than is asked now.
        """
        where = f"{self._path}:{number}"
        hint = "pass --restart to replace the file, or another --out"
        try:
            found = json.loads(line)
            name, key, failed = found[self._field], found["key"], "error" in found
            if not isinstance(name, int | str) or not isinstance(key, str):
                raise TypeError("name and key")
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise GenerationError(f"{where}: found no answer of this command; expected one per line; {hint}") from error
        if name not in self._keys:
            if self._keep_others:
                return name, not failed
            raise GenerationError(f"{where}: found {self._field} {name!r}; expected one of the prompts; {hint}")
        if not failed and key != self._keys[name]:
            raise GenerationError(
                f"{where}: found the answer to another prompt or with other options for {self._field} {name!r}; "
                f"expected one to resume; {hint}"
            )
        return name, not failed


class _UnwrittenAnswers(AnswerFile):
    """What the other processes have: the first one writes."""

    def __init__(self) -> None:
        self.done = set()

    def append(self, name: int | str, line: Mapping[str, Any]) -> None:
        """Leave it to the first process."""

    def written(self) -> tuple[int, int]:
        """There is nothing to count; the first process prints."""
        return 0, 0

    def close(self) -> None:
        """There is nothing to close."""


def _encoded(line: Mapping[str, Any]) -> bytes:
    try:
        return f"{to_json(line, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return f"{to_json(line)}\n".encode()
