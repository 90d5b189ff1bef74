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

    k, v: either one array [N, B, S, K, H] for all N layers (a scanned stack carries it) or a tuple of N arrays
    [B, S, K, H] (per-layer stacks; a stacked buffer would be sliced and copied at every step).
    segments: int32 [B, S], 0 for a slot that holds nothing or padding.
    length: int32 [B], the slot that each row writes next.
    """

    k: Float[Array, "N B S K H"] | tuple[Float[Array, "B S K H"], ...]
    v: Float[Array, "N B S K H"] | tuple[Float[Array, "B S K H"], ...]
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
    shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
    axes = ("batch", None, "kv_heads", None)
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


def write_slots(buffer: Float[Array, "B S ..."], new: Float[Array, "B T ..."], start: Int[Array, " B"]) -> Array:
    """Write T slots of each row from `start[b]` on.

    The caller sees to it that they fit: XLA would move a slice that reaches beyond the last slot to the left.
    """

    def write_row(buffer: Array, new: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, axis=0)

    return jax.vmap(write_row)(buffer, new.astype(buffer.dtype), start)


def grow(cache: KVCache, capacity: int) -> KVCache:
    """The same content in a cache of more slots."""
    extra = capacity - cache.capacity

    def pad(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])

    if cache.is_stacked:
        k, v = pad(cache.k, 2), pad(cache.v, 2)
    else:
        k, v = (tuple(pad(x, 1) for x in side) for side in (cache.k, cache.v))
    return KVCache(k, v, pad(cache.segments, 1), cache.length)


def place(layer_k: Array, index: Array | int, cache_side: Array | tuple[Array, ...]) -> Array | tuple[Array, ...]:
    """Put one layer's [B, S, K, H] back into one side of the cache."""
    if isinstance(cache_side, tuple):
        return (*cache_side[:index], layer_k, *cache_side[index + 1 :])
    return jax.lax.dynamic_update_index_in_dim(cache_side, layer_k, index, 0)
