"""Rows of a batch, taken out of its arrays and put back, on every device those of its shard.

B: rows, n: shards of the batch, each with B / n of its rows; S: cache slots of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from glm4v_jax.devices import mesh
from glm4v_jax.model.kv_cache import KVCache


def take(x: Array, slots: Int[Array, " n"], axis: int) -> Array:
    """Return row `slots[i]` of shard i, for each i: [..., B, ...] -> [..., n, ...]."""

    def local(x: Array, slots: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, jnp.maximum(slots[0], 0), 1, axis)

    # Each device works on its own rows: over slices of a sharded array, XLA would copy the cache.
    spec = mesh.spec_of(x)
    return jax.shard_map(local, in_specs=(spec, mesh.spec("batch")), out_specs=spec, check_vma=False)(
        x, mesh.reshard(slots, "batch")
    )


def put(x: Array, slots: Int[Array, " n"], new: Array, axis: int) -> Array:
    """Replace rows, the inverse of `take`; a slot of -1 changes nothing."""

    def local(x: Array, slots: Array, new: Array) -> Array:
        i = jnp.maximum(slots[0], 0)
        old = jax.lax.dynamic_slice_in_dim(x, i, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(slots[0] < 0, old, new), i, axis)

    spec = mesh.spec_of(x)
    return jax.shard_map(local, in_specs=(spec, mesh.spec("batch"), spec), out_specs=spec, check_vma=False)(
        x, mesh.reshard(slots, "batch"), jax.sharding.reshard(new, spec)
    )


def map_cache(function: Any, cache: KVCache, *others: KVCache) -> KVCache:
    """Map (arrays, axis of the rows) -> array over caches."""
    axis = _row_axis(cache)
    sides = [
        jax.tree.map(lambda *xs: function(*xs, axis), cache.k, *(other.k for other in others)),
        jax.tree.map(lambda *xs: function(*xs, axis), cache.v, *(other.v for other in others)),
    ]
    rest = [function(*xs, 0) for xs in zip(cache[2:], *(other[2:] for other in others), strict=True)]
    return KVCache(*sides, *rest)


def take_rows(cache: KVCache, slots: Int[Array, " n"]) -> KVCache:
    """Return a cache of one row of each shard, see `take`."""
    return map_cache(lambda x, axis: take(x, slots, axis), cache)


def put_rows(cache: KVCache, slots: Int[Array, " n"], new: KVCache) -> KVCache:
    """Replace one row of each shard, see `put`."""
    return map_cache(lambda x, y, axis: put(x, slots, y, axis), cache, new)


def can_stay(cache: KVCache) -> bool:
    """Whether the decoder can read and write rows of a cache where they are."""
    return mesh.platform() == "cpu" and not cache.is_stacked and mesh.shards("slots") == 1


def put_chunk(
    cache: KVCache,
    slots: Int[Array, " n"],
    new: KVCache,
    keep: Int[Array, " n"],
    tokens: int,
    *,
    in_place: bool = False,
) -> KVCache:
    """Replace rows of which only the `tokens` slots from `keep[i]` on are new: a row may have thousands.

    `in_place`: keys and values of `new` are those of all rows, written already.
    """
    axis = _row_axis(cache)

    def put_slots(x: Array, new: Array) -> Array:
        spec = mesh.spec_of(x)
        names = spec[axis + 2]

        def local(x: Array, slots: Array, new: Array, keep: Array) -> Array:
            length = x.shape[axis + 2]
            count = min(length, tokens)
            first = keep[0] if names is None else keep[0] - jax.lax.axis_index(names) * length
            begin, sizes = [0] * x.ndim, list(x.shape)
            begin[axis + 2], sizes[axis], sizes[axis + 2] = jnp.clip(first, 0, length - count), 1, count
            part = jax.lax.dynamic_slice(new, begin, sizes)
            begin[axis] = jnp.maximum(slots[0], 0)
            old = jax.lax.dynamic_slice(x, begin, sizes)
            return jax.lax.dynamic_update_slice(x, jnp.where(slots[0] < 0, old, part), begin)

        batch = mesh.spec("batch")
        run = jax.shard_map(local, in_specs=(spec, batch, spec, batch), out_specs=spec, check_vma=False)
        return run(x, mesh.reshard(slots, "batch"), jax.sharding.reshard(new, spec), keep)

    k, v = new.k, new.v
    if not in_place:
        k, v = (jax.tree.map(put_slots, *sides) for sides in ((cache.k, new.k), (cache.v, new.v)))
    return KVCache(k, v, put(cache.segments, slots, new.segments, 0), put(cache.length, slots, new.length, 0))


def _row_axis(cache: KVCache) -> int:
    """Of keys and values."""
    return 1 if cache.is_stacked else 0
