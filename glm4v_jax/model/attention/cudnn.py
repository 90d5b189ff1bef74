"""Attention on NVIDIA GPUs: cuDNN's kernel for plain rows, blocks for the others.

`jax.nn.dot_product_attention` takes lengths, not segments, and a causal mask that begins with slot 0. Packed rows, left
padding and prefill chunks after a cache therefore go in blocks: the program chooses by the mask. Merging attention to a
cache with that to the chunk itself would not help: the logarithms of cuDNN's sums are rounded to 16 bits.

Every array is local to a device: call these within `jax.shard_map`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glm4v_jax.model.attention import blockwise
from glm4v_jax.model.attention.blockwise import partial
from glm4v_jax.model.attention.mask import Mask

__all__ = ["attention", "partial"]

HEAD_DIMS = range(8, 129, 8)
"""Head sizes that cuDNN takes on all GPUs; on Hopper and later up to 256."""


def attention(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    *,
    causal: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B K G T H"]:
    """`blockwise.attention`, by cuDNN if every row is one segment with padding, if any, after it.

    `implementation` "xla" computes cuDNN's part with all scores at once, on any platform, for tests.
    """

    def in_blocks() -> Array:
        return blockwise.attention(q, k, v, mask, causal=causal)

    def by_lengths() -> Array:
        return _by_lengths(q, k, v, mask, causal, implementation)

    return jax.lax.cond(is_plain(mask), by_lengths, in_blocks) if fits(q, mask) else in_blocks()


def fits(q: Float[Array, "B K G T H"], mask: Mask) -> bool:
    """Whether cuDNN takes these types and shapes."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    is_prompt = mask.q_start is None and mask.kv_segments.shape[1] == q.shape[-2]
    return half and is_prompt and q.shape[-1] in HEAD_DIMS


def is_plain(mask: Mask) -> Bool[Array, ""]:
    """Whether every row is one segment, the same for queries and keys, with padding after it."""
    segments = mask.q_segments
    own = jnp.where(jnp.arange(segments.shape[1]) < _lengths(segments)[:, None], segments[:, :1], 0)
    return jnp.all(own == segments) & jnp.all(segments == mask.kv_segments)


def _by_lengths(q: Array, k: Array, v: Array, mask: Mask, causal: bool, implementation: str) -> Array:
    batch, *_, t, head_dim = q.shape

    def rows_first(x: Array) -> Array:
        """[B, ..., T, H] -> [B, T, heads, H]."""
        return jnp.moveaxis(x.reshape(batch, -1, t, head_dim), 1, 2)

    # No row is empty for the kernel, whose softmax over nothing is not defined.
    lengths = jnp.maximum(_lengths(mask.q_segments), 1)
    out = jax.nn.dot_product_attention(
        rows_first(q),
        rows_first(k),
        rows_first(v),
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,  # type: ignore[arg-type]
    )
    out = jnp.moveaxis(out, 2, 1).reshape(q.shape)
    return jnp.where((mask.q_segments > 0)[:, None, None, :, None], out, 0)


def _lengths(segments: Int[Array, "B T"]) -> Int[Array, " B"]:
    """How many tokens of each row are not padding."""
    return jnp.sum(segments > 0, axis=-1, dtype=jnp.int32)
