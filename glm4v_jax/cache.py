"""The key/value cache: a pytree of static shape, written in place when it is donated."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glm4v_jax import mesh
from glm4v_jax.config import Glm4vTextConfig


class KVCache(NamedTuple):
    """Keys and values of B prompts in S slots each.

    k, v: either one array [N, B, K, S, H] for all N layers (a scanned stack carries it) or a tuple of N arrays
    [B, K, S, H] (per-layer stacks; a stacked buffer would be sliced and copied at every step). Heads come before slots,
    so that a head's keys are one matrix as they lie in memory: the other way round a decoding step copies them first.
    segments: int32 [B, S], 0 for a slot that holds nothing or padding.
    length: int32 [B], the slot that each row writes next.
    """

    k: Float[Array, "N B K S H"] | tuple[Float[Array, "B K S H"], ...]
    v: Float[Array, "N B K S H"] | tuple[Float[Array, "B K S H"], ...]
    segments: Int[Array, "B S"]
    length: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """S, the number of slots a row has."""
        return self.segments.shape[1]

    @property
    def is_stacked(self) -> bool:
        """Whether all layers share one array."""
        return not isinstance(self.k, tuple)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames="stacked")
def init_cache(
    config: Glm4vTextConfig, batch: int, capacity: int, dtype: DTypeLike, *, stacked: bool = True
) -> KVCache:
    """An empty cache of `capacity` slots a row."""
    assert config.num_key_value_heads is not None
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    axes = ("batch", "kv_heads", None, None)
    n = config.num_hidden_layers

    def zeros() -> Array | tuple[Array, ...]:
        if stacked:
            return jnp.zeros((n, *shape), dtype, out_sharding=mesh.spec("layers", *axes))
        return tuple(jnp.zeros(shape, dtype, out_sharding=mesh.spec(*axes)) for _ in range(n))

    return KVCache(
        zeros(),
        zeros(),
        jnp.zeros((batch, capacity), jnp.int32, out_sharding=mesh.spec("batch", None)),
        jnp.zeros((batch,), jnp.int32, out_sharding=mesh.spec("batch")),
    )


def write_slots(buffer: Array, new: Array, start: Int[Array, " B"], axis: int = 1) -> Array:
    """Write T slots of each row from `start[b]` on: [B, ..., T, ...] into [B, ..., S, ...] along `axis`.

    The caller sees to it that they fit: XLA would move a slice that reaches beyond the last slot to the left.
    """
    new = new.astype(buffer.dtype)
    if len(buffer) == 1:
        # Not as a batch of one: that becomes a scatter, which XLA's CPU backend does on copies of the buffer.
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, start[0], axis)

    def write_row(buffer: Array, new: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, axis - 1)

    return jax.vmap(write_row)(buffer, new, start)


def grow(cache: KVCache, capacity: int) -> KVCache:
    """The same content in a cache of more slots."""
    extra = capacity - cache.capacity

    def pad(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])

    if cache.is_stacked:
        k, v = pad(cache.k, 3), pad(cache.v, 3)
    else:
        k, v = (tuple(pad(x, 2) for x in side) for side in (cache.k, cache.v))
    return KVCache(k, v, pad(cache.segments, 1), cache.length)


def write_layers(
    cache: KVCache, new: tuple[Float[Array, "N B K T H"], Float[Array, "N B K T H"]], segments: Int[Array, "B S"]
) -> KVCache:
    """Write T slots of each row in all layers at once, from `cache.length[b]` on; `segments` are those after it."""
    length = cache.length + new[0].shape[-2]
    if isinstance(cache.k, tuple):
        k, v = (
            tuple(write_slots(layer, side[i], cache.length, axis=2) for i, layer in enumerate(old))
            for old, side in zip((cache.k, cache.v), new, strict=True)
        )
        return KVCache(k, v, segments, length)

    def write_rows(buffer: Array, new: Array, start: Array) -> Array:
        def write_row(b: Array, buffer: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(new, b, 1, axis=1)
            return jax.lax.dynamic_update_slice(buffer, row, (0, b, 0, start[b], 0))

        return jax.lax.fori_loop(0, buffer.shape[1], write_row, buffer)

    # Each device its own rows, one after the other: a vmap over them makes XLA move the whole cache to another layout.
    spec = mesh.spec("layers", "batch", "kv_heads", None, None)
    write = jax.shard_map(write_rows, in_specs=(spec, spec, mesh.spec("batch")), out_specs=spec)
    k, v = (
        write(old, jax.sharding.reshard(side.astype(cache.k.dtype), spec), cache.length)
        for old, side in zip((cache.k, cache.v), new, strict=True)
    )
    return KVCache(k, v, segments, length)


def place(layer_k: Array, index: Array | int, cache_side: Array | tuple[Array, ...]) -> Array | tuple[Array, ...]:
    """Put one layer's [B, K, S, H] back into one side of the cache."""
    if isinstance(cache_side, tuple):
        return (*cache_side[:index], layer_k, *cache_side[index + 1 :])
    return jax.lax.dynamic_update_index_in_dim(cache_side, layer_k, index, 0)
