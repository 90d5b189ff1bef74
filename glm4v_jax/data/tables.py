"""Rows of JSON, JSON lines, Parquet and TSV files by their number, each with the place where it stands.

>>> import pathlib, tempfile
>>> with tempfile.TemporaryDirectory() as directory:
...     path = pathlib.Path(directory, "data.json")
...     _ = path.write_text('[{"question": "How many?"}, {"question": "Why?"}]')
...     rows = open_rows(path)
...     len(rows), rows[1], rows.place(1).removeprefix(directory)
(2, {'question': 'Why?'}, '/data.json[1]')

Rows can be pickled, which loaders with several processes need.
"""

import bisect
import csv
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glm4v_jax.data.media import kind_of
from glm4v_jax.errors import DataError

SUFFIXES = (".json", ".jsonl", ".parquet")
"""Of the data files that a directory is searched for, unless a caller asks for others too."""
TSV = ".tsv"
INFO = "dataset_info.json"

_ROWS_PER_BATCH = 8
"""Of a Parquet file that is read in order."""
_BUFFER = 1 << 20
"""Bytes of a column of such a file; without a buffer pyarrow reads the whole column of a row group."""
_LONGEST_INDEX = 64
"""An "image" of at most this many characters is the index of another row; so VLMEvalKit's `image_base.py`."""


class Rows(Protocol):
    """The rows of a file.

    Attributes:
        path: the file.
    """

    path: Path

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row; raise `DataError`, without the place, if it is not an object."""

    def place(self, index: int) -> str:
        """Where a row stands: "file:line" or "file[index]"."""


class JsonLines:
    """A file with one object a line; blank lines are skipped. Only the offsets of lines are kept in memory."""

    def __init__(self, path: Path):
        """Find the lines.

        Raises:
            OSError: the file cannot be read.
        """
        self.path = path
        starts, numbers = [], []
        start = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
        self._starts, self._numbers = np.asarray(starts, np.int64), np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Opened for every row: threads and processes share no position.
        with open(self.path, "rb") as file:
            file.seek(int(self._starts[index]))
            line = file.readline()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"found invalid JSON ({error}); expected an object") from error
        return _object(row)

    def place(self, index: int) -> str:
        """The file and the line, from 1."""
        return f"{self.path}:{self._numbers[index]}"


class RowList:
    """Rows in memory, each with a name that the form of places puts after the file's."""

    def __init__(self, path: Path, rows: Sequence[Any], names: Sequence[Any], form: str):
        self.path, self._rows, self._names, self._form = path, rows, names, form

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _object(self._rows[index])

    def place(self, index: int) -> str:
        """The file with the line, or with the position in it."""
        return self._form.format(self.path, self._names[index])


class Parquet:
    """A Parquet file. Row groups are read as they are needed and the latest is kept: small ones are better to shuffle.

    To read all rows in order take `in_order`, which keeps a few only.
    """

    def __init__(self, path: Path):
        """Read the number of rows.

        Raises:
            OSError: the file cannot be read.
            DataError: it is not a Parquet file, or pyarrow is not installed.
        """
        self.path = path
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
            raise DataError(f"{self.path}: needs pyarrow, which is not installed; pip install pyarrow") from error
        if not self.path.is_file():
            raise FileNotFoundError(2, "No such file or directory", str(self.path))
        try:
            return pyarrow.parquet.ParquetFile(self.path, **options)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{self.path}: found invalid Parquet ({error}); expected a Parquet file") from error

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
                except (OSError, ValueError) as error:  # pyarrow's own errors are both
                    raise DataError(f"row group {group} cannot be read ({error})") from error
        start = self._ends[group - 1] if group else 0
        return _object(kept[1].slice(index - start, 1).to_pylist()[0])

    def in_order(self) -> Iterator[dict[str, Any]]:
        """All rows, a few at a time: memory does not grow with the row groups, which may hold all images.

        Raises:
            DataError: the next row cannot be read. The message does not name the place.
        """
        import pyarrow

        try:
            with self._open(buffer_size=_BUFFER, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH):
                    for index in range(len(batch)):
                        yield batch.slice(index, 1).to_pylist()[0]
        except (OSError, ValueError) as error:  # pyarrow's own errors are both
            raise DataError(f"cannot be read from here on ({error})") from error
        finally:
            pyarrow.default_memory_pool().release_unused()

    def place(self, index: int) -> str:
        """The file and the row, from 0."""
        return f"{self.path}[{index}]"


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"found {kind_of(row)}; expected an object")
    return row


