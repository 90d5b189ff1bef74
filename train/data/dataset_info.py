"""LLaMA-Factory's dataset_info.json: the files of a data set, and the names of their fields."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4v_jax.config.checks import did_you_mean, one_of
from glm4v_jax.data.media import kind_of
from glm4v_jax.data.tables import INFO
from glm4v_jax.errors import DataError
from train.data import FormatName
from train.data.formats import SHAREGPT_ROLES, Columns
from train.data.tools import CALLS, TOOL

FORMATTING: tuple[FormatName, ...] = ("alpaca", "sharegpt", "openai")
_KNOWN_COLUMNS = {
    "messages",
    "prompt",
    "query",
    "response",
    "history",
    "system",
    "tools",
    "images",
    "videos",
    "chosen",
    "rejected",
}
_REFUSED_COLUMNS = ("kto_tag", "audios")
# Options that a file alone cannot satisfy.
_REFUSED = ("num_samples",)
_ROLES = {
    "observation_tag": TOOL, "function_tag": CALLS, "system_tag": "system", "user_tag": "user",
    "assistant_tag": "assistant",
}  # fmt: skip
_DEFAULT_TAGS = {
    "system_tag": "system", "user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation",
    "function_tag": "function_call",
}  # fmt: skip
_TAGS = {*_DEFAULT_TAGS, "role_tag", "content_tag"}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set of a dataset_info.json: its file or directory, and how its rows are read."""

    path: Path
    formatting: FormatName
    columns: Columns
    is_preference: bool = False


def split_name(source: str) -> tuple[Path, str | None] | None:
    """Split "DIR/dataset_info.json:NAME" into file and data set; return None if `source` is something else.

    The name is None if it is missing: "DIR/dataset_info.json", or a directory that has one.
    """
    before, found, name = source.rpartition(f"{INFO}:")
    if found:
        return Path(before + INFO), name
    path = Path(source)
    if path.name == INFO:
        return path, None
    # The directory of `save_to_disk` of Hugging Face's datasets has a file of that name, too.
    is_described = (path / INFO).is_file() and not (path / "state.json").is_file()
    return (path / INFO, None) if is_described else None


def read_entry(path: Path, name: str | None) -> DataSet:
    """Return one data set; without a name, the only one in the file.

    Raises:
        OSError: the file cannot be read.
        DataError: the file is invalid, the data set is not in it, or has options that are not supported.
    """
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: found invalid JSON ({error}); expected an object of data sets") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path}: found {kind_of(entries)}; expected an object of data sets")
    if name is None and len(entries) == 1:
        (name,) = entries
    if name not in entries:
        known = ", ".join(list(entries)[:10]) + ", ..." * (len(entries) > 10)
        found = "no name of a data set" if name is None else f"the name {name!r}"
        near = "" if name is None else did_you_mean(name, entries)
        raise DataError(f"{path}: found {found}; expected {path}:NAME with one of {known or 'none: it is empty'}{near}")
    return _read(path, f"{path}:{name}", entries[name])


def _read(path: Path, where: str, entry: Any) -> DataSet:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: found {kind_of(entry)}; expected an object with 'file_name'")
    if not isinstance(entry.get("file_name"), str):
        raise DataError(f"{where}: file_name: found none; expected a file: nothing is downloaded")
    for field in _REFUSED:
        if entry.get(field):
            raise DataError(f"{where}: {field}: found {entry[field]!r}; expected none: it is not supported")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in FORMATTING:
        raise DataError(f"{where}: formatting: found {formatting!r}; expected {one_of(FORMATTING, formatting)}")
    columns = _strings(where, "columns", entry.get("columns"), {*_KNOWN_COLUMNS, *_REFUSED_COLUMNS})
    for field in _REFUSED_COLUMNS:
        if field in columns:
            raise DataError(f"{where}: columns.{field}: found one; expected none: it is not supported")
    tags = _strings(where, "tags", entry.get("tags"), _TAGS)
    roles = _DEFAULT_TAGS | {tag: tags[tag] for tag in _DEFAULT_TAGS if tag in tags}
    # Unless these are named, LLaMA-Factory reads neither images, nor videos, nor the system message.
    named = {"history": "", "system": "", "tools": "", **columns}
    columns_of_row = Columns(
        **{name: column for name, column in named.items() if name not in ("images", "videos")},
        images=(columns.get("images", ""),),
        videos=(columns.get("videos", ""),),
        role_tag=tags.get("role_tag", "from"),
        content_tag=tags.get("content_tag", "value"),
        roles={roles[tag]: role for tag, role in _ROLES.items()},
    )
    if formatting == "openai" and not tags:
        # Without tags LLaMA-Factory expects ShareGPT's names; here OpenAI's will do.
        messages = columns.get("messages", "messages")
        columns_of_row = dataclasses.replace(
            columns_of_row, messages=messages, role_tag="", content_tag="", roles=SHAREGPT_ROLES
        )
    is_preference = bool(entry.get("ranking")) or not {"chosen", "rejected"}.isdisjoint(columns)
    return DataSet(path.parent / entry["file_name"], formatting, columns_of_row, is_preference)


def _strings(where: str, field: str, value: Any, known: set[str]) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value.values()):
        raise DataError(f"{where}: {field}: found {kind_of(value)}; expected an object of strings")
    if unknown := sorted(set(value) - known):
        expected = ", ".join(sorted(known))
        near = did_you_mean(unknown[0], known)
        raise DataError(f"{where}: {field}.{unknown[0]}: found an unknown field; expected some of {expected}{near}")
    return dict(value)
