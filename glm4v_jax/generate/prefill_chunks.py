"""How prompts are cut into pieces of few lengths, which go through the decoder one after the other."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.generate.device_steps import Piece
from glm4v_jax.inputs.make_batch import MIN_LENGTH
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.vision_rows import bucket

MAX_PIECE = 1024
"""Tokens of a prompt that go through the decoder at a time: what bounds the memory of a long prompt's activations."""


class Start(NamedTuple):
    """What sets a row going.

    prompt: all its tokens, those included that the row's cache already holds.
    config: of the choice of tokens.
    limit: new tokens at most, `step` included.
    keep: how many of the prompt's tokens the row's cache holds.
    number: which row of its request this is.
    step: new tokens before this, where an answer is continued.
    room: how many tokens may follow the prompt in all, where that is more than the limit.
    """

    prompt: Prompt
    config: GenerationConfig
    limit: int
    keep: int = 0
    number: int = 0
    step: int = 0
    room: int = 0

    @property
    def capacity(self) -> int:
        """How many cache slots this needs."""
        return len(self.prompt) + max(self.limit - self.step, self.room)

    @property
    def new_tokens(self) -> int:
        """How many of the prompt's tokens the cache does not hold yet."""
        return len(self.prompt) - self.keep

    @property
    def media(self) -> list[Medium]:
        """The pictures and videos that these tokens stand for."""
        return self.prompt.media_from(self.keep)


def piece_length(left: int) -> int:
    """The length of the pieces that `left` tokens are cut into: equal, for few lengths and little padding."""
    return bucket(-(-left // -(-left // MAX_PIECE)), MIN_LENGTH)


class Stretch(NamedTuple):
    """Where a piece of T tokens begins and ends in each row's prompt."""

    t: int
    bounds: dict[int, tuple[int, int]]


def stretches(starts: Mapping[int, Start], capacity: int) -> list[Stretch]:
    """How prompts are cut into pieces for a cache of this capacity.

    All rows of a piece are T long. A row with less than that left to append is padded; where its padding would reach
    beyond the cache, or nothing is left at all, it takes its piece from further back and writes the same values again.
    """
    done = {i: start.keep for i, start in starts.items()}
    ends = {i: len(start.prompt) for i, start in starts.items()}
    left = max(ends[i] - done[i] for i in starts)
    t = piece_length(left)
    result = []
    while any(done[i] < ends[i] for i in starts):
        bounds = {}
        for i, begin in done.items():
            if begin == ends[i] or begin + t > capacity:
                begin = max(0, min(begin, ends[i] - t))
            bounds[i] = begin, min(begin + t, ends[i])
        done = {i: end for i, (_, end) in bounds.items()}
        result.append(Stretch(t, bounds))
    return result


def piece_of(stretch: Stretch, starts: Mapping[int, Start], vision: Mapping[int, np.ndarray], n: int) -> Piece:
    """The arrays of a piece for n rows."""
    ids, segments, index = (np.zeros((n, stretch.t), np.int32) for _ in range(3))
    positions, keep = np.ones((3, n, stretch.t), np.int32), np.zeros(n, np.int32)
    index -= 1
    for i, (begin, end) in stretch.bounds.items():
        prompt, here = starts[i].prompt, slice(0, end - begin)
        ids[i, here] = prompt.input_ids[begin:end]
        positions[:, i, here] = prompt.position_ids[:, begin:end]
        segments[i, here] = 1
        index[i, here] = vision[i][begin:end]
        keep[i] = begin
    return Piece(ids, positions, segments, index, keep)
