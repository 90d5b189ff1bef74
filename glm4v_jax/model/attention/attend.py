"""Attention of the ViT, prefill, decoding and training: kernels for one device, applied to the arrays of a mesh.

A query sees a key if both are in the same segment (0 is padding and sees nothing) and, where it is causal, the key's
slot is not after the query's (`mask`). That covers packed rows, left and right padding, and a cache that is partly
filled.

Rows, heads and groups of query heads are independent, so that every device works alone in a `shard_map`. Queries that
are sharded along their length need all keys, which are gathered. The slots of a cache stay where they are: every device
attends to its own, and the results are merged.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from glm4v_jax.devices import mesh
from glm4v_jax.model.attention import blockwise
from glm4v_jax.model.attention.blockwise import Dropout, einsum, multiplied, scaled, scores_of
from glm4v_jax.model.attention.mask import FLOOR, MASKED, Mask, visible
from glm4v_jax.model.kv_cache import QuantizedSide

# Below this many queries the scores are linear in the number of keys anyway: decoding takes the direct path.
FEW_QUERIES = 8
_LARGE_CACHE = 1024
"""Slots from which a decode step on a CPU reads in blocks, and those alone that are used, while many are free: with a
tenth of 4,096 slots in use that takes 0.2 of the time, with five eighths 0.7 to 1. With all of them it would take 1.3
times as long."""


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

    Scores, softmax and accumulation are float32. Rows that see no key give zeros. Where it is not causal, queries may
    be sharded along T; the result is sharded as they are.
    """
    spec = mesh.spec_of(q)
    rows, length, heads, *_ = spec
    assert not causal or length is None, "sharded queries would need their slots counted"
    if length is None and q.shape[1] <= FEW_QUERIES:
        return attend_with_weights(q, k, v, mask, causal=causal, dropout=dropout)[0]
    keys, key_rows = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
    k, v = (jax.sharding.reshard(x, keys) for x in (k, v))
    segments = jax.sharding.reshard(mask.q_segments, PartitionSpec(rows, length))
    start = None if mask.q_start is None else jax.sharding.reshard(mask.q_start, PartitionSpec(rows))
    mask = Mask(segments, jax.sharding.reshard(mask.kv_segments, key_rows), start)
    key, rate = (dropout.key, dropout.rate) if dropout is not None and dropout.rate > 0 else (None, 0.0)

    def local(q: Array, k: Array, v: Array, mask: Mask, key: Array | None) -> Array:
        # Heads first, once: a block is then a batch of matrices as it lies in memory, and no product copies it.
        q, k, v = jnp.moveaxis(q, 1, 3), jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        if key is None:
            out = _kernel().attention(q, k, v, mask, causal=causal)
        else:
            drop = Dropout(_own_key(key, spec), rate)
            out = blockwise.attention(q, k, v, mask, causal=causal, dropout=drop)
        return jnp.moveaxis(out, 3, 1)

    masks = Mask(PartitionSpec(rows, length), key_rows, None if start is None else PartitionSpec(rows))
    in_specs = (spec, keys, keys, masks, PartitionSpec())
    # Not checked: the platforms' kernels do not declare how their results vary over a mesh.
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(q, k, v, mask, key)


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
    scores = _all_scores(q, k, mask, causal)
    p = jnp.exp(scores - jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), FLOOR))
    p = p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    if dropout is not None and dropout.rate > 0:
        p = p * blockwise.keep(dropout.key, 0, 0, p.shape, dropout.rate)
    p = p.astype(q.dtype)
    return jnp.moveaxis(einsum("bkgts,bksh->bkgth", p, v).astype(q.dtype), 3, 1), p


