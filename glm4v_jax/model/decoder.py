"""The GLM-4 decoder (`Glm4vTextModel`): four norms per layer, grouped-query attention with M-RoPE, and a gated MLP.

A cache is only read inside the loop over layers; a few new tokens are written after it, in all layers at once, so that
a donated cache stays where it is (`kv_cache`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glm4v_jax.config.model import Glm4vTextConfig
from glm4v_jax.devices import mesh
from glm4v_jax.model import rope
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
from glm4v_jax.model.layers import Layers, Remat, stacked_outputs
from glm4v_jax.model.nn import Embed, GatedMlp, Init, Linear, RMSNorm, gather_tokens

CosSin = tuple[Float[Array, "B T F"], Float[Array, "B T F"]]
Attention = Callable[
    [Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"]], tuple[Float[Array, "B T K G H"], Any]
]
"""Queries and keys (rotated) and values -> what the queries attend to, and whatever the caller wants of the layer."""
NewKeys = tuple[Float[Array, "B K T H"] | QuantizedSide, Float[Array, "B K T H"] | QuantizedSide]
"""Keys (rotated) and values of the tokens of a call, heads first; as the cache has them, if there is one."""


@dataclasses.dataclass(frozen=True)
class Capture:
    """Which intermediates a forward pass returns as well; attention weights take T x S of memory per layer."""

    hidden_states: bool = False
    attentions: bool = False


NOTHING = Capture()


class Captured(NamedTuple):
    """hidden_states: [N, B, T, D], the input of every layer; attentions: [N, B, K, G, T, S]. None if not captured."""

    hidden_states: Float[Array, "N B T D"] | None
    attentions: Float[Array, "N B K G T S"] | None


class Past(NamedTuple):
    """What the cache of a layer holds.

    k, v: [B, K, S, H], floats or integers with their scales.
    held: int32 [B, S], segments of the slots; 0 for those that nobody sees.
    length: int32 [B], the slot of each row's first new token.
    """

    k: Float[Array, "B K S H"] | QuantizedSide
    v: Float[Array, "B K S H"] | QuantizedSide
    held: Int[Array, "B S"]
    length: Int[Array, " B"]

    def written(self, new: NewKeys, segments: Int[Array, "B T"], dtype: DTypeLike) -> tuple[Array, Array, Mask]:
        """Keys and values [B, S, K, H] with the new ones in their slots, slots gathered, and the mask for them."""
        sides = []
        for side, fresh in zip((self.k, self.v), new, strict=True):
            layer = dequantize_side(write_slots(side, fresh, self.length), dtype)
            layer = mesh.reshard(layer, "batch", "kv_heads", None, None)
            sides.append(jnp.moveaxis(layer, 1, 2))
        return sides[0], sides[1], Mask(segments, write_segments(self.held, segments, self.length), self.length)


def attention_to_tokens(
    segments: Int[Array, "B T"], dropout: Dropout | None = None, keep_weights: bool = False
) -> Attention:
    """Attention of a call's tokens to each other; beside the result the weights [B, K, G, T, T], if they are kept."""

    def attention(q: Array, k: Array, v: Array) -> tuple[Array, Array | None]:
        mask = Mask(segments, segments)
        if keep_weights:
            return attend_with_weights(q, k, v, mask, causal=True, dropout=dropout)
        return attend(q, k, v, mask, causal=True, dropout=dropout), None

    return attention


def attention_to_cache(
    past: Past, segments: Int[Array, "B T"], dropout: Dropout | None = None, keep_weights: bool = False
) -> Attention:
    """Attention to a cache, which is only read, and to the tokens of the call.

    Beside the result: the tokens' keys and values as the cache has them, and the weights over the S slots with the new
    tokens in them, [B, K, G, T, S], if they are kept.
    """

    def attention(q: Array, k: Array, v: Array) -> tuple[Array, tuple[NewKeys, Array | None]]:
        new = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        new = as_cached(new[0], past.k), as_cached(new[1], past.v)
        if not keep_weights and dropout is None:
            return attend_cached(q, (past.k, past.v), new, segments, past.held), (new, None)
        k, v, mask = past.written(new, segments, q.dtype)
        out, weights = attend_with_weights(q, k, v, mask, causal=True, dropout=dropout)
        return out, (new, weights)

    return attention


