"""The GLM-4 decoder (`Glm4vTextModel`): four norms per layer, grouped-query attention with M-RoPE, and a gated MLP.

A cache is only read inside the loop over layers; a few new tokens are written after it, in all layers at once, so that
a donated cache stays where it is (`kv_cache`).
"""

import dataclasses
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
from glm4v_jax.model.layers import Layers, Remat
from glm4v_jax.model.nn import Embed, GatedMlp, Init, Linear, RMSNorm, gather_tokens

CosSin = tuple[Float[Array, "B T F"], Float[Array, "B T F"]]
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
        self,
        x: Float[Array, "B T D"],
        cos_sin: CosSin,
        segments: Int[Array, "B T"],
        past: Past | None = None,
        dropout_key: Array | None = None,
        keep_weights: bool = False,
    ) -> tuple[Float[Array, "B T D"], NewKeys, Float[Array, "B K G T S"] | None]:
        """Run one layer.

        Args:
          x: the residual stream; its tokens may be sharded over the tensor axis.
          cos_sin: of the tokens' M-RoPE positions.
          segments: of the tokens; 0 is padding.
          past: what this layer's cache holds; it is only read.
          dropout_key: enables attention dropout, for training.
          keep_weights: return the attention weights too: over the S slots with the new tokens in them, or the T tokens.

        Returns:
          The residual stream, the tokens' keys and values, the attention weights.
        """
        length = mesh.spec_of(x)[1]
        q, k, v = self.self_attn.project(gather_tokens(self.input_layernorm(x)), cos_sin)
        new = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        if past is not None:
            new = as_cached(new[0], past.k), as_cached(new[1], past.v)
        dropout = Dropout(dropout_key, self.self_attn.dropout_rate) if dropout_key is not None else None
        weights = None
        if past is not None and (keep_weights or dropout is not None):
            k, v, mask = past.written(new, segments, q.dtype)
            out, weights = attend_with_weights(q, k, v, mask, causal=True, dropout=dropout)
        elif past is not None:
            out = attend_cached(q, (past.k, past.v), new, segments, past.held)
        elif keep_weights:
            out, weights = attend_with_weights(q, k, v, Mask(segments, segments), causal=True, dropout=dropout)
        else:
            out = attend(q, k, v, Mask(segments, segments), causal=True, dropout=dropout)
        x = x + self.post_self_attn_layernorm(self.self_attn.o_proj(out, length))
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x))), new, weights


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

        def past(index: Array | int, sides: Any) -> Past | None:
            if cache is None or held is None:
                return None
            k, v = (cache.k, cache.v) if late else sides
            return Past(layer_of(k, index), layer_of(v, index), held, cache.length)

        def step(layer: DecoderLayer, index: Array | int, carry: tuple) -> tuple[tuple, tuple]:
            x, sides = carry
            key = jax.random.fold_in(dropout_key, index) if dropout_key is not None else None
            y, new, weights = layer(x, cos_sin, segment_ids, past(index, sides), key, record.attentions)
            if sides is not None and cache is not None:
                sides = tuple(write_layer(side, index, one, cache.length) for side, one in zip(sides, new, strict=True))
            captured = Captured(x if record.hidden_states else None, weights)
            return (y, sides), (new if late and cache is not None else None, captured)

        sides: Any = None if cache is None or late else (cache.k, cache.v)
        (x, sides), (new, captured) = self.layers.run(step, (x, sides), remat=remat)
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
