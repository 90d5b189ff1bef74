"""Checks of what a tokenizer is asked for: by its files (`CheckpointError`), and by a call (`MessageError`)."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta

from glm4v_jax.config.checks import checked
from glm4v_jax.errors import CheckpointError, MessageError

PaddingSide = Literal["left", "right"]
"""Where rows are padded or cut."""


def checked_limit(limit: Any) -> int:
    """Return `model_max_length` as a number; None is no limit, which files write as a huge number.

    Raises:
      CheckpointError: it is not a number of at least 1.
    """
    return int(
        checked("model_max_length", 1e30 if limit is None else limit, Annotated[float, Meta(ge=1)], CheckpointError)
    )


def padding_strategy(padding: bool | str) -> str | None:
    """None, "longest" or "max_length"."""
    strategies = {False: None, "do_not_pad": None, True: "longest", "longest": "longest", "max_length": "max_length"}
    if not isinstance(padding, (bool, str)) or padding not in strategies:
        raise MessageError(f"padding: found {padding!r}; expected a bool, 'longest', 'max_length' or 'do_not_pad'")
    return strategies[padding]


def check_text(rows: Sequence[Any], is_split_into_words: bool) -> None:
    """Rows of text, or of words, that UTF-8 can hold."""
    if not rows:
        raise MessageError("text: found an empty list; expected at least one text")
    for index, row in enumerate(rows):
        words = row if is_split_into_words and isinstance(row, (list, tuple)) else [row]
        for word in words:
            if not isinstance(word, str):
                raise MessageError(f"text[{index}]: found {type(word).__name__}; expected str")
            try:
                word.encode("utf-8")
            except UnicodeEncodeError as error:
                raise MessageError(
                    f"text[{index}] is not valid Unicode (UTF-8): found the lone surrogate {word[error.start]!a} at "
                    f"character {error.start}"
                ) from error