class TextAttention(nnx.Module):
    """Grouped-query attention; q, k, v have biases in most models, the output projection has none (trap T6)."""

    def __init__(self, config: Glm4vTextConfig, init: Init):
        assert config.num_key_value_heads is not None
        self.dropout_rate = config.attention_dropout
        bias = config.structure.attention_bias
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        embed: dict[str | None, int] = {"embed": config.hidden_size}
        kv: dict[str | None, int] = {"kv_heads": kv_heads, "head_dim": head_dim}
        heads: dict[str | None, int] = {
            "kv_heads": kv_heads,
            "q_groups": config.num_key_value_groups,
            "head_dim": head_dim,
        }
        # A head's dimensions in one axis with those of its group, or a TPU would move the kernel to another layout in
        # every call.
        mesh.check_divides((config.num_key_value_groups,), ("q_groups",))
        self.num_groups = config.num_key_value_groups
        groups: dict[str | None, int] = {"kv_heads": kv_heads, "q_groups": self.num_groups * head_dim}
        self.q_proj = Linear(embed, groups, init, bias=bias)
        self.k_proj = Linear(embed, kv, init, bias=bias)
        self.v_proj = Linear(embed, kv, init, bias=bias)
        self.o_proj = Linear(heads, embed, init)

    def project(
        self, x: Float[Array, "B T D"], cos_sin: CosSin
    ) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Project to queries and keys, rotated, and values."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        heads = mesh.spec("batch", "length", "kv_heads", "q_groups", None)
        q = q.reshape(*q.shape[:3], self.num_groups, -1, out_sharding=heads)
        return rope.apply_interleaved(q, *cos_sin), rope.apply_interleaved(k, *cos_sin), v


