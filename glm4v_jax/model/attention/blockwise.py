"""Attention in blocks, in plain JAX: what runs where the platform has no kernel, and what the kernels must equal.

Nothing here materialises a T x S score matrix: scores live one block at a time (an online softmax, forward and
backward), and blocks that no query can see are skipped. Source of the algorithm: FlashAttention-2, arXiv 2307.08691,
algorithms 1 and 2.

Arrays are those of one device, heads first: queries [B, K, G, T, H], keys and values [B, K, S, H].
"""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from glm4v_jax.devices import mesh
from glm4v_jax.model.attention.mask import FLOOR, MASKED, Mask, covered, reachable, visible
from glm4v_jax.model.kv_cache import QuantizedSide
from glm4v_jax.model.nn import precision

BLOCKS = (512, 384, 256)
CAUSAL_CPU_BLOCKS = (256, 128)
"""On a CPU small blocks pay where half of the pairs are in the future: rows of 1,024 take 0.7 of the time, forward and
backward, that blocks of 512 take, and 0.5 packed with samples of 230. An image of 4,096 patches would take 1.4."""
_CORE_SCORES = 1 << 19
"""Scores of a block for each core of a CPU: all 16 heads of a ViT at once would take 1.2 of the time, half
of these scores 0.98 to 1.05, by the version of jax and the number of patches."""
SCORES = "bkgth,bksh->bkgts"
SAVED = "attention"
"""Name of what the backward pass of attention needs besides queries, keys and values (`layers.Remat`)."""


class Dropout(NamedTuple):
    """Dropout of attention probabilities; None in its place means none."""

    key: PRNGKeyArray
    rate: float


def attention(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    *,
    causal: bool,
    dropout: Dropout | None = None,
) -> Float[Array, "B K G T H"]:
    """Softmax attention, scaled by 1 / sqrt(H); scores, softmax and accumulation in float32.

    Rows that see no key give zeros. Differentiable.
    """
    q, k, v, mask, blocks, t = _blocked(q, k, v, mask, causal)
    key, rate = (dropout.key, dropout.rate) if dropout is not None and dropout.rate > 0 else (None, 0.0)
    return _flash(q, k, v, mask, key, blocks, causal, rate)[..., :t, :]


def partial(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"] | QuantizedSide,
    v: Float[Array, "B K S H"] | QuantizedSide,
    mask: Mask,
    *,
    causal: bool,
    row: Array | None = None,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
    """Attention to some of the keys, to be merged with that to the others (`attend.merge`).

    Args:
      q, k, v, mask, causal: see `attention`.
      row: the only row of keys and values, which may have more, that the one row of queries sees; it is read in blocks.

    Returns:
      As `attention` does, float32; and float32, the logarithm of each row's sum of exponentials of scores.
    """
    if row is not None and (mask.kv_segments.shape[1] % _block_size(mask.kv_segments.shape[1], causal)):
        k, v = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), (k, v))  # to be padded
        row = None
    q, k, v, mask, blocks, t = _blocked(q, k, v, mask, causal)
    out, log_total = _forward(q, k, v, mask, None, blocks, causal, 0.0, row)
    return out[..., :t, :], log_total[..., :t]


def _blocked(
    q: Array, k: Array | QuantizedSide, v: Array | QuantizedSide, mask: Mask, causal: bool
) -> tuple[Array, Any, Any, Mask, tuple[int, int], int]:
    """Pad everything to multiples of the blocks; the blocks; the number of queries before."""
    t, s = q.shape[-2], mask.kv_segments.shape[1]
    blocks = _block_size(t, causal), _block_size(s, causal)
    q = pad(q, -2, blocks[0])
    k, v = jax.tree.map(lambda x: pad(x, 2, blocks[1]), (k, v))
    start = jnp.zeros_like(mask.q_segments[:, 0]) if mask.q_start is None else mask.q_start
    mask = Mask(pad(mask.q_segments, 1, blocks[0]), pad(mask.kv_segments, 1, blocks[1]), start)
    return q, k, v, mask, blocks, t


