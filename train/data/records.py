"""Records, the one form of training data: a conversation, which messages are targets, and its place in the data."""

import bisect
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from glm4v_jax.config.checks import one_of
from glm4v_jax.data.media import MediaItem, image_size, located, source_of
from glm4v_jax.data.tables import Arrow, Parquet, Rows, find_files, open_rows
from glm4v_jax.errors import DataError, MediaError, naming
from glm4v_jax.files import fingerprint
from glm4v_jax.inputs.media.load import is_path_like
from train.data import FormatName
from train.data.conversations import Turns
from train.data.dataset_info import read_entry, split_name
from train.data.formats import FORMATS, Columns, conversation, detect, instruction, read_row
from train.data.preferences import compared, pair_of

Change = Callable[[Mapping[str, Any], Columns | None], Mapping[str, Any]]

_HASHED = 1 << 28
"""Bytes of all files up to which their digest covers all of them, which takes half a second."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation to train on.

    Attributes:
        messages: `{"role": "system" | "user" | "assistant" | "tool", "content": [items]}` with items
            `{"type": "text", "text": ...}`, `{"type": "image", KEY: ...}` and `{"type": "video", KEY: ...}`, KEY being
            `path`, `url`, or `image` or `video` for what is in memory; as chat templates take them. Those of the
            assistant may have `tool_calls` and `reasoning_content`.
        losses: of each message, whether it contributes to the loss.
        source: its place in the data, "data.jsonl:12".
        rejected: of preference data, the conversation that this one is preferred to.
        tools: the functions that the assistant may call, as chat templates take them.
    """

    messages: tuple[Mapping[str, Any], ...]
    losses: tuple[bool, ...]
    source: str
    rejected: "Record | None" = None
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def ends_in_call(self) -> bool:
        """Whether the last message of the assistant calls a tool."""
        said = [message for message in self.messages if message["role"] == "assistant"]
        return bool(said) and "tool_calls" in said[-1]

    def media(self, kind: str | None = None) -> list[Mapping[str, Any]]:
        """Return the items of images and videos in their order; with `kind`, "image" or "video", only those."""
        kinds = ("image", "video") if kind is None else (kind,)
        return [item for message in self.messages for item in message["content"] if item["type"] in kinds]


@dataclasses.dataclass(frozen=True)
class _Part:
    """The rows of one file, what paths in it are relative to, and what decides how they are read.

    `formatting` None detects that of each row; a dataset_info.json has `columns`; `change`: row and columns -> the row
    that is read in its place.
    """

    rows: Rows
    directory: str
    formatting: FormatName | None
    columns: Columns | None
    change: Change | None = None


