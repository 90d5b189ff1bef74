"""One prompt as everything after the processor takes it: tokens, positions, and what its vision tokens stand for.

On the host, in NumPy. `make_batch`, the engine and training make their arrays of it; padding, batches and slots are
their business.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.medium import Medium, media_of
from glm4v_jax.inputs.mrope import place_rows


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens [T] of one prompt without padding, with everything that does not depend on the batch.

    Attributes:
      input_ids: int32 [T].
      position_ids: int32 [3, T], M-RoPE positions.
      media: images and videos in the order of their tokens.
      medium_of: int32 [T], the index into `media` of the medium that a vision token belongs to, -1 for text.
      offset_of: int32 [T], which of its merged tokens, -1 for text.
      image_sizes: (width, height) of the images as given, in pixels, where that is known.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    media: tuple[Medium, ...]
    medium_of: np.ndarray
    offset_of: np.ndarray
    image_sizes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_text(cls, tokens: Sequence[int] | np.ndarray) -> Self:
        """Make a prompt of text alone.

        >>> Prompt.of_text([5, 6, 7]).position_ids.tolist()
        [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
        """
        input_ids = np.asarray(tokens, np.int32)
        text = np.full(len(input_ids), -1, np.int32)
        return cls(input_ids, np.tile(np.arange(len(input_ids), dtype=np.int32), (3, 1)), (), text, text)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def next_position(self) -> int:
        """The position of the token after the last."""
        return int(self.position_ids.max(initial=-1)) + 1

    @property
    def delta(self) -> int:
        """What to add to the number of tokens so far for the position of the next."""
        return self.next_position - len(self)

    def extended(self, tokens: Sequence[int] | np.ndarray) -> Self:
        """The same prompt with more text after it."""
        more = self.of_text(tokens)
        return dataclasses.replace(
            self,
            input_ids=np.concatenate([self.input_ids, more.input_ids]),
            position_ids=np.concatenate([self.position_ids, self.next_position + more.position_ids], axis=1),
            medium_of=np.concatenate([self.medium_of, more.medium_of]),
            offset_of=np.concatenate([self.offset_of, more.offset_of]),
        )

    def truncated(self, length: int) -> Self:
        """The first `length` tokens, with the media that they stand for."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[:length],
            position_ids=self.position_ids[:, :length],
            media=self.media[: self.medium_of[:length].max(initial=-1) + 1],
            medium_of=self.medium_of[:length],
            offset_of=self.offset_of[:length],
        )

    def media_from(self, start: int, end: int | None = None) -> list[Medium]:
        """The images and videos that the tokens from `start` on, or those before `end`, stand for."""
        return [self.media[number] for number in np.unique(self.medium_of[start:end]) if number >= 0]

    def vision_index(self, features: Mapping[Medium, np.ndarray]) -> np.ndarray:
        """int32 [T]: where the features of each vision token stand, -1 for text.

        Args:
          features: for each medium int [M], where each of its merged tokens stands; tokens of others are -1.
        """
        index = np.full(len(self), -1, np.int32)
        known = [medium in features for medium in self.media]
        if any(known):
            parts = [features[medium] for medium in self.media if medium in features]
            begins = np.cumsum([0, *(len(part) for part in parts)])[np.cumsum(known) - 1]
            here = np.append(known, False)[self.medium_of]  # text has the number -1
            index[here] = np.concatenate(parts)[begins[self.medium_of[here]] + self.offset_of[here]]
        return index

    def common_prefix(self, other: "Prompt") -> int:
        """How many tokens from the start are the same in both, and stand for the same parts of the same media."""
        n = min(len(self), len(other))
        equal = self.input_ids[:n] == other.input_ids[:n]
        numbers: dict[bytes | None, int] = {}
        contents = [
            np.array(
                [numbers.setdefault(key, len(numbers)) for key in (*(medium.key for medium in prompt.media), None)]
            )
            for prompt in (self, other)
        ]
        equal &= contents[0][self.medium_of[:n]] == contents[1][other.medium_of[:n]]
        equal &= self.offset_of[:n] == other.offset_of[:n]
        equal &= (self.position_ids[:, :n] == other.position_ids[:, :n]).all(axis=0)
        return n if equal.all() else int(np.argmin(equal))


def prompts_of(
    inputs: Mapping[str, Any], config: Glm4vConfig, media: tuple[list[Medium], list[Medium]] | None = None
) -> list[Prompt]:
    """Split a processor's output into its prompts; `media` are all images and all videos, in place of its own.

    MessageError if a shape is wrong, tokens are outside the vocabulary, or media do not match the tokens.
    """
    if "input_ids" not in inputs:
        raise MessageError(
            f"input_ids: found only {', '.join(map(str, inputs)) or 'an empty mapping'}; expected int [B, T]"
        )
    input_ids, mask = checked_ids(inputs["input_ids"], inputs.get("attention_mask"), config)
    kinds = media_of(inputs, config) if media is None else media
    tokens = [row[kept].astype(np.int32) for row, kept in zip(input_ids, mask, strict=True)]
    images, videos = ([medium.grid for medium in kind] for kind in kinds)
    rows = place_rows(tokens, config, images, videos, config.vision_config.spatial_merge_size)
    return [
        Prompt(ids, row.position_ids, tuple(kinds[is_video][i] for is_video, i in row.media), *row[2:])
        for ids, row in zip(tokens, rows, strict=True)
    ]


def token_array(input_ids: Any, name: str = "input_ids") -> np.ndarray:
    """Return tokens as an array of integers [B, T].

    Raises:
      MessageError: they are something else, such as prompts of unequal length without padding.
    """
    try:
        array = np.asarray(input_ids)
    except ValueError as error:
        raise MessageError(f"{name}: found rows of unequal length; expected [B, T]: pass padding=True") from error
    if array.ndim != 2 or array.dtype.kind not in "iu" or 0 in array.shape:
        raise MessageError(f"{name}: found {array.dtype} {list(array.shape)}; expected integers [B, T]")
    return array


def checked_ids(
    input_ids: np.ndarray, attention_mask: np.ndarray | None, config: Glm4vConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens int [B, T] and bool [B, T], where they are not padding.

    Raises:
      MessageError: a shape is wrong, a row is all padding, or a token is not in the vocabulary.
    """
    input_ids = token_array(input_ids)
    mask = np.ones(input_ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if mask.shape != input_ids.shape:
        raise MessageError(f"attention_mask: found shape {list(mask.shape)}; expected {list(input_ids.shape)}")
    if not mask.any(axis=1).all():
        raise MessageError("attention_mask: found a row of padding alone; expected at least one token in every prompt")
    return in_vocabulary(input_ids, config.text_config.vocab_size), mask


def in_vocabulary(input_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return tokens, all of them in the vocabulary; MessageError if one is not."""
    if (low := int(input_ids.min())) < 0 or (high := int(input_ids.max())) >= vocab_size:
        found = low if low < 0 else high
        raise MessageError(f"input_ids: found token {found}; expected tokens from 0 to {vocab_size - 1}")
    return input_ids
