"""What the decoder's layers attend to in a call: its tokens alone, or a cache as well.

A cache is only read inside the loop over layers; a few new tokens are written after it, in all layers at once, so that
a donated cache stays where it is (`kv_cache`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glm4v_jax.devices import mesh
from glm4v_jax.model.attention.attend import FEW_QUERIES, Dropout, Mask, attend, attend_cached, attend_with_weights
from glm4v_jax.model.kv_cache import (
    KVCache,
    QuantizedSide,
    as_cached,
    dequantize_side,
    layer_of,
    write_layer,
    write_layers,
    write_segments,
    write_slots,
)

Attention = Callable[
    [Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"]], tuple[Float[Array, "B T K G H"], Any]
]
"""Queries and keys, rotated, and values of a layer -> attention's result, and what the caller keeps of the layer.

Scores are to be scaled by 1 / sqrt(H)."""

Kept = tuple[Any, Array | None]
"""What is kept here: the tokens' keys and values as a cache has them, [B, K, T, H], and attention weights if wanted."""


def attention_to_tokens(
    segments: Int[Array, "B T"], dropout: Dropout | None = None, keep_weights: bool = False
) -> Attention:
    """Attention of tokens to each other. Keeps no keys and values; weights are [B, K, G, T, T]."""

    def attention(q: Array, k: Array, v: Array) -> tuple[Array, Kept]:
        mask = Mask(segments, segments)
        if not keep_weights:
            return attend(q, k, v, mask, causal=True, dropout=dropout), (None, None)
        out, weights = attend_with_weights(q, k, v, mask, causal=True, dropout=dropout)
        return out, (None, weights)

    return attention


class CachedCall(NamedTuple):
    """A call with a cache: tokens attend to it and to each other, and are then written.

    segments: int32 [B, T], of the tokens; 0 is padding.
    held: int32 [B, S], segments of the slots; 0 for those that nobody sees.
    rows: int32 [B], the rows of the cache's keys and values that these are, one of each shard; -1 for none. None for
      all.
    """

    cache: KVCache
    segments: Int[Array, "B T"]
    held: Int[Array, "B S"]
    rows: Int[Array, " B"] | None = None

    @classmethod
    def of(cls, cache: KVCache, segments: Int[Array, "B T"], rows: Int[Array, " B"] | None = None) -> Self:
        """A call with tokens of these segments."""
        slots = mesh.reshard(jnp.arange(cache.capacity)[None], None, None)
        return cls(cache, segments, jnp.where(slots < cache.length[:, None], cache.segments, 0), rows)

    @property
    def carried(self) -> tuple | None:
        """Keys and values that go from layer to layer, each of which writes its own; None for a few tokens, or rows."""
        return None if self.segments.shape[1] <= FEW_QUERIES or self.rows is not None else (self.cache.k, self.cache.v)

    def attention(
        self, index: Array | int, carried: tuple | None, dropout: Dropout | None, keep_weights: bool
    ) -> Attention:
        """Attention of a layer. Keeps keys and values; weights are over the S slots, new tokens in theirs."""
        k, v = carried if carried is not None else (self.cache.k, self.cache.v)
        cached = layer_of(k, index), layer_of(v, index)

        def attention(q: Array, k: Array, v: Array) -> tuple[Array, Kept]:
            heads_first = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
            new = as_cached(heads_first[0], cached[0]), as_cached(heads_first[1], cached[1])
            if not keep_weights and dropout is None:
                return attend_cached(q, cached, new, self.segments, self.held, self.rows), (new, None)
            assert self.rows is None, "weights are over the slots of all rows"
            k, v = (self._all_slots(*sides, q.dtype) for sides in zip(cached, new, strict=True))
            length = self.cache.length
            mask = Mask(self.segments, write_segments(self.held, self.segments, length), length)
            out, weights = attend_with_weights(q, k, v, mask, causal=True, dropout=dropout)
            return out, (new, weights)

        return attention

    def _all_slots(self, cached: Array | QuantizedSide, new: Array | QuantizedSide, dtype: Any) -> Array:
        """Keys or values of a layer [B, S, K, H] with the new ones in their slots, slots gathered."""
        layer = dequantize_side(write_slots(cached, new, self.cache.length), dtype)
        return jnp.moveaxis(mesh.reshard(layer, "batch", "kv_heads", None, None), 1, 2)

    def after_layer(self, index: Array | int, carried: tuple | None, new: tuple) -> tuple[tuple | None, tuple | None]:
        """Write the keys and values of a layer to those that are carried, or else keep them for `written`."""
        if carried is None:
            return None, new
        start = self.cache.length
        return tuple(write_layer(side, index, one, start) for side, one in zip(carried, new, strict=True)), None

    def written(
        self, x: Float[Array, "B T D"], carried: tuple | None, new: tuple | None
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """What the last layer gave, and the cache with the tokens, from what was carried or kept of all layers."""
        cache, start = self.cache, self.cache.length
        if carried is None:
            x, new = _in_order(x, new)
            carried = tuple(
                write_layers(side, one, start, self.rows) for side, one in zip((cache.k, cache.v), new, strict=True)
            )
        segments = write_segments(cache.segments, self.segments, start)
        k, v = carried
        return x, KVCache(k, v, segments, start + self.segments.shape[1])


def _in_order(x: Float[Array, "B T D"], new: Any) -> tuple[Array, Any]:
    """Have `new` depend on `x`, or XLA keeps the cache as it was for the layer that reads it last.

    A barrier says so everywhere but on CPUs, where XLA drops it before it decides what to copy. There the values go
    through one array with a number that comes from `x`.
    """
    if mesh.platform() != "cpu":
        return jax.lax.optimization_barrier((x, new))
    number = jnp.sum(x)

    def with_number(values: Array) -> Array:
        tail = values[:, :, :, :1] * 0 + number.astype(values.dtype)
        return jnp.concatenate([values, tail], axis=3)

    x, longer = jax.lax.optimization_barrier((x, jax.tree.map(with_number, new)))
    return x, jax.tree.map(lambda values, longer: longer[:, :, :, : values.shape[3]], new, longer)
