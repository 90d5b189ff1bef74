"""Cross entropy of the next token, never with more than a stretch's logits in memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glm4v_jax.devices import mesh
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import gather_tokens

STRETCH = 1024
"""Tokens of a row whose logits exist at a time: 151,552 numbers each."""


class Sums(NamedTuple):
    """A loss that is not divided yet, so that batches of unequal weight add up to what one large batch gives.

    loss: sum of each target's weight times its cross entropy, float32.
    weight: sum of the weights.
    correct: sum of the weights of targets that are the likeliest token.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]


def cross_entropy(
    model: Glm4v,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    stretch: int = STRETCH,
) -> Sums:
    """Weighted cross entropy of `targets`, over logits that may be split along the vocabulary.

    Args:
      model: for its head.
      hidden: after the last norm.
      targets: the token to predict at each place; any where there is none.
      weights: 0 where there is none.
      stretch: how many tokens of a row to take at a time; backward makes their logits again.
    """
    # More devices share a token's logits: as many more tokens at a time.
    stretches = _stretches(hidden.shape[1], stretch * mesh.shards("vocab"))
    head = _used(model)

    def cut(x: Array) -> Array:
        """[B, T, ...] -> [stretches, B, T / stretches, ...]."""
        shape = (x.shape[0], stretches, x.shape[1] // stretches, *x.shape[2:])
        rows = mesh.spec_of(x)[0]
        return jnp.moveaxis(x.reshape(shape, out_sharding=jax.P(rows, *(None,) * (len(shape) - 1))), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(sums: Sums, part: tuple[Array, Array, Array]) -> tuple[Sums, None]:
        hidden, targets, weights = part
        scores = head.logits(hidden).astype(jnp.float32)
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
        log_z = top + jnp.log(jnp.sum(jnp.exp(scores - top[..., None]), axis=-1))
        # A comparison in place of a gather: it fuses into the sum, and suits a vocabulary in shards.
        is_target = jnp.arange(scores.shape[-1]) == targets[..., None]
        of_target = jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1)
        # Where there is no target its cross entropy may be anything, and its weight of 0 would not mend infinity.
        losses = jnp.where(weights > 0, weights * (log_z - of_target), 0.0)
        correct = jnp.where(of_target >= top, weights, 0.0)
        return Sums(sums.loss + jnp.sum(losses), sums.weight + jnp.sum(weights), sums.correct + jnp.sum(correct)), None

    targets, weights = mesh.reshard(targets, "batch", None), mesh.reshard(weights, "batch", None)
    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(add, Sums(zero, zero, zero), (cut(gather_tokens(hidden)), cut(targets), cut(weights)))
    return sums


def _used(model: Glm4v) -> Glm4v:
    """The model with its head as it is used, so that it is not gathered for every stretch."""
    model = jax.tree.map(lambda x: x, model)  # new modules around the same arrays
    part = model.language_model.embed_tokens if model.lm_head is None else model.lm_head
    part = jax.tree.map(mesh.used, part)
    if model.lm_head is None:
        model.language_model.embed_tokens = part
    else:
        model.lm_head = part
    return model


def _stretches(length: int, stretch: int) -> int:
    """Into how many equal parts to cut so many tokens, none longer than `stretch`."""
    count = -(-length // stretch)
    while length % count:
        count += 1
    return count
