"""Cross entropy of the next token, and other losses of logits, with those of one chunk of tokens in memory at a time.

`glm4v_jax.hf.forward.causal_lm_loss` takes logits, which its caller returns anyway; a training step must never hold
them all: 8,192 tokens of 151,552 float32 logits are 5 GB, and their gradient as much.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glm4v_jax.devices import mesh
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import gather_tokens

S = TypeVar("S")

CHUNK = 1024
"""Tokens of a row whose logits exist at a time: 151,552 numbers each."""


class Sums(NamedTuple):
    """A loss before it is divided, so that batches of unequal weight add up to what one large batch gives.

    loss: sum of each target's weight times its cross entropy, float32.
    weight: sum of the weights.
    correct: sum of the weights of targets that are the most likely token.
    margin: of preferences, sum of how much more the preferred answers are preferred; None otherwise.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    margin: Float[Array, ""] | None = None

    @classmethod
    def zero(cls, is_preference: bool = False) -> "Sums":
        """Return the sums of nothing."""
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, zero, zero, zero if is_preference else None)


def cross_entropy(
    model: Glm4v,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int = CHUNK,
) -> Sums:
    """Return the weighted cross entropy of `targets`, over logits that may be sharded along the vocabulary.

    `hidden` comes after the last norm, `weights` are 0 where there is no target, and the backward pass recomputes the
    logits of a `chunk` of a row at a time.
    """

    def add(sums: Sums, scores: Array, targets: Array, weights: Array) -> Sums:
        found = scores_of(scores, targets)
        # Without a target the cross entropy may be infinite, and a weight of 0 would make that NaN.
        losses = jnp.where(weights > 0, weights * (found.log_z - found.of_target), 0.0)
        correct = jnp.where(found.of_target >= found.top, weights, 0.0)
        return Sums(sums.loss + jnp.sum(losses), sums.weight + jnp.sum(weights), sums.correct + jnp.sum(correct))

    return scan_logits(model, hidden, (targets, weights), add, Sums.zero(), chunk=chunk)


class TargetScores(NamedTuple):
    """Scores of the vocabulary in short, for each token: the largest, the logarithm of their sum, and the target's."""

    top: Float[Array, "B T"]
    log_z: Float[Array, "B T"]
    of_target: Float[Array, "B T"]


def scores_of(scores: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> TargetScores:
    """Return what a loss needs of scores, which may be sharded along the vocabulary."""
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    log_z = top + jnp.log(jnp.sum(jnp.exp(scores - top[..., None]), axis=-1))
    # A comparison instead of a gather: it fuses into the sum, and suits a vocabulary in shards.
    is_target = jnp.arange(scores.shape[-1]) == targets[..., None]
    return TargetScores(top, log_z, jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1))


def scan_logits(
    model: Glm4v,
    hidden: Float[Array, "B T D"],
    arrays: tuple[Array, ...],
    add: Callable[..., S],
    zero: S,
    *,
    chunk: int = CHUNK,
) -> S:
    """Fold a function over the float32 logits of all tokens, a chunk of each row at a time.

    Args:
      model: for its head.
      hidden: after the last norm.
      arrays: [B, T], of each token.
      add: (what was found so far, logits [B, t, V], the same part of each array) -> what was found; the backward pass
        runs it again.
      zero: what was found in nothing.
      chunk: tokens of a row to take at a time.
    """
    # Where devices share a token's logits, as many more tokens fit at a time.
    chunks = _num_chunks(hidden.shape[1], chunk * mesh.shards("vocab"))
    head = _gathered(model)

    def cut(x: Array) -> Array:
        """[B, T, ...] -> [chunks, B, T / chunks, ...]."""
        shape = (x.shape[0], chunks, x.shape[1] // chunks, *x.shape[2:])
        rows = mesh.spec_of(x)[0]
        return jnp.moveaxis(x.reshape(shape, out_sharding=jax.P(rows, *(None,) * (len(shape) - 1))), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(found: S, part: tuple[Array, ...]) -> tuple[S, None]:
        hidden, *rest = part
        return add(found, head.logits(hidden).astype(jnp.float32), *rest), None

    placed = (mesh.reshard(x, "batch", None) for x in arrays)
    found, _ = jax.lax.scan(step, zero, tuple(map(cut, (gather_tokens(hidden), *placed))))
    return found


def _gathered(model: Glm4v) -> Glm4v:
    """The model with its head gathered once, and not again for every chunk."""
    model = jax.tree.map(lambda x: x, model)  # new modules around the same arrays
    part = model.language_model.embed_tokens if model.lm_head is None else model.lm_head
    part = jax.tree.map(mesh.used, part)
    if model.lm_head is None:
        model.language_model.embed_tokens = part
    else:
        model.lm_head = part
    return model


def _num_chunks(length: int, chunk: int) -> int:
    """The least number of equal parts of `length`, none longer than `chunk`."""
    count = -(-length // chunk)
    while length % count:
        count += 1
    return count
