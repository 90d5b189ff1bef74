"""Attention: one function, `attend`, for the ViT, prefill, decoding and training.

A query sees a key if both are in the same segment (0 is padding and sees nothing) and, where it is causal, the key's
slot is not after the query's. That covers packed rows, left and right padding, and a cache that is only partly
filled.

Nothing here materialises a T x S score matrix, except `attend_with_weights`, for callers who ask for the weights:
scores live one block at a time (an online softmax, forward and backward), and blocks that no query can see are
skipped. Source of the algorithm: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from glm4v_jax.nn import precision

BLOCKS = (512, 384, 256)
# Below this many queries the scores are linear in the number of keys anyway: decoding takes the direct path.
FEW_QUERIES = 8
SCORES = "bkgth,bksh->bkgts"
# Masked scores are finite: a row that sees nothing must give zeros, not NaN. The running maximum starts so far above
# them that their exponentials are zero against it too.
MASKED = -1e30
FLOOR = -1e29


class Mask(NamedTuple):
    """Who sees whom; see the module's docstring.

    q_segments: int32 [B, T]; kv_segments: int32 [B, S]; 0 is padding. q_start: int32 [B], the slot of each row's first
    query; key s is in slot s.
    """

    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]
    q_start: Int[Array, " B"]


class Dropout(NamedTuple):
    """Dropout of attention probabilities; None in its place means none."""

    key: PRNGKeyArray
    rate: float


def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    causal: bool,
    dropout: Dropout | None = None,
) -> Float[Array, "B T K G H"]:
    """Softmax attention, scaled by 1 / sqrt(H); G query heads share each of the K key and value heads.

    Scores, softmax and accumulation are float32. Rows that see no key give zeros.
    """
    if q.shape[1] <= FEW_QUERIES:
        return attend_with_weights(q, k, v, mask, causal=causal, dropout=dropout)[0]
    t, s = q.shape[1], k.shape[1]
    block_q, block_k = _block_size(t), _block_size(s)
    # Heads first, once: a block is then a batch of matrices as it lies in memory, and no product copies it.
    q = _pad(jnp.moveaxis(q, 1, 3), -2, block_q)
    k, v = (_pad(jnp.moveaxis(x, 1, 2), -2, block_k) for x in (k, v))
    mask = Mask(_pad(mask.q_segments, 1, block_q), _pad(mask.kv_segments, 1, block_k), mask.q_start)
    key, rate = (dropout.key, dropout.rate) if dropout is not None and dropout.rate > 0 else (None, 0.0)
    return jnp.moveaxis(_flash(q, k, v, mask, key, (block_q, block_k), causal, rate), 3, 1)[:, :t]


def attend_with_weights(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    causal: bool,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B K G T S"]]:
    """`attend`, and the attention weights in q's dtype: memory grows with T x S."""
    q, k, v = jnp.moveaxis(q, 1, 3), jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    visible = _visible(mask, jnp.arange(q.shape[-2]), jnp.arange(k.shape[-2]), causal)[:, None, None]
    # The keys are the matrix and the few queries the vectors: the other way round keys would be transposed first.
    scores = jnp.where(visible, jnp.moveaxis(_scores("bksh,bkgth->bksgt", k, q), 2, -1), MASKED)
    p = jnp.exp(scores - jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), FLOOR))
    p = p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    if dropout is not None and dropout.rate > 0:
        p = p * _keep(dropout.key, 0, 0, p.shape, dropout.rate)
    p = p.astype(q.dtype)
    return jnp.moveaxis(_einsum("bkgts,bksh->bkgth", p, v).astype(q.dtype), 3, 1), p


