"""The jitted programs, over flattened modules.

A module crosses the border of `jax.jit` as the list of its leaves: flattening a tree of NNX objects at every call would
cost more than a decoding step of a small model. Models of equal structure share compiled programs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from glm4v_jax.devices import mesh
from glm4v_jax.model.decoder import Capture, Captured, TextDecoder
from glm4v_jax.model.glm4v import embed_with_vision, score
from glm4v_jax.model.kv_cache import KVCache
from glm4v_jax.model.nn import Linear, gather_tokens
from glm4v_jax.model.runtime import Flat

IGNORED_LABEL = -100
"""The label of a position that does not contribute to the loss."""


@jax.jit
def embed(
    text: Flat[TextDecoder],
    input_ids: Int[Array, "B T"],
    features: Float[Array, "N D"] | None,
    vision_index: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """See `model.glm4v.embed_with_vision`."""
    return embed_with_vision(text.module, input_ids, features, vision_index)


@functools.partial(jax.jit, static_argnames="record")
def forward(
    text: Flat[TextDecoder],
    embeds: Float[Array, "B T D"],
    position_ids: Int[Array, "3 B T"],
    segment_ids: Int[Array, "B T"],
    cache: KVCache | None,
    record: Capture,
    dropout_key: Array | None,
) -> tuple[Float[Array, "B T D"], KVCache | None, Captured]:
    """See `TextDecoder.__call__`; the cache is not donated, the caller may use it again."""
    hidden, cache, recorded = text.module(
        embeds, position_ids, segment_ids, cache, record=record, dropout_key=dropout_key
    )
    return gather_tokens(hidden), cache, recorded


@functools.partial(jax.jit, static_argnames="count")
def last_positions(hidden: Float[Array, "B T D"], end: Int[Array, ""], count: int) -> Float[Array, "B count D"]:
    """The `count` positions before `end`, which is where the padding begins."""
    return jax.lax.dynamic_slice_in_dim(hidden, end - count, count, axis=1)


@jax.jit
def positions_at(hidden: Float[Array, "B T D"], indices: Int[Array, " I"]) -> Float[Array, "B I D"]:
    """The positions of these indices."""
    return hidden.at[:, indices].get(out_sharding=mesh.spec("batch", "length", None))


@functools.partial(jax.jit, static_argnames="shape")
def cut(x: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """The first `shape` entries along the first dimensions, on every device."""
    return jax.sharding.reshard(x, jax.P())[tuple(map(slice, shape))]


@functools.partial(jax.jit, static_argnames="shape")
def attention_weights(
    weights: Float[Array, "L B K G T S"], shape: tuple[int, int, int]
) -> tuple[Float[Array, "b heads t s"], ...]:
    """Attention weights by layer, cut to `shape`, [b, t, s], on every device."""
    n, b, k, g, t, s = weights.shape
    rows, queries, keys = shape
    layers = jax.sharding.reshard(weights, jax.P()).reshape(n, b, k * g, t, s)
    return tuple(layer[:rows, :, :queries, :keys] for layer in layers)


@jax.jit
def logits(text: Flat[TextDecoder], head: Flat[Linear] | None, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits over the vocabulary; the head is None where it is tied to the embedding."""
    return score(text.module, None if head is None else head.module, hidden)


@jax.jit
def causal_lm_loss(scores: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean cross entropy of the next token over the labels that are not -100, float32 (`ForCausalLMLoss`)."""
    labels = mesh.reshard(labels[:, 1:], "batch", "length")
    scores = mesh.reshard(scores[:, :-1].astype(jnp.float32), "batch", "length", None)
    counted = labels != IGNORED_LABEL
    log_z = jax.nn.logsumexp(scores, axis=-1)
    # A comparison in place of a gather: it fuses into the sum, and suits a vocabulary in shards.
    chosen = jnp.sum(jnp.where(jnp.arange(scores.shape[-1]) == labels[..., None], scores, 0.0), axis=-1)
    return jnp.sum(jnp.where(counted, log_z - chosen, 0.0)) / jnp.sum(counted)