def einsum(equation: str, a: Array, b: Array) -> Array:
    """Contract in float32, whatever the operands are."""
    return jnp.einsum(equation, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def scores_of(equation: str, a: Array, b: Array) -> Array:
    """Products of queries and keys, scaled."""
    return einsum(equation, a, b) * (a.shape[-1] ** -0.5)


def multiplied(side: Array | QuantizedSide, dtype: DTypeLike) -> Array:
    """What products take of keys or values: themselves, or their integers, which are exact in every float dtype."""
    return side.integers.astype(dtype) if isinstance(side, QuantizedSide) else side


def scaled(x: Float[Array, "B K G T S"], side: Array | QuantizedSide) -> Float[Array, "B K G T S"]:
    """Apply the scales of keys to scores, or those of values to probabilities, so that no floats of them are made."""
    return x * side.scale[:, :, None, None] if isinstance(side, QuantizedSide) else x


def keep(key: PRNGKeyArray, i: Array | int, j: Array | int, shape: tuple[int, ...], rate: float) -> Array:
    """1 / (1 - rate) where a probability of block (i, j) is kept, 0 where it is dropped."""
    key = jax.random.fold_in(jax.random.fold_in(key, i), j)
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


def _block_size(n: int, causal: bool) -> int:
    blocks = CAUSAL_CPU_BLOCKS if causal and mesh.platform() == "cpu" else BLOCKS
    return n if n <= blocks[0] else min(blocks, key=lambda block: (-n % block, -block))


def pad(x: Array, axis: int, block: int, value: int = 0) -> Array:
    """Pad an axis at its end to a multiple of a block."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)


def _span(row: Array) -> tuple[Array, Array]:
    """First and one past the last True of a bool vector; (0, 0) if there is none."""
    n, some = row.shape[0], jnp.any(row)
    return jnp.where(some, jnp.argmax(row), 0), jnp.where(some, n - jnp.argmax(row[::-1]), 0)


def _block(x: Array, i: Array, size: int, axis: int = -2) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _key_block(x: Array, row: Array | None, j: Array, size: int) -> Array:
    """A block of keys or values, of one row if it is given: in one slice, of which XLA copies nothing ahead."""
    if row is None:
        return _block(x, j, size, 2)
    return jax.lax.dynamic_slice(x, (row, 0, j * size, *(0,) * (x.ndim - 3)), (1, x.shape[1], size, *x.shape[3:]))


def _mask_block(mask: Mask, i: Array, j: Array, blocks: tuple[int, int], causal: bool) -> Array:
    block = Mask(_block(mask.q_segments, i, blocks[0], 1), _block(mask.kv_segments, j, blocks[1], 1), mask.q_start)
    t, s = i * blocks[0] + jnp.arange(blocks[0]), j * blocks[1] + jnp.arange(blocks[1])
    return visible(block, t, s, causal)[:, None, None]


def _merge_blocks(x: Array, axis: int = -2) -> Array:
    """Blocks along `axis` as a scan stacks them: [N, ..., block, ...] -> [..., N * block, ...]."""
    first = x.ndim + axis - 1
    return jax.lax.collapse(jnp.moveaxis(x, 0, first), first, first + 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _flash(q, k, v, mask, key, blocks, causal, rate):  # type: ignore[no-untyped-def]
    return _flash_forward(q, k, v, mask, key, blocks, causal, rate)[0]


def _flash_forward(q, k, v, mask, key, blocks, causal, rate):  # type: ignore[no-untyped-def]
    out, log_total = _forward(q, k, v, mask, key, blocks, causal, rate)
    out, log_total = (checkpoint_name(x, SAVED) for x in (out.astype(q.dtype), log_total))
    return out, (q, k, v, mask, key, out, log_total)


def _forward(q, k, v, mask, key, blocks, causal, rate, row=None):  # type: ignore[no-untyped-def]
    """The result, and the logarithm of each row's sum of exponentials; both float32."""
    together = q.shape[1] if rate > 0 else _heads_together(q, blocks)
    if together == q.shape[1]:
        return _forward_heads(q, k, v, mask, key, blocks, causal, rate, row)
    if row is not None:
        k, v = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), (k, v))

    def heads(_, n):  # type: ignore[no-untyped-def]
        some_q, some_k, some_v = jax.tree.map(lambda x: _block(x, n, together, 1), (q, k, v))
        return None, _forward_heads(some_q, some_k, some_v, mask, key, blocks, causal, rate)

    _, (out, log_total) = jax.lax.scan(heads, None, jnp.arange(q.shape[1] // together))
    return _merge_blocks(out, -4), _merge_blocks(log_total, -3)


def _heads_together(q: Array, blocks: tuple[int, int]) -> int:
    """How many of the key heads a block of scores has: on a CPU as many as stay in the caches of its cores."""
    rows, heads, groups, *_ = q.shape
    if mesh.platform() != "cpu":
        return heads
    most = _CORE_SCORES * (os.cpu_count() or 1) // (rows * groups * blocks[0] * blocks[1])
    return next(count for count in range(max(1, min(heads, most)), 0, -1) if heads % count == 0)


def _forward_heads(q, k, v, mask, key, blocks, causal, rate, row=None):  # type: ignore[no-untyped-def]
    seen_blocks = jnp.any(reachable(mask, blocks, causal), axis=0)
    # A mask costs a pass over the scores: where all are visible 0.7 of the time without.
    is_covered = jnp.all(covered(mask, blocks, causal), axis=0)
    scale = q.shape[-1] ** -0.5

    def query_block(_, i):  # type: ignore[no-untyped-def]
        q_i = _block(q, i, blocks[0])
        empty = jnp.zeros_like(q_i, jnp.float32)

        def key_block(j, carry):  # type: ignore[no-untyped-def]
            def add(is_masked, out, top, total):  # type: ignore[no-untyped-def]
                k_j, v_j = jax.tree.map(lambda x: _key_block(x, row, j, blocks[1]), (k, v))
                scores = scaled(einsum(SCORES, q_i, multiplied(k_j, q.dtype)), k_j)
                if is_masked:
                    scores = jnp.where(_mask_block(mask, i, j, blocks, causal), scores, MASKED / scale)
                new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
                # Scaled here, where it costs no pass of its own.
                p = jnp.exp((scores - new_top[..., None]) * scale)
                shrink = jnp.exp((top - new_top) * scale)
                total = total * shrink + jnp.sum(p, axis=-1)
                if rate > 0:
                    p = p * keep(key, i, j, p.shape, rate)
                values = multiplied(v_j, q.dtype)
                out = out * shrink[..., None] + einsum("bkgts,bksh->bkgth", scaled(p, v_j).astype(values.dtype), values)
                return out, new_top, total

            # All of it in the branches: scores would be copied to get there.
            branches = (functools.partial(add, is_masked) for is_masked in (False, True))
            return jax.lax.cond(is_covered[i, j], *branches, *carry)

        carry = (empty, empty[..., 0] + FLOOR / scale, empty[..., 0])
        out, top, total = jax.lax.fori_loop(*_span(seen_blocks[i]), key_block, carry)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return None, (out / total[..., None], top * scale + jnp.log(total))

    _, (out, log_total) = jax.lax.scan(query_block, None, jnp.arange(q.shape[-2] // blocks[0]))
    return _merge_blocks(out), _merge_blocks(log_total, -1)


def _flash_backward(blocks, causal, rate, saved, d_out):  # type: ignore[no-untyped-def]
    q, k, v, mask, key, out, log_total = saved
    seen_blocks = jnp.any(reachable(mask, blocks, causal), axis=0)
    # Row sums of p * dp (FlashAttention-2, eq. 4): they hold with dropout too, for both sides are dropped alike.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    scale = q.shape[-1] ** -0.5

    def probabilities(i, j):  # type: ignore[no-untyped-def]
        """Block (i, j): p as the softmax made it, p as it met the values, and the gradient of the scores."""
        seen = _mask_block(mask, i, j, blocks, causal)
        row = [_block(x, i, blocks[0], -1)[..., None] for x in (log_total, delta)]
        scores = scores_of(SCORES, _block(q, i, blocks[0]), _block(k, j, blocks[1]))
        p = jnp.exp(jnp.where(seen, scores, MASKED) - row[0])
        kept = keep(key, i, j, p.shape, rate) if rate > 0 else 1.0
        dp = kept * einsum(SCORES, _block(d_out, i, blocks[0]), _block(v, j, blocks[1]))
        return p * kept, (p * (dp - row[1]) * scale).astype(q.dtype)

    def query_block(_, i):  # type: ignore[no-untyped-def]
        def add(j, dq):  # type: ignore[no-untyped-def]
            return dq + einsum("bkgts,bksh->bkgth", probabilities(i, j)[1], _block(k, j, blocks[1]))

        zero = jnp.zeros_like(_block(q, i, blocks[0]), jnp.float32)
        return None, jax.lax.fori_loop(*_span(seen_blocks[i]), add, zero)

    def key_block(_, j):  # type: ignore[no-untyped-def]
        def add(i, carry):  # type: ignore[no-untyped-def]
            dk, dv = carry
            p, ds = probabilities(i, j)
            dk = dk + einsum("bkgts,bkgth->bksh", ds, _block(q, i, blocks[0]))
            return dk, dv + einsum("bkgts,bkgth->bksh", p.astype(v.dtype), _block(d_out, i, blocks[0]))

        zero = jnp.zeros_like(_block(k, j, blocks[1]), jnp.float32)
        return None, jax.lax.fori_loop(*_span(seen_blocks[:, j]), add, (zero, zero))

    _, dq = jax.lax.scan(query_block, None, jnp.arange(q.shape[-2] // blocks[0]))
    _, (dk, dv) = jax.lax.scan(key_block, None, jnp.arange(k.shape[-2] // blocks[1]))
    dq, dk, dv = (_merge_blocks(d).astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, None, None


_flash.defvjp(_flash_forward, _flash_backward)