@jax.jit  # traced and lowered once for layers that are one by one
def attend_cached(
    q: Float[Array, "B T K G H"],
    cached: tuple[Float[Array, "B K S H"] | QuantizedSide, Float[Array, "B K S H"] | QuantizedSide],
    new: tuple[Float[Array, "B K T H"] | QuantizedSide, Float[Array, "B K T H"] | QuantizedSide],
    segments: Int[Array, "B T"],
    held: Int[Array, "B S"],
    rows: Int[Array, " B"] | None = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention of new tokens to a cache that does not hold them yet, and to themselves; forward only.

    A cache that layers only read is neither sliced nor copied back.

    Args:
      q: queries of the new tokens.
      cached: keys and values of the cache, whose slots may be sharded.
      new: those of the tokens, in the same form.
      segments: of the tokens; 0 is padding.
      held: of the slots; 0 for those that nobody sees.
      rows: the rows of the cache that these are, one of each shard, counted within it; for many queries on a CPU. None
        for all rows, in their order.
    """
    spec = mesh.spec_of(q)
    batch, _, heads, *_ = spec
    slots = mesh.spec("slots")[0]
    split = mesh.shards("slots") > 1
    caches, fresh = PartitionSpec(batch, heads, slots), PartitionSpec(batch, heads)
    # At once, XLA on a CPU would make floats of all integers first, in four times their memory.
    in_blocks = isinstance(cached[0], QuantizedSide) and mesh.platform() == "cpu"
    new = jax.tree.map(lambda x: jax.sharding.reshard(x, fresh), new)
    segments = jax.sharding.reshard(segments, PartitionSpec(batch, None))
    held = jax.sharding.reshard(held, PartitionSpec(batch, slots))
    row_specs = None if rows is None else PartitionSpec(batch)
    rows = None if rows is None else jax.sharding.reshard(rows, PartitionSpec(batch))

    def local(q: Array, cached: tuple, new: tuple, segments: Array, held: Array, rows: Array | None) -> Array:
        q = jnp.moveaxis(q, 1, 3)
        own = segments
        if split:
            # All queries of the group come to the slots; the new tokens count once, where the first slots are.
            q = jax.lax.all_gather(q, slots, axis=2, tiled=True)
            own = jnp.where(jax.lax.axis_index(slots) == 0, segments, 0)
        masks = Mask(segments, held), Mask(own, own)

        def at_once() -> tuple[Array, Array]:
            return _direct(q, (cached, new), masks)

        def blocks() -> tuple[Array, Array]:
            if rows is None:
                before = _kernel().partial(q, cached[0], cached[1], masks[0], causal=False)
            else:
                row = jnp.maximum(rows[0], 0)
                before = blockwise.partial(q, cached[0], cached[1], masks[0], causal=False, row=row)
            return merge(before, _kernel().partial(q, new[0], new[1], masks[1], causal=True))

        if q.shape[-2] > FEW_QUERIES or in_blocks or rows is not None:
            out, log_total = blocks()
        elif mesh.platform() == "cpu" and held.shape[1] >= _LARGE_CACHE:
            seen = (held > 0) & jnp.any(segments > 0, axis=1, keepdims=True)  # rows that are done see nothing
            used = jnp.max(jnp.where(seen, jnp.arange(held.shape[1]) + 1, 0))
            out, log_total = jax.lax.cond(used <= held.shape[1] * 5 // 8, blocks, at_once)
        else:
            out, log_total = at_once()
        if split:
            out = _merge_shards(out, log_total, slots)
        return jnp.moveaxis(out, 3, 1).astype(q.dtype)

    in_specs = (spec, (caches,) * 2, (fresh,) * 2, PartitionSpec(batch, None), PartitionSpec(batch, slots), row_specs)
    run = jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)
    return run(q, cached, new, segments, held, rows)


def merge(*parts: tuple[Float[Array, "*B T H"], Float[Array, "*B T"]]) -> tuple[Array, Array]:
    """Merge attention to disjoint sets of keys, each as (result, logarithm of the sum of exponentials), float32."""
    top = functools.reduce(jnp.maximum, (log_total for _, log_total in parts))
    shares = [jnp.exp(log_total - top) for _, log_total in parts]
    total = sum(shares)
    out = sum(out * (share / total)[..., None] for (out, _), share in zip(parts, shares, strict=True))
    return out, top + jnp.log(total)


def _merge_shards(out: Float[Array, "B K G T H"], log_total: Float[Array, "B K G T"], axis: str) -> Array:
    """`merge` over the devices of a mesh axis; each gets its own groups of the result."""
    share = jnp.exp(log_total - jax.lax.pmax(log_total, axis))
    share = share / jax.lax.psum(share, axis)
    return jax.lax.psum_scatter(out * share[..., None], axis, scatter_dimension=2, tiled=True)


def _direct(q: Array, sides: tuple, masks: tuple[Mask, Mask]) -> tuple[Array, Array]:
    """Attention to a cache and to the new tokens at once, with all scores in memory; as `merge` returns it."""
    (cached, _), (new, _) = sides
    scores = [_all_scores(q, cached, masks[0], causal=False), _all_scores(q, new, masks[1], causal=True)]
    top = jnp.maximum(jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in scores)), FLOOR)
    p = [jnp.exp(x - top) for x in scores]
    total = jnp.maximum(sum(jnp.sum(x, axis=-1, keepdims=True) for x in p), jnp.finfo(jnp.float32).tiny)
    values = (v for _, v in sides)
    out = sum(
        einsum("bkgts,bksh->bkgth", scaled(x / total, v).astype(q.dtype), multiplied(v, q.dtype))
        for x, v in zip(p, values, strict=True)
    )
    return out, (top + jnp.log(total))[..., 0]


def _all_scores(
    q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"] | QuantizedSide, mask: Mask, causal: bool
) -> Float[Array, "B K G T S"]:
    """Scores of all pairs at once, `MASKED` where the query does not see the key."""
    seen = visible(mask, jnp.arange(q.shape[-2]), jnp.arange(mask.kv_segments.shape[1]), causal)[:, None, None]
    # The keys are the matrix and the few queries the vectors: the other way round keys would be transposed first.
    scores = jnp.moveaxis(scores_of("bksh,bkgth->bksgt", multiplied(k, q.dtype), q), 2, -1)
    return jnp.where(seen, scaled(scores, k), MASKED)


def _own_key(key: Array, spec: PartitionSpec) -> Array:
    """Derive a key of its own for each device that holds a shard of an array of this partition."""
    for name in (name for entry in spec for name in mesh.names_of(entry)):
        key = jax.random.fold_in(key, jax.lax.axis_index(name))
    return key


def _kernel() -> Any:
    """The module that has `attention` and `partial` for the devices of the current mesh."""
    platform = mesh.platform()
    if platform == "tpu":
        from glm4v_jax.model.attention import splash

        return splash
    if platform == "gpu":
        from glm4v_jax.model.attention import cudnn

        return cudnn
    return blockwise
