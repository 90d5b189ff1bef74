"""Prompts, with the tokens of their images and videos in them, to arrays of token ids and what goes with these."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.processor_options import TEXT_OPTIONS
from glm4v_jax.inputs.text.chat_template import split_at_marks
from glm4v_jax.inputs.text.literals import Literals, has_literals
from glm4v_jax.inputs.text.placeholders import Row, count_token
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer, stack_rows


def encode_prompts(
    rows: Sequence[Row],
    types: Sequence[np.ndarray],
    tokenizer: Glm4vTokenizer,
    image_token: str,
    options: Mapping[str, Any],
    return_tensors: str | None,
    *,
    literals: Literals | None = None,
    marks: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Token ids of expanded prompts, arrays where they can be.

    Args:
      rows: B prompts.
      types: for each the types of its image tokens, [n].
      tokenizer: of the checkpoint.
      image_token: as it stands in the rows.
      options: of the tokenizer, and `return_mm_token_type_ids`.
      return_tensors: None or "np".
      literals: by which special tokens of the only prompt are marked as text.
      marks: `generation_marks` in the prompts, for `assistant_masks` [B, T].

    Raises:
      MessageError: truncation cuts an image, or rows of unequal length should become arrays.
    """
    stored = {name: value for name, value in tokenizer.init_kwargs.items() if name in TEXT_OPTIONS}
    # The tokenizer's own attribute counts, which may have been changed since.
    stored.pop("padding_side", None)
    options = {"return_token_type_ids": False, **stored, **options}
    with_types = options.pop("return_mm_token_type_ids", False)
    ends: list[np.ndarray] = []
    if marks:
        parts = [split_at_marks("".join(row), marks) for row in rows]
        rows, ends = ["".join(row) for row in parts], [np.cumsum([len(part) for part in row]) for row in parts]
        options["return_offsets_mapping"] = True
    if literals is not None and has_literals(str(rows[0])):
        ids = literals.encode(str(rows[0]), add_special_tokens=options.get("add_special_tokens", True))
        fields: dict[str, Any] = {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}
    else:
        fields = dict(tokenizer(rows, **options))
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    is_image = [np.asarray(ids, np.int64) == image_token_id for ids in fields["input_ids"]]
    for index, row in enumerate(rows):
        expected, found = count_token(row, image_token), int(is_image[index].sum())
        if expected != found:
            raise MessageError(
                f"text[{index}]: found {found} {image_token} tokens after tokenization; expected {expected}: "
                "truncation cuts an image or video; leave it out or raise max_length"
            )
    if marks:
        fields["assistant_masks"] = [_inside(*pair) for pair in zip(fields.pop("offset_mapping"), ends, strict=True)]
    if with_types:
        fields["mm_token_type_ids"] = [_spread(row, mask) for row, mask in zip(types, is_image, strict=True)]
    ragged = len({len(ids) for ids in fields["input_ids"]}) > 1
    if ragged and return_tensors is None:
        return fields
    return {
        name: np.asarray(value, np.int64) if name == "length" else stack_rows(value, name)
        for name, value in fields.items()
    }


def _inside(offsets: Sequence[tuple[int, int]], ends: np.ndarray) -> list[int]:
    """[T] 0 or 1: whether a token begins in every second part of a text.

    Args:
      offsets: where each token begins and ends, in characters; empty for padding.
      ends: of the parts, in characters; the first part is not covered.
    """
    begins, stops = np.asarray(offsets).T
    part = np.searchsorted(ends, begins, side="right")
    return [int(value) for value in (part % 2 == 1) & (begins < stops)]


def _spread(types: np.ndarray, mask: np.ndarray) -> list[int]:
    """[T] numbers: `types` [n] where `mask` [T] has its n true entries, and 0 elsewhere."""
    row = np.zeros(mask.shape, np.int64)
    row[mask] = types
    return [int(value) for value in row]
