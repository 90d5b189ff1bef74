"""Read the fields of a row of data: each function checks one, and its error names it, what was found and expected."""

from collections.abc import Mapping, Sequence
from typing import Any

from glm4v_jax.config.checks import did_you_mean, fits
from glm4v_jax.data.media import MediaItem, kind_of, media_item
from glm4v_jax.data.tables import literal_list
from glm4v_jax.errors import DataError

Fields = Mapping[str, Any]
"""A row of a data file; null is as if the field were missing."""


def invalid(name: str, value: Any, expected: str) -> DataError:
    """Make the error of a field."""
    return DataError(f"{name}: found {_shown(value)}; expected {expected}")


def first(row: Fields, *names: str) -> tuple[str, Any]:
    """Return the first of these fields that the row has, with its name; DataError if it has none of them."""
    for name in names:
        if row.get(name) is not None:
            return name, row[name]
    there = ", ".join(name for name, value in row.items() if value is not None)
    near = next(filter(None, (did_you_mean(name, row) for name in names)), "").replace("did you mean", "is it")
    raise DataError(f"{' or '.join(names)}: found nothing; expected the field beside {there or 'no other'}{near}")


def text(row: Fields, *names: str) -> str:
    """Return a string that is not blank."""
    name, value = first(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise invalid(name, value, "text")
    return value


def identifier(row: Fields, *names: str) -> str:
    """Return a string or integer, as a string."""
    name, value = first(row, *names)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise invalid(name, value, "text or an integer")
    return str(value)


def scalar(row: Fields, name: str) -> str:
    """Return a string or number, as a string."""
    _, value = first(row, name)
    if not _is_scalar(value):
        raise invalid(name, value, "text or a number")
    return str(value)


def texts(row: Fields, *names: str, is_literal: bool = False) -> list[str]:
    """Return a list of at least one string or number, as strings; one alone is a list of it.

    The first of the `names` that the row has is taken. `is_literal`: a string may spell the list in Python, "['a']".
    """
    name, value = first(row, *names)
    value = literal_list(value) if is_literal else value
    values = value if isinstance(value, list | tuple) else [value]
    for one in values:
        if not _is_scalar(one):
            raise invalid(name, one, "a list of texts")
    if not values:
        raise DataError(f"{name}: found an empty list; expected at least one text")
    return [str(one) for one in values]


def items_of(row: Fields, name: str) -> list[Any]:
    """Return a list of anything, which a string may spell in Python."""
    value = literal_list(row[name])
    if not isinstance(value, list | tuple):
        raise invalid(name, value, "a list")
    return list(value)


def options(row: Fields, name: str) -> dict[str, str]:
    """Return letter -> text: of a list of 1 to 26 texts, which become A, B, ..., or of an object with letters."""
    _, value = first(row, name)
    value = literal_list(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = {chr(ord("A") + index): option for index, option in enumerate(value[:27])}
    if not isinstance(value, Mapping):
        raise invalid(name, value, "a list of texts, or letters with texts")
    # A table has a column for every letter, which may be empty.
    value = {letter: option for letter, option in value.items() if option is not None}
    if not 1 <= len(value) <= 26:
        raise DataError(f"{name}: found {len(value)} options; expected 1 to 26")
    for letter, option in value.items():
        if not _is_scalar(option):
            raise invalid(f"{name}.{letter}", option, "text")
    return {str(letter): str(option) for letter, option in value.items()}


def one_of(row: Fields, name: str, known: Sequence[str]) -> str:
    """Return a text that is one of these."""
    value = identifier(row, name).strip()
    if value not in known:
        raise invalid(name, value, f"one of {', '.join(known)}{did_you_mean(value, known)}")
    return value


def box(row: Fields, name: str) -> tuple[float, float, float, float]:
    """Return four finite numbers, in the meaning of the data set; a string may spell the list in Python."""
    _, value = first(row, name)
    value = literal_list(value)
    is_list = isinstance(value, list | tuple) and len(value) == 4
    if not is_list or not all(fits(one, float) for one in value):
        raise invalid(name, value, "four numbers")
    one, two, three, four = (float(one) for one in value)
    return one, two, three, four


def media(row: Fields, kind: str, *names: str) -> MediaItem:
    """Return an image or video, however the row writes it; see `glm4v_jax.data.media.media_item`."""
    name, value = first(row, *names)
    return media_item(kind, value, name)


def present(row: Fields, *names: str) -> dict[str, Any]:
    """Return those of these fields that the row has, as they are."""
    return {name: row[name] for name in names if row.get(name) is not None}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    if isinstance(value, list | tuple) and len(value) <= 8 and all(fits(one, float) for one in value):
        return str(list(value))
    return kind_of(value)
