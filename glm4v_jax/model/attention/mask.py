"""Who sees whom: segments and slots, for single pairs and for the blocks that kernels skip.

Dimension letters: B rows of the batch, T queries, S keys; NQ and NK blocks of them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Masked scores are finite: a row that sees nothing must give zeros, not NaN. The running maximum starts so far above
# them that their exponentials are zero against it too.
MASKED = -1e30
FLOOR = -1e29


class Mask(NamedTuple):
    """A query sees the keys of its own segment; where attention is causal, none of a later slot.

    q_segments: int32 [B, T]; kv_segments: int32 [B, S]; 0 is padding and sees nothing.
    q_start: int32 [B], the slot of each row's first query, where key s is in slot s; None for 0. It may be negative or
      beyond S.
    """

    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]
    q_start: Int[Array, " B"] | None = None


def visible(mask: Mask, t: Int[Array, " t"], s: Int[Array, " s"], causal: bool) -> Bool[Array, "B t s"]:
    """Which of the queries with indices `t` see which of the keys `s`; `mask` holds the segments of these."""
    same = mask.q_segments[:, :, None] == mask.kv_segments[:, None, :]
    seen = same & (mask.kv_segments > 0)[:, None, :]
    if causal:
        first = 0 if mask.q_start is None else mask.q_start[:, None]
        seen &= (first + t[None])[:, :, None] >= s
    return seen


def reachable(mask: Mask, blocks: tuple[int, int], causal: bool) -> Bool[Array, "B NQ NK"]:
    """False only where no query of a block can see any key of another.

    Args:
      mask: of T and S that divide by the blocks. Segments below 1 see nothing.
      blocks: queries and keys of a block.
      causal: whether keys of later slots are hidden.
    """

    def ranges(segments: Array, block: int) -> tuple[Array, Array]:
        segments = segments.reshape(segments.shape[0], -1, block)
        return jnp.min(jnp.where(segments > 0, segments, jnp.iinfo(jnp.int32).max), axis=-1), jnp.max(segments, axis=-1)

    (q_low, q_high), (k_low, k_high) = ranges(mask.q_segments, blocks[0]), ranges(mask.kv_segments, blocks[1])
    overlap = (q_high[:, :, None] >= k_low[:, None]) & (q_low[:, :, None] <= k_high[:, None])
    if causal:
        start = jnp.zeros_like(q_low[:, 0]) if mask.q_start is None else mask.q_start
        last_query = start[:, None] + (1 + jnp.arange(q_low.shape[1])) * blocks[0] - 1
        overlap &= last_query[:, :, None] >= jnp.arange(k_low.shape[1]) * blocks[1]
    return overlap


def covered(mask: Mask, blocks: tuple[int, int], causal: bool) -> Bool[Array, "B NQ NK"]:
    """True only where every query of a block sees every key of another: there the scores need no mask.

    Args:
      mask, blocks, causal: as for `reachable`.
    """

    def ranges(segments: Array, block: int) -> tuple[Array, Array]:
        segments = segments.reshape(segments.shape[0], -1, block)
        return jnp.min(segments, axis=-1), jnp.max(segments, axis=-1)

    (q_low, q_high), (k_low, k_high) = ranges(mask.q_segments, blocks[0]), ranges(mask.kv_segments, blocks[1])
    same = (q_low[:, :, None] == k_high[:, None]) & (q_high[:, :, None] == k_low[:, None]) & (k_low[:, None] > 0)
    same &= (q_low == q_high)[:, :, None]
    if causal:
        start = jnp.zeros_like(q_low[:, 0]) if mask.q_start is None else mask.q_start
        first_query = start[:, None] + jnp.arange(q_low.shape[1]) * blocks[0]
        same &= first_query[:, :, None] >= (1 + jnp.arange(k_low.shape[1])) * blocks[1] - 1
    return same
