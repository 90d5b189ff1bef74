"""Prefill chunks: prompts cut into chunks of few lengths, which go through the decoder one after the other."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.generate.device_steps import PrefillChunk
from glm4v_jax.generate.token_masks import Turn
from glm4v_jax.inputs.make_batch import MIN_LENGTH
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.vision_rows import bucket

MAX_CHUNK = 1024
"""The longest chunk of rows that start together, in tokens; it bounds the activation memory of a long prompt."""
CHUNK = 512
"""The longest chunk of a row that starts alone: with fewer tokens, accelerators spend their time on reading weights."""
MIN_LIVE_CHUNK = 16
"""The same where chunks take turns with decode dispatches, at least; at most `longest_live_chunk`."""
# Multiplications and additions of a chunk that a CPU does in about the time of a dispatch.
_CPU_WORK = 2.5e9
MIN_SHARED = 256
"""Tokens of a chunk that ends where an image or video does, at least: prompts that continue differently share it."""


class Start(NamedTuple):
    """What a row is started with.

    Attributes:
      prompt: all its tokens, including those that the row's cache already holds.
      config: sampling options and end tokens.
      limit: the most new tokens, `step` included.
      keep: how many of the prompt's tokens the row's cache holds.
      number: the row's number in its request, for sampling.
      step: new tokens before this, where a sequence is restarted.
      room: how many tokens may follow the prompt in all, where that is more than the limit.
      turn: what the first token may be, where a grammar says it.
    """

    prompt: Prompt
    config: GenerationConfig
    limit: int
    keep: int = 0
    number: int = 0
    step: int = 0
    room: int = 0
    turn: Turn | None = None

    @property
    def capacity(self) -> int:
        """Cache slots that this needs."""
        return len(self.prompt) + max(self.limit - self.step, self.room)

    @property
    def is_decoded(self) -> bool:
        """Whether tokens may follow the one that the prefill chooses."""
        return self.capacity > len(self.prompt) + 1

    @property
    def new_tokens(self) -> int:
        """Prompt tokens that the cache does not hold yet."""
        return len(self.prompt) - self.keep


def chunk_length(left: int) -> int:
    """The length of the chunks that `left` tokens are cut into: equal, for few lengths and little padding."""
    return bucket(-(-left // -(-left // MAX_CHUNK)), MIN_LENGTH)


class ChunkBounds(NamedTuple):
    """Where a chunk of T tokens begins and ends in each row's prompt."""

    t: int
    bounds: dict[int, tuple[int, int]]


def chunk_bounds(starts: Mapping[int, Start], capacity: int) -> list[ChunkBounds]:
    """Cut prompts into chunks, for a cache of this capacity.

    All rows of a chunk are T long. A row with fewer tokens left is padded; where its padding would reach beyond the
    cache, or no token is left at all, it takes its chunk from further back and writes the same values again.
    """
    done = {i: start.keep for i, start in starts.items()}
    ends = {i: len(start.prompt) for i, start in starts.items()}
    left = max(ends[i] - done[i] for i in starts)
    t = chunk_length(left)
    result = []
    while any(done[i] < ends[i] for i in starts):
        bounds = {}
        for i, begin in done.items():
            if begin == ends[i] or begin + t > capacity:
                begin = max(0, min(begin, ends[i] - t))
            bounds[i] = begin, min(begin + t, ends[i])
        done = {i: end for i, (_, end) in bounds.items()}
        result.append(ChunkBounds(t, bounds))
    return result


def longest_live_chunk(platform: str) -> int:
    """Return the length from which longer chunks would take as long for a token: prompts share whole chunks alone.

    >>> longest_live_chunk("cpu"), longest_live_chunk("tpu")
    (128, 256)
    """
    return 128 if platform == "cpu" else 256


def live_chunk(parameters: int, platform: str) -> int:
    """Return the longest chunk that takes a decoder with this many parameters about as long as a dispatch.

    >>> live_chunk(250_000_000, "cpu"), live_chunk(1_000_000, "cpu"), live_chunk(9_000_000_000, "tpu")
    (16, 128, 256)
    """
    longest = longest_live_chunk(platform)
    if platform != "cpu":
        return longest
    fitting = int(_CPU_WORK / (2 * parameters))
    return max(MIN_LIVE_CHUNK, min(longest, 1 << max(fitting.bit_length() - 1, 0)))


def chunk_ends(prompt: Prompt, longest: int, whole: int = 0) -> list[int]:
    """Where the chunks of a prompt end that has a row of its own, but for the last chunk of a prompt that ends before.

    Each depends on what comes before it alone, so that prompts with a common prefix have its chunks in common. Then
    they have equal keys too, to the last bit: a chunk is always run with the same shapes.

    One has `longest` tokens at most; a prompt of up to `whole` tokens is one chunk, as each chunk reads all weights: it
    shares all or nothing.
    """
    if len(prompt) <= whole:
        return []
    last = [np.flatnonzero(prompt.medium_of == number) for number in range(len(prompt.media))]
    media_ends = [int(tokens[-1]) + 1 for tokens in last if len(tokens)]
    ends = [0]
    while True:
        limit = ends[-1] + longest
        end = next((end for end in media_ends if ends[-1] + MIN_SHARED <= end < limit), limit)
        if end > len(prompt):
            return ends[1:]
        ends.append(end)


def chunk_arrays(
    chunk: ChunkBounds, starts: Mapping[int, Start], vision: Mapping[int, np.ndarray], n: int
) -> PrefillChunk:
    """The arrays of a chunk for n rows."""
    ids, segments, index = (np.zeros((n, chunk.t), np.int32) for _ in range(3))
    positions, keep = np.ones((3, n, chunk.t), np.int32), np.zeros(n, np.int32)
    index -= 1
    for i, (begin, end) in chunk.bounds.items():
        prompt, here = starts[i].prompt, slice(0, end - begin)
        ids[i, here] = prompt.input_ids[begin:end]
        positions[:, i, here] = prompt.position_ids[:, begin:end]
        segments[i, here] = 1
        index[i, here] = vision[i][begin:end]
        keep[i] = begin
    return PrefillChunk(ids, positions, segments, index, keep)