class Records(Sequence[Record]):
    """Records by their number, read on demand from any number of files; see `read_records`.

    Only the offsets of lines, JSON lists and the latest row group of a table are kept in memory. Can be pickled.
    """

    def __init__(self, parts: Sequence[_Part], is_preference: bool = False):
        self._parts = tuple(parts)
        self._is_preference = is_preference
        self._ends = list(itertools.accumulate(len(part.rows) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        """Return a record.

        Raises:
            DataError: the row is invalid; the message names its place, the field, what was found and expected.
            IndexError: the number is out of range.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, row = self._find(index)
        place = part.rows.place(row)
        try:
            if not self._is_preference:
                return _record(_turns(part, part.rows[row]), part, place)
            both = (_turns(part, one) for one in self._pair(part, row))
            chosen, rejected = (_record(turns, part, place) for turns in compared(*both))
        except (DataError, MediaError) as error:
            raise DataError(f"{place}: {error}") from error
        return dataclasses.replace(chosen, rejected=rejected)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    @classmethod
    def joined(cls, several: Sequence["Records"]) -> "Records":
        """Return the records of several, one after the other."""
        is_preference = any(one._is_preference for one in several)
        return cls([part for one in several for part in one._parts], is_preference)

    def row(self, index: int) -> Mapping[str, Any]:
        """Return a row as it is in its file; a DataError that it is not an object names its place."""
        part, row = self._find(index)
        with naming(part.rows.place(row), DataError):
            return part.rows[row]

    def place(self, index: int) -> str:
        """Return the place of a row, without reading it."""
        part, row = self._find(index)
        return part.rows.place(row)

    def format(self, index: int) -> FormatName:
        """Return the name of the format of a row; a DataError that it is unknown does not name its place."""
        part, row = self._find(index)
        return part.formatting or detect(self._pair(part, row)[0] if self._is_preference else part.rows[row])

    def fingerprint(self) -> str:
        """Return a digest of the files' content; where there is much, of the size and samples of each."""
        paths = [part.rows.path for part in self._parts]
        limit = {"whole": _HASHED} if sum(path.stat().st_size for path in paths) <= _HASHED else {}
        digests = [fingerprint(path, **limit) for path in paths]
        return hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()

    def _pair(self, part: _Part, row: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The rows with the preferred and with the rejected answer."""
        names = () if part.columns is None else (part.columns.chosen, part.columns.rejected, part.columns.messages)
        return pair_of(part.rows[row], *names)

    def _find(self, index: int) -> tuple[_Part, int]:
        try:
            index = range(len(self))[index]
        except IndexError:
            raise IndexError(f"record {index} of {len(self)}") from None
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


def _record(turns: Turns, part: _Part, place: str) -> Record:
    messages = tuple(
        message | {"content": [located(item, part.directory) for item in message["content"]]}
        for message in turns.messages
    )
    return Record(messages, turns.losses, place, tools=turns.tools)


def _turns(part: _Part, row: Mapping[str, Any]) -> Turns:
    if isinstance(part.rows, Parquet | Arrow):
        row = {name: _without_nulls(value) for name, value in row.items()}
    if part.change is not None:
        row = part.change(row, part.columns)

    def size_of(item: MediaItem) -> tuple[int, int]:
        return image_size(located(item, part.directory))

    if part.columns is not None:
        return (instruction if part.formatting == "alpaca" else conversation)(row, part.columns)
    return read_row(row, part.formatting, size_of)


def _without_nulls(value: Any) -> Any:
    """A value without the fields that objects in tables have only because others have them.

    A chat template would print them as arguments of a call, or as what a tool takes.
    """
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def question_of(record: Record, fps: float) -> tuple[list[Mapping[str, Any]], str]:
    """Return the messages before the last one of the assistant, and its text; DataError if there is none.

    Videos that are given as frames without a rate get `fps`.
    """
    last = max((i for i, message in enumerate(record.messages) if message["role"] == "assistant"), default=0)
    if not last:
        raise DataError(f"{record.source}: found no answer after a question; expected one to compare with")
    said = "".join(item.get("text", "") for item in record.messages[last]["content"])
    messages: list[Mapping[str, Any]] = [
        as_sent({**message, "content": [_timed(item, fps) for item in message["content"]]})
        for message in record.messages[:last]
    ]
    return messages, said


def as_sent(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message as clients send it: what a tool answers is a string where it is only text.

    Chat templates print a list of one text differently.
    """
    content = message["content"]
    if message["role"] != "tool" or isinstance(content, str) or any(item["type"] != "text" for item in content):
        return message
    return {**message, "content": "".join(item["text"] for item in content)}


def _timed(item: Mapping[str, Any], fps: float) -> Mapping[str, Any]:
    is_frames = item["type"] == "video" and "fps" not in item and not is_path_like(source_of(item))
    return {**item, "fps": fps} if is_frames else item


def read_records(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: FormatName | None = None,
    media_dir: str | os.PathLike[str] | None = None,
    change: Change | None = None,
    is_preference: bool = False,
) -> Records:
    """Return the records of files of training data.

    Args:
        source: a file, see `open_rows`; a directory or pattern of such files; "DIR/dataset_info.json:NAME", a data set
            of LLaMA-Factory; or several of these.
        format: the format of all rows, one of `train.data.formats.FORMATS`; None detects that of each row by its
            fields, and reads one with fewer markers than files as ms-swift does: the missing ones go before its query.
            A dataset_info.json has its own.
        media_dir: what paths of images and videos are relative to; None is the directory of the data file.
        change: row, and the names of its fields where a dataset_info.json has them -> the row that is read instead.
        is_preference: whether rows have a preferred and a rejected answer (`preferences.pair_of`).

    Raises:
        OSError: a file cannot be read.
        DataError: a file is of another kind or has no rows; or the format is unknown.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"format: found {format!r}; expected {one_of(FORMATS, format)}")
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not sources:
        raise DataError("source: found no file; expected at least one")
    parts = [part for one in sources for part in _parts(os.fspath(one), format, media_dir, change, is_preference)]
    return Records(parts, is_preference)


def _parts(
    source: str,
    format: FormatName | None,
    media_dir: str | os.PathLike[str] | None,
    change: Change | None,
    is_preference: bool,
) -> Iterator[_Part]:
    described = split_name(source)
    columns = None
    path = Path(source)
    if described is not None:
        entry = read_entry(*described)
        path, format, columns = entry.path, entry.formatting, entry.columns
        if entry.is_preference and not is_preference:
            raise DataError(
                f"{source}: found preferences; expected conversations to train on, or a job with [preference]"
            )
    for file in find_files(path):
        # LLaMA-Factory's paths are relative to its data directory, wherever in it the file is.
        directory = media_dir or (file.parent if described is None else described[0].parent)
        yield _Part(open_rows(file), os.fspath(directory), format, columns, change)
