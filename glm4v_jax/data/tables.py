"""Rows of JSON, JSON lines, Parquet, Arrow, CSV and TSV files by their number, each with the place where it stands.

>>> import pathlib, tempfile
>>> with tempfile.TemporaryDirectory() as directory:
...     path = pathlib.Path(directory, "data.json")
...     _ = path.write_text('[{"question": "How many?"}, {"question": "Why?"}]')
...     rows = open_rows(path)
...     len(rows), rows[1], rows.place(1).removeprefix(directory)
(2, {'question': 'Why?'}, '/data.json[1]')

Rows can be pickled, which loaders with several processes need.
"""

import ast
import bisect
import bz2
import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from glm4v_jax.data.media import kind_of
from glm4v_jax.errors import DataError

INFO = "dataset_info.json"
_STATE = "state.json"
_NO_DATA = (INFO, "dataset_dict.json", _STATE)
"""Files about others in a directory of data, of LLaMA-Factory and of `save_to_disk` of Hugging Face's datasets."""

_ARROW = (".arrow", ".feather", ".ipc")
_LINES = (".jsonl", ".ndjson")
_SEPARATED = {".csv": ",", ".tsv": "\t"}
_OPENERS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Suffixes of compressed text files."""
_WIDE_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""Byte order marks of text in two bytes a character, as PowerShell writes it."""
_LONGEST_LITERAL = 1_000_000

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
    """A file with one object a line; blank lines are skipped.

    Only the offsets of lines are kept in memory; of a compressed file all of its text.
    """

    def __init__(self, path: Path):
        """Find the lines.

        Raises:
            OSError: the file cannot be read.
            DataError: it is compressed, but not what its suffix says.
        """
        self.path = path
        self._text = _text_in_memory(path)
        starts, numbers = [], []
        start = 0
        with self._open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
        self._starts, self._numbers = np.asarray(starts, np.int64), np.asarray(numbers, np.int64)

    def _open(self) -> BinaryIO:
        return open(self.path, "rb") if self._text is None else io.BytesIO(self._text)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Opened for every row: threads and processes share no position.
        with self._open() as file:
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
        _check(self.path)
        import pyarrow
        import pyarrow.parquet

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


