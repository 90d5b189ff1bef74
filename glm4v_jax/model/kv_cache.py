"""The key and value cache: a pytree of static shape, written in place when it is donated."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glm4v_jax.config.model import Glm4vTextConfig
from glm4v_jax.devices import mesh
from glm4v_jax.errors import GenerationError, counted


class KVCache(NamedTuple):
    """Keys and values of B rows of S slots each.

    k, v: either one array [N, B, K, S, H] for all N layers (a scanned stack carries it) or a tuple of N arrays
    [B, K, S, H] (per-layer stacks; a stacked buffer would be sliced and copied at every step). Heads come before slots,
    so that a head's keys are one matrix as they lie in memory: the other way round a decode step copies them first.
    Slots may be sharded, see `mesh`.
    segments: int32 [B, S], 0 for a slot that holds nothing or padding; replicated over the devices of a row.
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
    """Make an empty cache of `capacity` slots per row.

    Raises:
      GenerationError: the slots do not divide by the mesh.
      ConfigError: the rows do not.
    """
    assert config.num_key_value_heads is not None
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    _check_slots(capacity)
    mesh.check_divides((batch,), ("batch",))
    axes = ("batch", "kv_heads", "slots", None)
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


def _check_slots(capacity: int) -> None:
    if capacity % (shards := mesh.shards("slots")):
        raise GenerationError(
            f"capacity: found {counted(capacity, 'slot')}; expected a multiple of mesh axis seq, {shards}"
        )


def write_segments(segments: Int[Array, "B S"], new: Int[Array, "B T"], start: Int[Array, " B"]) -> Int[Array, "B S"]:
    """Write the segments of T slots of each row, from `start[b]` on; the caller sees to it that they fit."""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))(segments, new, start)


Side = Float[Array, "N B K S H"] | tuple[Float[Array, "B K S H"], ...]


def write_layer(side: Side, index: Array | int, new: Float[Array, "B K T H"], start: Int[Array, " B"]) -> Side:
    """Write T slots of each row of one layer's keys (or values), from `start[b]` on."""
    if isinstance(side, tuple):
        assert isinstance(index, int)
        return (*side[:index], _write(side[index][None], new[None], 0, start)[0], *side[index + 1 :])
    return _write(side, new[None], index, start)


def write_layers(side: Side, new: Float[Array, "N B K T H"], start: Int[Array, " B"]) -> Side:
    """Write T slots of each row in all layers at once."""
    if isinstance(side, tuple):
        return tuple(_write(layer[None], new[i : i + 1], 0, start)[0] for i, layer in enumerate(side))
    return _write(side, new, 0, start)


def _write(
    buffer: Float[Array, "N B K S H"], new: Float[Array, "n B K T H"], layer: Array | int, start: Int[Array, " B"]
) -> Float[Array, "N B K S H"]:
    """Write n layers from `layer` on, T slots of each row from `start[b]` on; the caller sees to it that they fit."""
    split = mesh.shards("slots") > 1
    slots = mesh.spec("slots")[0]

    def local(buffer: Array, new: Array, layer: Array | int, start: Array) -> Array:
        if split:
            start = start - jax.lax.axis_index(slots) * buffer.shape[3]

        def write_row(b: Array, buffer: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(new, b, 1, axis=1)
            if split:
                return _write_overlap(buffer, row, (layer, b, 0, start[b], 0))
            return jax.lax.dynamic_update_slice(buffer, row, (layer, b, 0, start[b], 0))

        rows, tokens = buffer.shape[1], new.shape[3]
        # Unrolled for prompts, because XLA's TPU compiler mistakes one operand of such a loop for another (8 rows of
        # 2,048, 2 of 96); not for single tokens, because it would copy the cache.
        return jax.lax.fori_loop(0, rows, write_row, buffer, unroll=tokens > 1)

    # Each device its own rows, one after the other: a vmap over them makes a TPU move the whole cache to another
    # layout, and a CPU copy it.
    old = mesh.spec("layers", "batch", "kv_heads", "slots", None)
    fresh = mesh.spec("layers", "batch", "kv_heads", None, None)
    run = jax.shard_map(local, in_specs=(old, fresh, mesh.spec(), mesh.spec("batch")), out_specs=old, check_vma=False)
    new = jax.sharding.reshard(new.astype(buffer.dtype), fresh)
    return run(buffer, new, jnp.asarray(layer, jnp.int32), mesh.reshard(start, "batch"))


def _write_overlap(buffer: Array, new: Array, at: tuple[Array | int, ...]) -> Array:
    """Write the part of `new` that falls into a shard's S slots; at[3], the first, may be before or after them."""
    s, t = buffer.shape[3], new.shape[3]
    window = min(s, t)
    first = jnp.clip(at[3], 0, s - window)
    shift = jnp.clip(first - at[3], -window, t)
    padded = jnp.pad(new, [(window if axis == 3 else 0,) * 2 for axis in range(new.ndim)])
    part = jax.lax.dynamic_slice_in_dim(padded, shift + window, window, axis=3)
    place = (*at[:3], first, *at[4:])
    old = jax.lax.dynamic_slice(buffer, place, part.shape)
    index = shift + jnp.arange(window)
    inside = ((index >= 0) & (index < t))[:, None]
    return jax.lax.dynamic_update_slice(buffer, jnp.where(inside, part, old), place)


def grow(cache: KVCache, capacity: int) -> KVCache:
    """Copy a cache to one of more slots.

    Raises:
      GenerationError: they do not divide by the mesh.
    """
    _check_slots(capacity)
    extra = capacity - cache.capacity

    def pad(x: Array, axis: int) -> Array:
        widths = [(0, extra if i == axis else 0) for i in range(x.ndim)]
        # Sharded slots move to other devices, which XLA does.
        return jax.sharding.auto_axes(lambda x: jnp.pad(x, widths), out_sharding=jax.typeof(x).sharding)(x)

    if cache.is_stacked:
        k, v = pad(cache.k, 3), pad(cache.v, 3)
    else:
        k, v = (tuple(pad(x, 2) for x in side) for side in (cache.k, cache.v))
    return KVCache(k, v, pad(cache.segments, 1), cache.length)