class DecoderLayer(nnx.Module):
    """`x + norm(attention(norm(x)))`, then `x + norm(mlp(norm(x)))` (`Glm4vTextDecoderLayer`)."""

    def __init__(self, config: Glm4vTextConfig, init: Init):
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, init)

        self.input_layernorm = norm()
        self.self_attn = TextAttention(config, init)
        self.post_self_attn_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, config.hidden_act, init)
        self.post_mlp_layernorm = norm()

    def __call__(
        self, x: Float[Array, "B T D"], cos_sin: CosSin, attention: Attention
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Run one layer.

        Args:
          x: the residual stream; its tokens may be sharded over the tensor axis.
          cos_sin: of the tokens' M-RoPE positions.
          attention: from queries, keys and values to what the queries attend to.

        Returns:
          The residual stream, and what `attention` returned beside its result.
        """
        length = mesh.spec_of(x)[1]
        out, kept = attention(*self.self_attn.project(gather_tokens(self.input_layernorm(x)), cos_sin))
        x = x + self.post_self_attn_layernorm(self.self_attn.o_proj(out, length))
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x))), kept


class TextDecoder(nnx.Module):
    """Token embedding, the stack of layers, and the last norm (`Glm4vTextModel`)."""

    def __init__(self, config: Glm4vTextConfig, init: Init):
        self.config = config
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, init)
        self.layers = Layers.init(lambda init: DecoderLayer(config, init), config.num_hidden_layers, init)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, init)

    def __call__(
        self,
        inputs_embeds: Float[Array, "B T D"],
        position_ids: Int[Array, "3 B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache | None = None,
        *,
        record: Capture = NOTHING,
        dropout_key: Array | None = None,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Captured]:
        """Run the decoder.

        Args:
          inputs_embeds: embedded tokens.
          position_ids: int32, M-RoPE positions.
          segment_ids: int32, 0 on padding; tokens see only their own segment. With a cache: 0 or 1.
          cache: written from slot `cache.length[b]` on; `length` advances by T, padding included.
          record: intermediates to return as well.
          dropout_key: enables attention dropout, for training.
          remat: what the backward pass recomputes of a layer.

        Returns:
          Hidden states after the last norm, the cache as written, and the intermediates. The tokens of hidden states
          may be sharded over the tensor axis; `nn.gather_tokens` gathers them.

        Raises:
          ConfigError: rows do not divide by the mesh, or `remat` is unknown.
        """
        mesh.check_divides(segment_ids.shape[:1], ("batch",))
        position_ids = mesh.reshard(position_ids, None, "batch", "length")
        segment_ids = mesh.reshard(segment_ids, "batch", "length")
        cos_sin = rope.mrope_cos_sin(position_ids, self.config)
        tokens = inputs_embeds.shape[1]
        shared = tokens > FEW_QUERIES and tokens % mesh.shards("tokens") == 0
        x = mesh.reshard(inputs_embeds, "batch", "tokens" if shared else "length", None)
        # A few tokens are written after the last layer, in all layers at once: a loop that only reads a cache leaves it
        # where it is.
        late = segment_ids.shape[1] <= FEW_QUERIES
        held = None if cache is None else jnp.where(_slots(cache) < cache.length[:, None], cache.segments, 0)

        def step(layer: DecoderLayer, index: Array | int, carry: tuple) -> tuple[tuple, tuple]:
            x, sides = carry
            dropout = None
            if dropout_key is not None:
                dropout = Dropout(jax.random.fold_in(dropout_key, index), layer.self_attn.dropout_rate)
            new = None
            if cache is None or held is None:
                y, weights = layer(x, cos_sin, attention_to_tokens(segment_ids, dropout, record.attentions))
            else:
                k, v = (layer_of(side, index) for side in ((cache.k, cache.v) if late else sides))
                past = Past(k, v, held, cache.length)
                attention = attention_to_cache(past, segment_ids, dropout, record.attentions)
                y, (new, weights) = layer(x, cos_sin, attention)
                if not late:
                    sides = tuple(
                        write_layer(side, index, one, cache.length) for side, one in zip(sides, new, strict=True)
                    )
                    new = None
            return (y, sides), (new, Captured(x if record.hidden_states else None, weights))

        sides: Any = None if cache is None or late else (cache.k, cache.v)
        (x, sides), outputs = self.layers.run(step, (x, sides), remat=remat)
        new, captured = stacked_outputs(outputs)
        if cache is not None:
            if late:
                x, new = _in_order(x, new)
                sides = tuple(
                    write_layers(side, one, cache.length) for side, one in zip((cache.k, cache.v), new, strict=True)
                )
            segments = write_segments(cache.segments, segment_ids, cache.length)
            k, v = sides
            cache = KVCache(k, v, segments, cache.length + segment_ids.shape[1])
        return self.norm(x), cache, captured

    def run(
        self, x: Float[Array, "B T D"], cos_sin: CosSin, attention_of_layer: Callable[[Any], Attention]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Run the layers and the last norm with another attention, such as an inference engine's.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from glm4v_jax import Glm4v, Glm4vConfig, use_mesh
        >>> from glm4v_jax.model.rope import mrope_cos_sin
        >>> config = Glm4vConfig.tiny()
        >>> def attention_of_layer(index):
        ...     def attention(q, k, v):
        ...         scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / q.shape[-1] ** 0.5
        ...         weights = jax.nn.softmax(jnp.where(jnp.tri(q.shape[1]), scores, -jnp.inf))
        ...         return jnp.einsum("bkgts,bskh->btkgh", weights, v), (k, v)
        ...     return attention
        >>> with use_mesh():
        ...     decoder = Glm4v.init(config).unstacked().language_model
        ...     x = decoder.embed_tokens(jnp.array([[5, 6, 7]]))
        ...     positions = jnp.broadcast_to(jnp.arange(3), (3, 1, 3))
        ...     cos_sin = mrope_cos_sin(positions, config.text_config)
        ...     hidden, kept = decoder.run(x, cos_sin, attention_of_layer)
        >>> print(hidden.shape, [k.shape for k, v in kept])
        (1, 3, 64) [(1, 3, 2, 16), (1, 3, 2, 16)]

        Nothing else looks from one token to another: several sequences may lie one behind the other in one row,
        [1, T, D], if each token has its position and attention keeps them apart.

        Args:
          x: embedded tokens.
          cos_sin: of their M-RoPE positions (`rope.mrope_cos_sin`).
          attention_of_layer: index of a layer -> its attention, which is not scaled beforehand. The index is traced
            where layers are stacked, an int where they are one by one.

        Returns:
          Hidden states after the last norm, and what the layers' attention returned beside its results: a list where
          layers are one by one, stacked along a new first dimension otherwise.
        """

        def step(layer: DecoderLayer, index: Array | int, x: Array) -> tuple[Array, Any]:
            return layer(x, cos_sin, attention_of_layer(index))

        x, kept = self.layers.run(step, x)
        return self.norm(x), kept


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


def _slots(cache: KVCache) -> Int[Array, "1 S"]:
    return mesh.reshard(jnp.arange(cache.capacity)[None], None, None)