def attend_cached(
    q: Float[Array, "B T K G H"],
    cached: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    new: tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]],
    mask: Mask,
) -> Float[Array, "B T K G H"]:
    """Causal attention of a few new tokens to a cache that does not hold them yet, and to themselves.

    A cache that layers only read is neither sliced nor put back by any of them. `mask.kv_segments` are the cache's, of
    which slots from `q_start` on do not count.
    """
    q = jnp.moveaxis(q, 1, 3)
    slots, t = jnp.arange(cached[0].shape[-2]), jnp.arange(q.shape[-2])
    held = jnp.where(slots < mask.q_start[:, None], mask.kv_segments, 0)
    visible = [
        _visible(Mask(mask.q_segments, held, mask.q_start), t, slots, causal=False),
        _visible(Mask(mask.q_segments, mask.q_segments, mask.q_start * 0), t, t, causal=True),
    ]
    scores = [
        jnp.where(seen[:, None, None], jnp.moveaxis(_scores("bksh,bkgth->bksgt", k, q), 2, -1), MASKED)
        for seen, (k, _) in zip(visible, (cached, new), strict=True)
    ]
    top = jnp.maximum(functools.reduce(jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x in scores)), FLOOR)
    p = [jnp.exp(x - top) for x in scores]
    total = jnp.maximum(sum(jnp.sum(x, axis=-1, keepdims=True) for x in p), jnp.finfo(jnp.float32).tiny)
    out = sum(
        _einsum("bkgts,bksh->bkgth", (x / total).astype(q.dtype), v) for x, (_, v) in zip(p, (cached, new), strict=True)
    )
    return jnp.moveaxis(out.astype(q.dtype), 3, 1)


def _einsum(equation: str, a: Array, b: Array, like: Array | None = None) -> Array:
    """In float32; `like` has the result's shape and partition, for sums over the query groups, which may be sharded."""
    out = None if like is None else jax.typeof(like).sharding
    return jnp.einsum(
        equation, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32, out_sharding=out
    )


def _scores(equation: str, a: Array, b: Array) -> Array:
    return _einsum(equation, a, b) * (a.shape[-1] ** -0.5)


def _visible(mask: Mask, t: Int[Array, " t"], s: Int[Array, " s"], causal: bool) -> Array:
    """bool [B, t, s] for the queries `t` and keys `s` whose segments `mask` holds."""
    same = mask.q_segments[:, :, None] == mask.kv_segments[:, None, :]
    visible = same & (mask.kv_segments > 0)[:, None, :]
    if causal:
        visible &= (mask.q_start[:, None] + t)[:, :, None] >= s
    return visible


def _keep(key: PRNGKeyArray, i: Array | int, j: Array | int, shape: tuple[int, ...], rate: float) -> Array:
    """1 / (1 - rate) where a probability of block (i, j) is kept, 0 where it is dropped."""
    key = jax.random.fold_in(jax.random.fold_in(key, i), j)
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


def _block_size(n: int) -> int:
    return n if n <= BLOCKS[0] else min(BLOCKS, key=lambda block: (-n % block, -block))


