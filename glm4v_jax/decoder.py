"""The GLM-4 decoder: four norms a layer, grouped-query attention with M-RoPE, and a gated MLP."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from glm4v_jax import mesh, rope
from glm4v_jax.attention import FEW_QUERIES, Dropout, Mask, attend, attend_cached, attend_with_weights
from glm4v_jax.cache import KVCache, place, write_layers, write_slots
from glm4v_jax.config import Glm4vTextConfig
from glm4v_jax.layers import Layers
from glm4v_jax.nn import Embed, GatedMlp, Init, Linear, RMSNorm

CosSin = tuple[Float[Array, "B T F"], Float[Array, "B T F"]]


@dataclasses.dataclass(frozen=True)
class Record:
    """What a forward pass is to keep besides its result; weights make it S x S in memory."""

    hidden_states: bool = False
    attentions: bool = False


NOTHING = Record()


class Recorded(NamedTuple):
    """hidden_states: [N, B, T, D], the input of every layer; attentions: [N, B, K, G, T, S]. None if not asked for."""

    hidden_states: Float[Array, "N B T D"] | None
    attentions: Float[Array, "N B K G T S"] | None


class TextAttention(nnx.Module):
    """Grouped-query attention; q, k, v have biases, the output projection has none (trap T6)."""

    def __init__(self, config: Glm4vTextConfig, init: Init):
        assert config.num_key_value_heads is not None
        self.dropout_rate = config.attention_dropout
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        embed: dict[str | None, int] = {"embed": config.hidden_size}
        kv: dict[str | None, int] = {"kv_heads": kv_heads, "head_dim": head_dim}
        heads: dict[str | None, int] = {
            "kv_heads": kv_heads,
            "q_groups": config.num_key_value_groups,
            "head_dim": head_dim,
        }
        # A head's numbers beside those of its group, or a TPU would move the kernel to another layout in every call.
        mesh.check_divides((config.num_key_value_groups,), ("q_groups",))
        self.num_groups = config.num_key_value_groups
        groups: dict[str | None, int] = {"kv_heads": kv_heads, "q_groups": self.num_groups * head_dim}
        self.q_proj = Linear(embed, groups, init, bias=True)
        self.k_proj = Linear(embed, kv, init, bias=True)
        self.v_proj = Linear(embed, kv, init, bias=True)
        self.o_proj = Linear(heads, embed, init)

    def project(
        self, x: Float[Array, "B T D"], cos_sin: CosSin
    ) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries and keys, rotated, and values."""
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
        mask: Mask,
        kv: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]] | None = None,
        dropout_key: Array | None = None,
        keep_weights: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None, Float[Array, "B K G T S"] | None]:
        """One layer.

        Args:
          x: the residual stream.
          cos_sin: of the tokens' M-RoPE positions.
          mask: who sees whom; its keys are the cache's slots, or the T tokens where there is no cache.
          kv: this layer's cache, written from slot `mask.q_start` on.
          dropout_key: turns attention dropout on, for training.
          keep_weights: return the attention weights.

        Returns:
          The residual stream, the cache as written, the attention weights.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos_sin)
        if kv is not None:
            new_k, new_v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
            kv = write_slots(kv[0], new_k, mask.q_start, axis=2), write_slots(kv[1], new_v, mask.q_start, axis=2)
            k, v = (jnp.moveaxis(side, 1, 2) for side in kv)
        dropout = Dropout(dropout_key, self.self_attn.dropout_rate) if dropout_key is not None else None
        weights = None
        if keep_weights:
            out, weights = attend_with_weights(q, k, v, mask, causal=True, dropout=dropout)
        else:
            out = attend(q, k, v, mask, causal=True, dropout=dropout)
        return self._rest(x, out), kv, weights

    def look(
        self,
        x: Float[Array, "B T D"],
        cos_sin: CosSin,
        mask: Mask,
        cached: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]]:
        """The layer for a few tokens that are not in the cache yet, which is only read.

        Returns:
          The residual stream, and the keys and values to write.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos_sin)
        new = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        return self._rest(x, attend_cached(q, cached, new, mask)), new

    def _rest(self, x: Float[Array, "B T D"], out: Float[Array, "B T K G H"]) -> Float[Array, "B T D"]:
        """What comes after attention."""
        x = x + self.post_self_attn_layernorm(self.self_attn.o_proj(out))
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))


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
        record: Record = NOTHING,
        dropout_key: Array | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Recorded]:
        """Run the decoder.

        Args:
          inputs_embeds: embedded tokens.
          position_ids: M-RoPE positions.
          segment_ids: 0 on padding; tokens see only their own segment. With a cache: 0 or 1.
          cache: written from slot `cache.length[b]` on; `length` advances by T, padding included.
          record: what to keep besides.
          dropout_key: turns attention dropout on, for training.
          remat: keep only the layers' inputs for the backward pass.

        Returns:
          Hidden states after the last norm, the cache as written, and what was recorded.
        """
        position_ids = mesh.reshard(position_ids, None, "batch", "length")
        segment_ids = mesh.reshard(segment_ids, "batch", "length")
        cos_sin = rope.mrope_cos_sin(position_ids, self.config)
        if cache is None:
            mask = Mask(segment_ids, segment_ids, segment_ids[:, 0] * 0)
        else:
            segments = write_slots(cache.segments, segment_ids, cache.length)
            mask = Mask(segment_ids, segments, cache.length)

        if cache is not None and inputs_embeds.shape[1] <= FEW_QUERIES and record == NOTHING and dropout_key is None:
            return self._look(inputs_embeds, cos_sin, mask, cache)

        def step(layer: DecoderLayer, index: Array | int, carry: tuple) -> tuple[tuple, Recorded]:
            x, k, v = carry
            key = jax.random.fold_in(dropout_key, index) if dropout_key is not None else None
            kv = None if k is None else (k[index], v[index])
            y, kv, weights = layer(x, cos_sin, mask, kv, key, record.attentions)
            if kv is not None:
                k, v = place(kv[0], index, k), place(kv[1], index, v)
            return (y, k, v), Recorded(x if record.hidden_states else None, weights)

        sides = (None, None) if cache is None else (cache.k, cache.v)
        (x, k, v), recorded = self.layers.run(step, (inputs_embeds, *sides), remat=remat)
        if cache is not None:
            cache = KVCache(k, v, segments, cache.length + segment_ids.shape[1])
        return self.norm(x), cache, recorded

    def _look(
        self, x: Float[Array, "B T D"], cos_sin: CosSin, mask: Mask, cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache, Recorded]:
        """The stack for a few tokens: all layers read the cache, and it is written once after the last of them."""

        def step(layer: DecoderLayer, index: Array | int, x: Array) -> tuple[Array, tuple[Array, Array]]:
            return layer.look(x, cos_sin, mask, (cache.k[index], cache.v[index]))

        x, new = self.layers.run(step, x)
        # In this order, or XLA keeps the cache as it was for whoever reads it last.
        x, new = jax.lax.optimization_barrier((x, new))
        return self.norm(x), write_layers(cache, new, mask.kv_segments), Recorded(None, None)