def open_rows(path: str | Path) -> Rows:
    """Open the rows of a file, by its suffix.

    - .jsonl: an object a line.
    - .json: a list of objects; an object whose "data" is such a list (DocVQA, TextVQA), or whose values are all
      objects (MathVista); or JSON lines.
    - .parquet.
    - .tsv, as of VLMEvalKit: a line of names, cells that may be quoted, images as base64 in "image", where a short text
      is the "index" of the row whose image it is. Empty cells are skipped.

    Raises:
        OSError: the file cannot be read.
        DataError: the suffix is another one, the content is not what it says, or there is no row.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    openers = {".json": _open_json, ".jsonl": JsonLines, ".parquet": Parquet, TSV: _read_tsv}
    if suffix not in openers:
        raise DataError(f"{path}: found the suffix {suffix!r}; expected {', '.join(openers)}")
    rows: Rows = openers[suffix](path)
    if not len(rows):
        raise DataError(f"{path}: found no row; expected at least one")
    return rows


def _open_json(path: Path) -> Rows:
    with open(path, "rb") as file:
        lines = (line for line in file if line.strip())
        first = next(lines, b"")
        is_only = next(lines, None) is None
    # A list is parsed once, as a whole; of JSON lines, which may be large, only the first line is.
    if not first.lstrip().startswith(b"["):
        try:
            content = json.loads(first)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and not (is_only and _rows_in(path, content)):
            return JsonLines(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{line}: found invalid JSON ({error}); expected a list of objects") from error
    rows = _rows_in(path, content)
    if rows is None:
        raise DataError(f"{path}: found {kind_of(content)}; expected a list of objects")
    return rows


def _rows_in(path: Path, content: Any) -> RowList | None:
    """The rows of a parsed file; None where it holds none in any of the ways of `open_rows`."""
    if isinstance(content, list):
        return RowList(path, content, range(len(content)), "{}[{}]")
    if not isinstance(content, dict) or not content:
        return None
    rows = content.get("data")
    if isinstance(rows, list) and rows:
        return RowList(path, rows, range(len(rows)), "{}: data[{}]")
    if all(isinstance(value, dict) for value in content.values()):
        return RowList(path, list(content.values()), list(content), "{}: {!r}")
    return None


def _read_tsv(path: Path) -> Rows:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    before = csv.field_size_limit(sys.maxsize)  # an image is one cell
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", restkey="", restval=None)
            for row in reader:
                if "" in row:
                    expected = len(reader.fieldnames or ())
                    found = expected + len(row[""])
                    raise DataError(
                        f"{path}:{reader.line_num}: found {found} cells; expected {expected} as in the first line"
                    )
                rows.append({name: cell for name, cell in row.items() if cell})
                lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: found invalid TSV ({error}); expected a TSV file in UTF-8") from error
    finally:
        csv.field_size_limit(before)
    _share_images(rows)
    return RowList(path, rows, lines, "{}:{}")


def _share_images(rows: Sequence[dict[str, Any]]) -> None:
    by_index: Mapping[Any, Any] = {row["index"]: row.get("image") for row in rows if "index" in row}
    for row in rows:
        image = row.get("image")
        if image is not None and len(image) <= _LONGEST_INDEX and len(by_index.get(image) or "") > _LONGEST_INDEX:
            row["image"] = by_index[image]


def find_files(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], suffixes: Sequence[str] = SUFFIXES
) -> Iterator[Path]:
    """Find the data files that a source names.

    Args:
        source: a file, a directory (its own files in the order of names), or several of these.
        suffixes: of a directory's data files, in lower case.

    Raises:
        OSError: a file or directory does not exist.
        DataError: a directory has no data file.
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
        raise DataError(f"{path}: found no data file; expected some of {', '.join(suffixes)}")
    yield from files