def _pad(x: Array, axis: int, block: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def _reachable(mask: Mask, blocks: tuple[int, int], causal: bool) -> Array:
    """bool [NQ, NK]: False only where no query of block i can see any key of block j, in any row of the batch."""

    def ranges(segments: Array, block: int) -> tuple[Array, Array]:
        segments = segments.reshape(segments.shape[0], -1, block)
        return jnp.min(jnp.where(segments > 0, segments, jnp.iinfo(jnp.int32).max), axis=-1), jnp.max(segments, axis=-1)

    (q_low, q_high), (k_low, k_high) = ranges(mask.q_segments, blocks[0]), ranges(mask.kv_segments, blocks[1])
    overlap = (q_high[:, :, None] >= k_low[:, None]) & (q_low[:, :, None] <= k_high[:, None])
    if causal:
        last_query = mask.q_start[:, None] + (1 + jnp.arange(q_low.shape[1])) * blocks[0] - 1
        overlap &= last_query[:, :, None] >= jnp.arange(k_low.shape[1]) * blocks[1]
    return jnp.any(overlap, axis=0)


def _span(row: Array) -> tuple[Array, Array]:
    """First and one past the last True of a bool vector; (0, 0) if there is none."""
    n, some = row.shape[0], jnp.any(row)
    return jnp.where(some, jnp.argmax(row), 0), jnp.where(some, n - jnp.argmax(row[::-1]), 0)


def _block(x: Array, i: Array, size: int, axis: int = -2) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _mask_block(mask: Mask, i: Array, j: Array, blocks: tuple[int, int], causal: bool) -> Array:
    block = Mask(_block(mask.q_segments, i, blocks[0], 1), _block(mask.kv_segments, j, blocks[1], 1), mask.q_start)
    t, s = i * blocks[0] + jnp.arange(blocks[0]), j * blocks[1] + jnp.arange(blocks[1])
    return _visible(block, t, s, causal)[:, None, None]


def _merge_blocks(x: Array, like: Array, axis: int = -2) -> Array:
    """Blocks along `axis` as a scan stacks them, [N, ..., block, ...] -> `like`'s shape and partition."""
    return jnp.moveaxis(x, 0, axis - 1).reshape(like.shape, out_sharding=jax.typeof(like).sharding)


# Within, queries are [B, K, G, T, H], keys and values [B, K, S, H].
@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _flash(q, k, v, mask, key, blocks, causal, rate):  # type: ignore[no-untyped-def]
    return _flash_forward(q, k, v, mask, key, blocks, causal, rate)[0]


def _flash_forward(q, k, v, mask, key, blocks, causal, rate):  # type: ignore[no-untyped-def]
    reachable = _reachable(mask, blocks, causal)

    def query_block(_, i):  # type: ignore[no-untyped-def]
        q_i = _block(q, i, blocks[0])
        empty = jnp.zeros_like(q_i, jnp.float32)

        def key_block(j, carry):  # type: ignore[no-untyped-def]
            out, top, total = carry
            visible = _mask_block(mask, i, j, blocks, causal)
            scores = jnp.where(visible, _scores(SCORES, q_i, _block(k, j, blocks[1])), MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            p = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(p, axis=-1)
            if rate > 0:
                p = p * _keep(key, i, j, p.shape, rate)
            out = out * shrink[..., None] + _einsum("bkgts,bksh->bkgth", p.astype(v.dtype), _block(v, j, blocks[1]))
            return out, new_top, total

        carry = (empty, empty[..., 0] + FLOOR, empty[..., 0])
        out, top, total = jax.lax.fori_loop(*_span(reachable[i]), key_block, carry)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, (out, log_total) = jax.lax.scan(query_block, None, jnp.arange(q.shape[-2] // blocks[0]))
    out, log_total = _merge_blocks(out, q), _merge_blocks(log_total, q[..., 0], -1)
    return out, (q, k, v, mask, key, out, log_total)


def _flash_backward(blocks, causal, rate, saved, d_out):  # type: ignore[no-untyped-def]
    q, k, v, mask, key, out, log_total = saved
    reachable = _reachable(mask, blocks, causal)
    # Row sums of p * dp (FlashAttention-2, eq. 4): they hold with dropout too, for both sides are dropped alike.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    scale = q.shape[-1] ** -0.5

    def probabilities(i, j):  # type: ignore[no-untyped-def]
        """Block (i, j): p as the softmax made it, p as it met the values, and the gradient of the scores."""
        visible = _mask_block(mask, i, j, blocks, causal)
        row = [_block(x, i, blocks[0], -1)[..., None] for x in (log_total, delta)]
        scores = _scores(SCORES, _block(q, i, blocks[0]), _block(k, j, blocks[1]))
        p = jnp.exp(jnp.where(visible, scores, MASKED) - row[0])
        keep = _keep(key, i, j, p.shape, rate) if rate > 0 else 1.0
        dp = keep * _einsum(SCORES, _block(d_out, i, blocks[0]), _block(v, j, blocks[1]))
        return p * keep, (p * (dp - row[1]) * scale).astype(q.dtype)

    def query_block(_, i):  # type: ignore[no-untyped-def]
        def add(j, dq):  # type: ignore[no-untyped-def]
            return dq + _einsum("bkgts,bksh->bkgth", probabilities(i, j)[1], _block(k, j, blocks[1]))

        zero = jnp.zeros_like(_block(q, i, blocks[0]), jnp.float32)
        return None, jax.lax.fori_loop(*_span(reachable[i]), add, zero)

    def key_block(_, j):  # type: ignore[no-untyped-def]
        def add(i, carry):  # type: ignore[no-untyped-def]
            dk, dv = carry
            p, ds = probabilities(i, j)
            dk = dk + _einsum("bkgts,bkgth->bksh", ds, _block(q, i, blocks[0]), like=zero)
            return dk, dv + _einsum("bkgts,bkgth->bksh", p.astype(v.dtype), _block(d_out, i, blocks[0]), like=zero)

        zero = jnp.zeros_like(_block(k, j, blocks[1]), jnp.float32)
        return None, jax.lax.fori_loop(*_span(reachable[:, j]), add, (zero, zero))

    _, dq = jax.lax.scan(query_block, None, jnp.arange(q.shape[-2] // blocks[0]))
    _, (dk, dv) = jax.lax.scan(key_block, None, jnp.arange(k.shape[-2] // blocks[1]))
    dq, dk, dv = (_merge_blocks(d, x).astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, None, None


_flash.defvjp(_flash_forward, _flash_backward)
