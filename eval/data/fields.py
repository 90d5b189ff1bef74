"""The fields of a row of data, each checked: what is wrong is said with its name, what was found and expected."""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any

from glm4v_jax.data.media import kind_of, media_item
from glm4v_jax.errors import DataError

Row = Mapping[str, Any]

Media = dict[str, Any]
"""`{"type": "image" | "video", KEY: source}`; see `glm4v_jax.data.media`."""

_LONGEST_LITERAL = 100_000


def first(row: Row, *names: str) -> tuple[str, Any]:
    """The first of these fields that the row has, with its name; null is as if it were not there.

    Raises:
        DataError: it has none of them.
    """
    for name in names:
        if row.get(name) is not None:
            return name, row[name]
    there = ", ".join(repr(name) for name, value in row.items() if value is not None)
    wanted = " or ".join(repr(name) for name in names)
    raise DataError(f"field {wanted}: missing in the row, which has {there or 'no field'}")


def text(row: Row, *names: str) -> str:
    """A string that is not blank.

    Raises:
        DataError: it is missing, or something else.
    """
    name, value = first(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"field {name!r}: found {_shown(value)}, expected text")
    return value


def identifier(row: Row, *names: str) -> str:
    """A string or whole number, as a string.

    Raises:
        DataError: it is missing, or something else.
    """
    name, value = first(row, *names)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"field {name!r}: found {_shown(value)}, expected text or a whole number")
    return str(value)


def texts(row: Row, *names: str, is_literal: bool = False) -> list[str]:
    """A list of at least one string or number, as strings; one alone is a list of it.

    Args:
        row: of the data.
        names: of the field; the first that is there is taken.
        is_literal: whether a string may spell the list in Python, "['a', 'b']".

    Raises:
        DataError: it is missing, or something else.
    """
    name, value = first(row, *names)
    value = literal_list(value) if is_literal else value
    values = value if isinstance(value, list | tuple) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise DataError(f"field {name!r}: found {_shown(one)} in it, expected text")
    if not values:
        raise DataError(f"field {name!r}: found an empty list, expected at least one text")
    return [str(one) for one in values]


def literal_list(value: Any) -> Any:
    """The list that a string spells in Python, as MMMU and VLMEvalKit's tables have them; else the value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[") and len(value) <= _LONGEST_LITERAL:
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
        return found if isinstance(found, list) else value
    return value


def options(row: Row, *names: str) -> dict[str, str]:
    """Letter -> text: of a list of texts, which become A, B, ..., or of an object that has letters itself.

    Raises:
        DataError: it is missing, has no option or more than 26, or something else than texts.
    """
    name, value = first(row, *names)
    value = literal_list(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = {chr(ord("A") + index): option for index, option in enumerate(value[:27])}
    if not isinstance(value, Mapping):
        raise DataError(f"field {name!r}: found {_shown(value)}, expected a list of texts, or letters with texts")
    # Of a table with columns for all letters those without text are none.
    value = {letter: option for letter, option in value.items() if option is not None}
    if not 1 <= len(value) <= 26:
        raise DataError(f"field {name!r}: found {len(value)} options, expected 1 to 26")
    for letter, option in value.items():
        if isinstance(option, bool) or not isinstance(option, str | int | float):
            raise DataError(f"field {name!r}: found {_shown(option)} as {letter}, expected text")
    return {str(letter): str(option) for letter, option in value.items()}


def answer_letter(row: Row, name: str, choices: Mapping[str, str]) -> str:
    """The letter of the right option.

    Raises:
        DataError: it is missing, or none of the letters.
    """
    letter = identifier(row, name).strip()
    if letter not in choices:
        raise DataError(f"field {name!r}: found {letter!r}, expected one of {', '.join(choices)}")
    return letter


def box(row: Row, name: str) -> tuple[float, float, float, float]:
    """Four finite numbers, in whichever meaning the data set has; may be a list that is written as text.

    Raises:
        DataError: it is missing, or something else.
    """
    _, value = first(row, name)
    value = literal_list(value)
    is_list = isinstance(value, list | tuple) and len(value) == 4
    if not is_list or not all(_is_number(one) for one in value):
        raise DataError(f"field {name!r}: found {_shown(value)}, expected four numbers")
    one, two, three, four = (float(one) for one in value)
    return one, two, three, four


def media(row: Row, kind: str, *names: str) -> Media:
    """A picture or video, however a row writes it; see `glm4v_jax.data.media.media_item`.

    Raises:
        DataError: it is missing, or something else.
    """
    name, value = first(row, *names)
    return media_item(kind, value, name)


def plain(row: Row, *names: str) -> dict[str, Any]:
    """Those of these fields that are there."""
    return {name: row[name] for name in names if row.get(name) is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    if isinstance(value, list | tuple) and len(value) <= 8 and all(_is_number(one) for one in value):
        return str(list(value))
    return kind_of(value)
