"""Rows of the files in which evaluation data is published: json, jsonl, Parquet and tsv, with the place of each.

What `glm4v_jax.data.tables` reads is read as it is there. Beyond that:

- a json file that holds one object: its list "data" (DocVQA, TextVQA), or its values where all are objects (MathVista);
- a tsv file as VLMEvalKit publishes them: a line of names, cells that may be quoted, pictures as base64 in "image"; a
  short text in their place is the "index" of the row whose picture it is.
"""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm4v_jax.data import tables
from glm4v_jax.data.media import kind_of
from glm4v_jax.data.tables import Rows, open_rows
from glm4v_jax.errors import DataError

SUFFIXES = (*tables.SUFFIXES, ".tsv")

_LONGEST_INDEX = 64
"""An "image" of not more characters is no picture but the index of a row; so VLMEvalKit's `image_base.py`."""


class Listed:
    """Rows in memory, each with its place."""

    def __init__(self, path: Path, rows: Sequence[Any], places: Sequence[str]) -> None:
        self.path, self._rows, self._places = path, rows, places

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row; raises `DataError` if it is no object. The message does not name the place."""
        row = self._rows[index]
        if not isinstance(row, dict):
            raise DataError(f"found {kind_of(row)}, expected an object")
        return row

    def place(self, index: int) -> str:
        """The file with the line, or with the place in it."""
        return self._places[index]


def open_table(path: str | Path) -> Rows:
    """The rows of a file, by the end of its name.

    Raises:
        OSError: it cannot be read.
        DataError: it is of another kind, is not what its name says, or has no row.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: found a file of kind {suffix or 'no name'}, expected {', '.join(SUFFIXES)}")
    if suffix == ".tsv":
        return _read_tsv(path)
    return (_read_json(path) if suffix == ".json" else None) or open_rows(path)


def _read_json(path: Path) -> Rows | None:
    """The rows of a json file that holds a list, or one object of rows; None where it holds no row in these ways."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None  # lines of JSON, or broken, which `open_rows` says
    if isinstance(content, list) and content:
        return Listed(path, content, [f"{path}[{index}]" for index in range(len(content))])
    if not isinstance(content, dict):
        return None
    rows = content.get("data")
    if isinstance(rows, list) and rows:
        return Listed(path, rows, [f"{path}: data[{index}]" for index in range(len(rows))])
    if content and all(isinstance(value, dict) for value in content.values()):
        return Listed(path, list(content.values()), [f"{path}: {name!r}" for name in content])
    return None


def _read_tsv(path: Path) -> Rows:
    before = csv.field_size_limit(sys.maxsize)  # a picture is one cell
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", restkey="", restval=None)
            rows, places = [], []
            for row in reader:
                if "" in row:
                    found = len(reader.fieldnames or ()) + len(row[""])
                    raise DataError(
                        f"{path}:{reader.line_num}: found {found} cells, expected {len(reader.fieldnames or ())} as "
                        "in the first line"
                    )
                rows.append({name: cell for name, cell in row.items() if cell})
                places.append(f"{path}:{reader.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no readable tsv file ({error})") from error
    finally:
        csv.field_size_limit(before)
    if not rows:
        raise DataError(f"{path}: found no row, expected at least one")
    _share_pictures(rows)
    return Listed(path, rows, places)


def _share_pictures(rows: Sequence[dict[str, Any]]) -> None:
    by_index: Mapping[Any, Any] = {row["index"]: row.get("image") for row in rows if "index" in row}
    for row in rows:
        image = row.get("image")
        if image is not None and len(image) <= _LONGEST_INDEX and len(by_index.get(image) or "") > _LONGEST_INDEX:
            row["image"] = by_index[image]
