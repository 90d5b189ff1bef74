"""The key and value cache: a pytree of static shape, written in place when it is donated.

Keys and values are floats, or 8-bit integers with a float32 scale for each slot and head (`QuantizedSide`): with heads
of 128 a half of bfloat16's memory and a quarter of float32's. A layer rounds its keys and values before anybody attends
to them (`as_cached`), so that a token sees the same keys whichever tokens were computed together with it: prefill
chunks, drafts and kept caches change nothing. Attention multiplies the integers and applies the scales to scores and
probabilities.
"""

import dataclasses
import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int8, Num

from glm4v_jax.config.model import Glm4vTextConfig
from glm4v_jax.devices import mesh
from glm4v_jax.errors import GenerationError, counted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedSide:
    """Keys or values as integers: element (s, h) of a head is `integers[s, h] * scale[s]`."""

    integers: Int8[Array, "*B S H"]
    scale: Float32[Array, "*B S"]


def quantize_side(x: Float[Array, "*B S H"]) -> QuantizedSide:
    """Round to the nearest of 255 multiples of a scale per slot and head: off by half of the scale at most.

    What is not finite stays so: its slot's scale is not finite either.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    # XLA's maximum on a CPU ignores NaN.
    largest = jnp.where(jnp.all(jnp.isfinite(x), axis=-1), largest, jnp.nan)
    scale = largest / 127
    return QuantizedSide(jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8), scale)


def as_cached(x: Float[Array, "*B S H"], side: Array | QuantizedSide) -> Array | QuantizedSide:
    """New keys or values in the form that a side of the cache has."""
    return quantize_side(x) if isinstance(side, QuantizedSide) else x


def dequantize_side(side: Array | QuantizedSide, dtype: DTypeLike) -> Float[Array, "*B S H"]:
    """Keys or values as floats; of few slots only, or they take the memory that integers save."""
    if not isinstance(side, QuantizedSide):
        return side
    return (side.integers.astype(jnp.float32) * side.scale[..., None]).astype(dtype)


Side: TypeAlias = Array | QuantizedSide | tuple[jax.Array | QuantizedSide, ...]
"""Keys or values of all layers, see `KVCache`."""


class KVCache(NamedTuple):
    """Keys and values of B rows of S slots each.

    k, v: either one array [N, B, K, S, H] for all N layers (a scanned stack carries it) or a tuple of N arrays
    [B, K, S, H] (per-layer stacks; a stacked buffer would be sliced and copied at every step); or `QuantizedSide` in
    the place of each array. Heads come before slots, so that a head's keys are one matrix as they lie in memory: the
    other way round a decode step copies them first. Slots may be sharded, see `mesh`.
    segments: int32 [B, S], 0 for a slot that holds nothing or padding; replicated over the devices of a row.
    length: int32 [B], the slot that each row writes next.
    """

    k: Side
    v: Side
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
    """Make an empty cache of `capacity` slots per row; int8 stands for `QuantizedSide`.

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

    def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array | QuantizedSide:
        if jnp.dtype(dtype) != jnp.int8:
            return jnp.zeros(shape, dtype, out_sharding=mesh.spec(*axes))
        return QuantizedSide(
            jnp.zeros(shape, jnp.int8, out_sharding=mesh.spec(*axes)),
            jnp.zeros(shape[:-1], jnp.float32, out_sharding=mesh.spec(*axes[:-1])),
        )

    def side() -> Side:
        return zeros((n, *shape), ("layers", *axes)) if stacked else tuple(zeros(shape, axes) for _ in range(n))

    return KVCache(
        side(),
        side(),
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


def layer_of(side: Side, index: Array | int) -> Array | QuantizedSide:
    """Keys or values of one layer."""
    return side[index] if isinstance(side, tuple) else jax.tree.map(lambda x: x[index], side)


def write_slots(
    layer: Array | QuantizedSide,
    new: Array | QuantizedSide,
    start: Int[Array, " B"],
    rows: Int[Array, " B"] | None = None,
) -> Array | QuantizedSide:
    """Write T slots of each row of keys (or values) [B, K, S, H] of a layer, from `start[b]` on; see `write_layers`."""
    return jax.tree.map(lambda x, new: _write(x[None], new[None], 0, start, rows)[0], layer, new)


def write_layer(side: Side, index: Array | int, new: Array | QuantizedSide, start: Int[Array, " B"]) -> Side:
    """Write T slots of each row of one layer's keys (or values) [B, K, T, H], from `start[b]` on."""
    if isinstance(side, tuple):
        assert isinstance(index, int)
        return (*side[:index], write_slots(side[index], new, start), *side[index + 1 :])
    return jax.tree.map(lambda x, new: _write(x, new[None], index, start), side, new)


def write_layers(
    side: Side, new: Array | QuantizedSide, start: Int[Array, " B"], rows: Int[Array, " B"] | None = None
) -> Side:
    """Write T slots of each row in all layers at once: keys (or values) [N, B, K, T, H].

    With `rows` the B rows are some of the cache: one of each shard, counted within it, or -1 for none.
    """
    if isinstance(side, tuple):
        return tuple(write_slots(layer, layer_of(new, i), start, rows) for i, layer in enumerate(side))
    return jax.tree.map(lambda x, new: _write(x, new, 0, start, rows), side, new)


def _write(
    buffer: Num[Array, "N B K S *H"],
    new: Num[Array, "n b K T *H"],
    layer: Array | int,
    start: Int[Array, " b"],
    rows: Int[Array, " b"] | None = None,
) -> Num[Array, "N B K S *H"]:
    """Write n layers from `layer` on, T slots of each row from `start[b]` on; the caller sees to it that they fit."""
    inner = (0,) * (buffer.ndim - 4)
    split = mesh.shards("slots") > 1
    slots = mesh.spec("slots")[0]

    assert rows is None or not split

    def local(buffer: Array, new: Array, layer: Array | int, start: Array, own: Array | None) -> Array:
        if split:
            start = start - jax.lax.axis_index(slots) * buffer.shape[3]

        def write_row(b: Array, buffer: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(new, b, 1, axis=1)
            if own is not None:
                place = (layer, jnp.maximum(own[b], 0), 0, start[b], *inner)
                row = jnp.where(own[b] < 0, jax.lax.dynamic_slice(buffer, place, row.shape), row)
                return jax.lax.dynamic_update_slice(buffer, row, place)
            if split:
                return _write_overlap(buffer, row, (layer, b, 0, start[b], *inner))
            return jax.lax.dynamic_update_slice(buffer, row, (layer, b, 0, start[b], *inner))

        tokens = new.shape[3]
        # Unrolled for prompts, because XLA's TPU compiler mistakes one operand of such a loop for another (8 rows of
        # 2,048, 2 of 96); not for single tokens, because it would copy the cache.
        return jax.lax.fori_loop(0, new.shape[1], write_row, buffer, unroll=tokens > 1)

    # Each device its own rows, one after the other: a vmap over them makes a TPU move the whole cache to another
    # layout, and a CPU copy it.
    old = mesh.spec("layers", "batch", "kv_heads", "slots", *(None for _ in inner))
    fresh = mesh.spec("layers", "batch", "kv_heads", None, *(None for _ in inner))
    batch = mesh.spec("batch")
    in_specs = (old, fresh, mesh.spec(), batch, None if rows is None else batch)
    run = jax.shard_map(local, in_specs=in_specs, out_specs=old, check_vma=False)
    new = jax.sharding.reshard(new.astype(buffer.dtype), fresh)
    rows = None if rows is None else mesh.reshard(rows, "batch")
    return run(buffer, new, jnp.asarray(layer, jnp.int32), mesh.reshard(start, "batch"), rows)


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
    inside = ((index >= 0) & (index < t)).reshape(-1, *(1,) * (new.ndim - 4))
    return jax.lax.dynamic_update_slice(buffer, jnp.where(inside, part, old), place)


def grow(cache: KVCache, capacity: int) -> KVCache:
    """Copy a cache to one of more slots; GenerationError if they do not divide by the mesh."""
    _check_slots(capacity)
    extra = capacity - cache.capacity

    def pad(x: Array, axis: int) -> Array:
        widths = [(0, extra if i == axis else 0) for i in range(x.ndim)]
        # Sharded slots move to other devices, which XLA does.
        return jax.sharding.auto_axes(lambda x: jnp.pad(x, widths), out_sharding=jax.typeof(x).sharding)(x)

    axis = 3 if cache.is_stacked else 2
    k, v = (jax.tree.map(lambda x: pad(x, axis), side) for side in (cache.k, cache.v))
    return KVCache(k, v, pad(cache.segments, 1), cache.length)
