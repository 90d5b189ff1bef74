"""The GLM-4 decoder (`Glm4vTextModel`): four norms per layer, grouped-query attention with M-RoPE, and a gated MLP.

What queries attend to is passed to a layer (`layer_attention.Attention`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from glm4v_jax.config.model import Glm4vTextConfig
from glm4v_jax.devices import mesh
from glm4v_jax.model import rope
from glm4v_jax.model.attention.attend import FEW_QUERIES, Dropout
from glm4v_jax.model.kv_cache import KVCache
from glm4v_jax.model.layer_attention import Attention, CachedCall, attention_to_tokens
from glm4v_jax.model.layers import Layers, Remat, stacked_outputs
from glm4v_jax.model.nn import Embed, GatedMlp, Init, Linear, RMSNorm, gather_tokens

CosSin = tuple[Float[Array, "B T F"], Float[Array, "B T F"]]


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
        rows: Int[Array, " B"] | None = None,
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
          rows: the rows of the cache's keys and values that these are, where it has more; segments and length are of
            these alone. One of each shard, counted within it, -1 for none; on a CPU, without sharded slots.

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
        call = None if cache is None else CachedCall.of(cache, segment_ids, rows)

        def step(layer: DecoderLayer, index: Array | int, carry: tuple) -> tuple[tuple, tuple]:
            x, carried = carry
            dropout = None
            if dropout_key is not None:
                dropout = Dropout(jax.random.fold_in(dropout_key, index), layer.self_attn.dropout_rate)
            if call is None:
                attention = attention_to_tokens(segment_ids, dropout, record.attentions)
            else:
                attention = call.attention(index, carried, dropout, record.attentions)
            y, (new, weights) = layer(x, cos_sin, attention)
            if call is not None:
                carried, new = call.after_layer(index, carried, new)
            return (y, carried), (new, Captured(x if record.hidden_states else None, weights))

        (x, carried), outputs = self.layers.run(step, (x, None if call is None else call.carried), remat=remat)
        new, captured = stacked_outputs(outputs)
        if call is not None:
            x, cache = call.written(x, carried, new)
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

        Nothing else looks from one token to another: several sequences may lie one after the other in one row,
        [1, T, D], if each token has its position and attention keeps them apart.

        Args:
          x: embedded tokens.
          cos_sin: of their M-RoPE positions (`rope.mrope_cos_sin`).
          attention_of_layer: index of a layer -> its attention. Queries come unscaled. The index is an int where layers
            are one by one, traced where they are stacked.

        Returns:
          Hidden states after the last norm, and what the layers' attention returned beside its results, such as the
          pages of an engine's cache: a list where layers are one by one, otherwise stacked along a new first dimension.
        """

        def step(layer: DecoderLayer, index: Array | int, x: Array) -> tuple[Array, Any]:
            return layer(x, cos_sin, attention_of_layer(index))

        x, kept = self.layers.run(step, x)
        return self.norm(x), kept