class Arrow:
    """An Arrow file: of `save_to_disk` and the cache of Hugging Face's datasets, or Feather; mapped into memory."""

    def __init__(self, path: Path):
        """Map the file.

        Raises:
            OSError: the file cannot be read.
            DataError: it is not an Arrow file, or pyarrow is not installed.
        """
        self.path = path
        self._table: Any = None
        self._length = len(self._rows())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}

    def _rows(self) -> Any:
        if self._table is None:
            _check(self.path)
            import pyarrow
            import pyarrow.ipc

            try:
                source = pyarrow.memory_map(str(self.path))
                try:
                    reader = pyarrow.ipc.open_file(source)
                except pyarrow.ArrowInvalid:
                    source.seek(0)
                    reader = pyarrow.ipc.open_stream(source)
                self._table = reader.read_all()
            except (pyarrow.ArrowInvalid, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # of the system, not of a file cut short
                    raise
                raise DataError(f"{self.path}: found invalid Arrow ({error}); expected an Arrow file") from error
        return self._table

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _object(self._rows().slice(range(len(self))[index], 1).to_pylist()[0])

    def place(self, index: int) -> str:
        """The file and the row, from 0."""
        return f"{self.path}[{index}]"


def _check(path: Path) -> None:
    """Check that pyarrow is installed and that a file exists."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise DataError(f"{path}: needs pyarrow, which is not installed; pip install pyarrow") from error
    if not path.is_file():
        raise FileNotFoundError(2, "No such file or directory", str(path))


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"found {kind_of(row)}; expected an object")
    return row


def open_rows(path: str | Path) -> Rows:
    """Open the rows of a file, by its suffix.

    - .jsonl, .ndjson: an object a line.
    - .json: a list of objects; an object whose "data" is such a list (DocVQA, TextVQA), or whose values are all
      objects (MathVista); or JSON lines.
    - .parquet; .arrow, .feather, .ipc.
    - .csv, .tsv: a line of names, cells that may be quoted. Empty cells are skipped. As VLMEvalKit's, images are
      base64 in "image", where a short text is the "index" of the row whose image it is.

    Text may begin with a byte order mark, and be compressed: .jsonl.gz, .csv.bz2, .json.xz.

    Raises:
        OSError: the file cannot be read.
        DataError: the suffix is another one, the content is not what it says, or there is no row.
    """
    path = Path(path)
    opener = _opener_of(path)
    if opener is None:
        suffix = "".join(path.suffixes[-2:]) if path.suffix.lower() in _OPENERS else path.suffix
        known = f"{', '.join(_TEXTS | _TABLES)}, or text compressed as {', '.join(_OPENERS)}"
        raise DataError(f"{path}: found the suffix {suffix!r}; expected {known}")
    rows: Rows = opener(path)
    if not len(rows):
        raise DataError(f"{path}: found no row; expected at least one")
    return rows


def _opener_of(path: Path) -> Callable[[Path], Rows] | None:
    if path.suffix.lower() in _OPENERS:
        return _TEXTS.get(Path(path.stem).suffix.lower())
    return (_TEXTS | _TABLES).get(path.suffix.lower())


def open_text(path: str | Path) -> BinaryIO:
    """Open a text file to read it in UTF-8, decompressed where its suffix is one of `.gz`, `.bz2` and `.xz`.

    Raises:
        OSError: the file cannot be read.
        DataError: it is not what its suffix or byte order mark says.
    """
    text = _text_in_memory(Path(path))
    return open(path, "rb") if text is None else io.BytesIO(text)


def _text_in_memory(path: Path) -> bytes | None:
    """The text of a file in UTF-8, where it is compressed or in another encoding; None if it can be read as it is.

    Raises:
        OSError: the file cannot be read.
        DataError: it is not what its suffix or byte order mark says.
    """
    is_compressed = path.suffix.lower() in _OPENERS
    opened = _OPENERS[path.suffix.lower()] if is_compressed else open
    try:
        with opened(path, "rb") as file:
            start = file.read(2)
            encoding = _WIDE_MARKS.get(start)
            if encoding is None:
                return start + file.read() if is_compressed else None
            return (start + file.read()).decode(encoding).encode()
    except (EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a complete file in UTF-8") from error
    except OSError as error:
        if is_compressed and error.errno is None:  # of bz2
            raise DataError(f"{path}: cannot be read ({error}); expected a complete file in UTF-8") from error
        raise


def _open_json(path: Path) -> Rows:
    text = _text_in_memory(path)
    with open(path, "rb") if text is None else io.BytesIO(text) as file:
        lines = (line for line in file if line.strip())
        first = next(lines, b"")
        is_only = next(lines, None) is None
    # A list is parsed once, as a whole; of JSON lines, which may be large, only the first line is.
    if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        try:
            content = json.loads(first)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and not (is_only and _rows_in(path, content)):
            return JsonLines(path)
    try:
        content = json.loads(path.read_bytes() if text is None else text)
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


def _read_separated(path: Path) -> Rows:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    suffix = next(suffix for suffix in reversed(path.suffixes) if suffix.lower() in _SEPARATED).lower()
    before = csv.field_size_limit(sys.maxsize)  # an image is one cell
    try:
        with io.TextIOWrapper(open_text(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=_SEPARATED[suffix], restkey="", restval=None)
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
        kind = suffix[1:].upper()
        raise DataError(f"{path}: found invalid {kind} ({error}); expected a {kind} file in UTF-8") from error
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


_TEXTS: dict[str, Callable[[Path], Rows]] = {
    ".json": _open_json,
    **dict.fromkeys(_LINES, JsonLines),
    **dict.fromkeys(_SEPARATED, _read_separated),
}
_TABLES: dict[str, Callable[[Path], Rows]] = {".parquet": Parquet, **dict.fromkeys(_ARROW, Arrow)}


def literal_list(value: Any) -> Any:
    """Return the list that a string spells in JSON or Python, as tables of text have it; else the value as it is.

    >>> literal_list("['cat.png', 'dog.png']"), literal_list("[cat].png")
    (['cat.png', 'dog.png'], '[cat].png')
    """
    if not isinstance(value, str) or not value.lstrip().startswith("[") or len(value) > _LONGEST_LITERAL:
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list) else value
    return value


def _saved(directory: Path) -> set[str] | None:
    """Names of the files that `save_to_disk` has saved in a directory, beside which are caches; None in any other."""
    try:
        files = json.loads((directory / _STATE).read_text(encoding="utf-8"))["_data_files"]
        return {file["filename"] for file in files}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def find_files(source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """Find the data files that a source names.

    Args:
        source: a file; a pattern ("data/*.jsonl", "data/**/*.parquet"); a directory (its own files in the order of
            names; .csv and .tsv only where there are no others; of `save_to_disk` of Hugging Face's datasets those that
            it has saved); or several of these.

    Raises:
        OSError: a file or directory does not exist.
        DataError: a directory has no data file, or no file matches a pattern.
    """
    if not isinstance(source, str | os.PathLike):
        for one in source:
            yield from find_files(one)
        return
    path = Path(source)
    if not path.is_dir():
        if path.exists():
            yield path
        elif any(character in str(path) for character in "*?["):
            files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if os.path.isfile(file))
            if not files:
                raise DataError(f"{path}: found no file that matches; expected at least one")
            yield from files
        else:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return
    files = sorted(file for file in path.iterdir() if _opener_of(file) is not None and file.name not in _NO_DATA)
    if (saved := _saved(path)) is not None:
        files = [file for file in files if file.name in saved]
    # Beside other data these tell about it: metadata.csv.
    files = [file for file in files if not _SEPARATED.keys() & {one.lower() for one in file.suffixes}] or files
    if not files:
        raise DataError(f"{path}: found no data file; expected some of {', '.join(_TEXTS | _TABLES)}")
    yield from files
