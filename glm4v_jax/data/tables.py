"""Rows of json, jsonl and parquet files by their number, each with the place where it stands.

Objects of this module can be pickled, as loaders with several processes want.
"""

import bisect
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glm4v_jax.data.media import kind_of
from glm4v_jax.errors import DataError

SUFFIXES = (".json", ".jsonl", ".parquet")
INFO = "dataset_info.json"

_AT_A_TIME = 8
"""Rows of a table that is read in order."""
_BUFFER = 1 << 20
"""Of a column of such a table, in bytes; without, pyarrow reads a row group's whole column."""


class Rows(Protocol):
    """The rows of a file.

    Attributes:
        path: the file.
    """

    path: Path

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row; raises `DataError` if it is none. The message does not name the place."""

    def place(self, index: int) -> str:
        """Where it stands: "file:line" or "file[index]"."""


class JsonLines:
    """A file with an object a line; blank lines do not count. Only where lines begin is kept in memory."""

    def __init__(self, path: str | Path):
        """Find the lines.

        Raises:
            OSError: the file cannot be read.
        """
        self.path = Path(path)
        starts, numbers = [], []
        start = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
        self._starts, self._numbers = np.asarray(starts, np.int64), np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Opened anew: threads and processes share no position.
        with open(self.path, "rb") as file:
            file.seek(int(self._starts[index]))
            line = file.readline()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"found what is not JSON ({error}), expected an object") from error
        return _object(row)

    def place(self, index: int) -> str:
        """The file and the line, from 1."""
        return f"{self.path}:{self._numbers[index]}"


class JsonList:
    """A file with one list of objects, which is read as a whole."""

    def __init__(self, path: str | Path):
        """Read the file.

        Raises:
            OSError: it cannot be read.
            DataError: it is no JSON, or no list.
        """
        self.path = Path(path)
        try:
            content = json.loads(self.path.read_bytes())
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: found what is not JSON ({error}), expected a list") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: found what is not JSON ({error}), expected a list of objects") from error
        if not isinstance(content, list):
            raise DataError(f"{path}: found {kind_of(content)}, expected a list of objects")
        self._rows = content

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _object(self._rows[index])

    def place(self, index: int) -> str:
        """The file and the place in its list, from 0."""
        return f"{self.path}[{index}]"


class Parquet:
    """A table. Row groups are read as they are needed, and the latest is kept: small ones are better for shuffling.

    Who wants the rows in their order takes `in_order`, which keeps a few only.
    """

    def __init__(self, path: str | Path):
        """Read how many rows there are.

        Raises:
            OSError: the file cannot be read.
            DataError: it is no such file, or pyarrow is not installed.
        """
        self.path = Path(path)
        metadata = self._open().metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(sizes))
        self._kept: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def _open(self, **options: Any) -> Any:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(
                f"{self.path}: parquet needs pyarrow, which is not installed; pip install pyarrow"
            ) from error
        if not self.path.is_file():
            raise FileNotFoundError(2, "No such file or directory", str(self.path))
        try:
            return pyarrow.parquet.ParquetFile(self.path, **options)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{self.path}: is no readable parquet file ({error})") from error

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        group = bisect.bisect_right(self._ends, index)
        kept = self._kept
        if kept is None or kept[0] != group:
            with self._open() as file:
                try:
                    kept = self._kept = (group, file.read_row_group(group))
                except (OSError, ValueError) as error:  # of pyarrow, whose own errors are both
                    raise DataError(f"row group {group} cannot be read ({error})") from error
        start = self._ends[group - 1] if group else 0
        return _object(kept[1].slice(index - start, 1).to_pylist()[0])

    def in_order(self) -> Iterator[dict[str, Any]]:
        """All rows, some at a time: what is in memory does not grow with the row groups, which may hold all pictures.

        Raises:
            DataError: the next row cannot be read. The message does not name the place.
        """
        import pyarrow

        try:
            with self._open(buffer_size=_BUFFER, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=_AT_A_TIME):
                    for index in range(len(batch)):
                        yield batch.slice(index, 1).to_pylist()[0]
        except (OSError, ValueError) as error:  # of pyarrow, whose own errors are both
            raise DataError(f"cannot be read from here on ({error})") from error
        finally:
            pyarrow.default_memory_pool().release_unused()

    def place(self, index: int) -> str:
        """The file and the row, from 0."""
        return f"{self.path}[{index}]"


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"found {kind_of(row)}, expected an object")
    return row


def open_rows(path: str | Path) -> Rows:
    """The rows of a file, by the end of its name.

    Raises:
        OSError: it cannot be read.
        DataError: it is of another kind, is not what its name says, or has no row.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: found a file of kind {suffix or 'no name'}, expected {', '.join(SUFFIXES)}")
    rows: Rows
    if suffix == ".parquet":
        rows = Parquet(path)
    elif suffix == ".jsonl" or _begins_with_object(path):
        rows = JsonLines(path)
    else:
        rows = JsonList(path)
    if not len(rows):
        raise DataError(f"{path}: found no row, expected at least one")
    return rows


def _begins_with_object(path: Path) -> bool:
    """Whether a .json file has an object in a line at first, as many do that are JSON lines by content."""
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                try:
                    return isinstance(json.loads(line), dict)
                except (ValueError, RecursionError):
                    return False
    return False


def find_files(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], suffixes: Sequence[str] = SUFFIXES
) -> Iterator[Path]:
    """The data files that a person names: a file, a directory (its own files in the order of names), or several.

    Args:
        source: what is named.
        suffixes: ends of the names of a directory's data files, in lower case.

    Raises:
        OSError: something is not there.
        DataError: a directory has none.
    """
    if not isinstance(source, str | os.PathLike):
        for one in source:
            yield from find_files(one, suffixes)
        return
    path = Path(source)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        yield path
        return
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.name != INFO)
    if not files:
        raise DataError(f"{path}: found no data file, expected some of {', '.join(suffixes)}")
    yield from files
