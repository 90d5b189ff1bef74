"""Checks of what a tokenizer is asked for: by its files (`CheckpointError`), and by a call (`MessageError`)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm4v_jax.errors import CheckpointError, MessageError

LARGEST_COUNT = 2**31 - 1
"""Of tokens in a row."""


def checked_side(name: str, side: Any) -> str:
    """Where rows are padded or cut."""
    if side not in ("left", "right"):
        raise CheckpointError(f"{name} is {side!r}, expected 'left' or 'right'")
    return side


def checked_limit(limit: Any) -> int:
    """`model_max_length` as a number; None is no limit, which files write as a huge number."""
    if limit is None:
        return int(1e30)
    if not isinstance(limit, int | float) or isinstance(limit, bool) or limit < 1 or not limit < math.inf:
        raise CheckpointError(f"model_max_length is {limit!r}, expected a number of tokens > 0")
    return int(limit)


def padding_strategy(padding: bool | str) -> str | None:
    """None, "longest" or "max_length"."""
    strategies = {False: None, "do_not_pad": None, True: "longest", "longest": "longest", "max_length": "max_length"}
    if not isinstance(padding, (bool, str)) or padding not in strategies:
        raise MessageError(f"padding is {padding!r}, expected a bool, 'longest', 'max_length' or 'do_not_pad'")
    return strategies[padding]


def check_text(rows: Sequence[Any], is_split_into_words: bool) -> None:
    """Rows of text, or of words, that UTF-8 can hold."""
    if not rows:
        raise MessageError("text is an empty list, expected at least one text")
    for index, row in enumerate(rows):
        words = row if is_split_into_words and isinstance(row, (list, tuple)) else [row]
        for word in words:
            if not isinstance(word, str):
                raise MessageError(f"text[{index}] contains {type(word).__name__}, expected str")
            try:
                word.encode("utf-8")
            except UnicodeEncodeError as error:
                raise MessageError(
                    f"text[{index}] is not valid Unicode (UTF-8): found the lone surrogate {word[error.start]!a} at "
                    f"character {error.start}"
                ) from error


def check_count(name: str, value: Any, *, least: int) -> None:
    """An option that counts tokens; None is none."""
    is_count = isinstance(value, int | np.integer) and not isinstance(value, bool) and least <= value <= LARGEST_COUNT
    if value is not None and not is_count:
        raise MessageError(f"{name} is {value!r}, expected a whole number from {least} to {LARGEST_COUNT}")
