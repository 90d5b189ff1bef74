"""Learning which of two answers is preferred: DPO and its relatives, by name.

Of each answer, log p is the sum of its tokens' log probabilities. What a loss looks at is how much more probable the
preferred answer is than the rejected one, in most of them compared with the model before the training:

    margin = (log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from msgspec import Meta

from glm4v_jax.config.checks import PositiveNumber, fault, raise_faults, validate
from glm4v_jax.devices import mesh
from glm4v_jax.model.glm4v import Glm4v
from train.data.packing import TrainBatch
from train.loss import CHUNK, Sums, scan_logits, scores_of

LossName = Literal["dpo", "dpo_norm", "ipo", "hinge", "simpo", "cpo", "orpo"]

_SMOOTHED = ("dpo", "dpo_norm", "simpo", "cpo")
_SHORTEST = 8
"""Tokens of the shortest conversation with an answer; a chat template alone writes about as many."""


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """How preferences are learned from.

    Attributes:
      loss: "dpo" (arXiv 2305.18290), "dpo_norm" (per token: Tulu 3, arXiv 2411.15124), "ipo" (arXiv 2310.12036),
        "hinge" (SLiC, arXiv 2305.10425); without the model before the training: "simpo" (arXiv 2405.14734), "cpo"
        (arXiv 2401.08417), "orpo" (arXiv 2403.07691).
      beta: how fast the loss falls with the margin; of "orpo", the weight of its odds ratio.
      margin: of "simpo", how large a margin is aimed at, already times beta (its gamma).
      label_smoothing: probability that the two answers of a row are swapped; not of "ipo", "hinge" and "orpo".
      sft: weight of the preferred answer's cross entropy per token, added to the loss (as in RPO, and CPO).
    """

    loss: LossName = "dpo"
    beta: PositiveNumber = 0.1
    margin: Annotated[float, Meta(ge=0)] = 0.0
    label_smoothing: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0
    sft: Annotated[float, Meta(ge=0)] = 0.0

    def __post_init__(self) -> None:
        validate(self)
        raise_faults(
            [
                fault(name, getattr(self, name), f"0 with loss {self.loss!r}, which does not have it")
                for name, has_it in (("margin", self.loss == "simpo"), ("label_smoothing", self.loss in _SMOOTHED))
                if getattr(self, name) and not has_it
            ]
        )

    @property
    def has_reference(self) -> bool:
        """Whether answers are compared with those of the model before the training."""
        return LOSSES[self.loss].has_reference


class Pairs(NamedTuple):
    """Answers of any number of pairs, the preferred ones at 0 and the rejected ones at 1 of the last dimension.

    logprobs, reference: sums over each answer's tokens, under the model and under the one before the training.
    lengths: numbers of tokens; 0 where there is no pair.
    """

    logprobs: Float[Array, "... 2"]
    reference: Float[Array, "... 2"]
    lengths: Float[Array, "... 2"]

    @property
    def are_there(self) -> Array:
        """Where there is a pair."""
        return self.lengths[..., 0] > 0

    @property
    def per_token(self) -> Float[Array, "... 2"]:
        """Mean log probability of an answer's tokens."""
        return self.logprobs / jnp.maximum(self.lengths, 1)


def preference_loss(pairs: Pairs, options: PreferenceConfig) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return the loss of each pair, and its margin times beta, whose sign says which answer the model prefers.

    >>> pairs = Pairs(jnp.array([[-2.0, -3.0]]), jnp.array([[-2.5, -2.5]]), jnp.ones((1, 2)))
    >>> loss, margin = preference_loss(pairs, PreferenceConfig(beta=0.5))
    >>> round(float(loss[0]), 4), float(margin[0])
    (0.4741, 0.5)
    """
    kind = LOSSES[options.loss]
    margin = kind.margin(pairs)
    loss = kind.loss(margin, options)
    if options.loss == "orpo":
        loss -= pairs.per_token[..., 0]
    return loss - options.sft * pairs.per_token[..., 0], options.beta * margin


def preference_sums(
    model: Glm4v, hidden: Float[Array, "B T D"], batch: TrainBatch, options: PreferenceConfig, *, chunk: int = CHUNK
) -> Sums:
    """Return the loss of a micro-batch of pairs; `weight` counts them, `correct` those whose margin is above 0."""
    pairs = pairs_of(model, hidden, batch, chunk=chunk)
    loss, margin = preference_loss(pairs, options)
    there = pairs.are_there

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(there, x, 0.0))

    return Sums(total(loss), total(jnp.ones_like(loss)), total(margin > 0), total(margin))


def pairs_of(model: Glm4v, hidden: Float[Array, "B T D"], batch: TrainBatch, *, chunk: int = CHUNK) -> Pairs:
    """Add up the log probabilities of each answer of a micro-batch: [B, P, 2], P pairs a row at most."""
    count = max(hidden.shape[1] // (2 * _SHORTEST), 1)
    targets, weights, segments = batch.targets, batch.weights, batch.batch.segment_ids
    reference = jnp.zeros_like(weights) if batch.reference is None else batch.reference

    def add(found: Array, scores: Array, targets: Array, weights: Array, reference: Array, segments: Array) -> Array:
        of_tokens = scores_of(scores, targets)
        counts = weights > 0
        logprobs = jnp.where(counts, of_tokens.of_target - of_tokens.log_z, 0.0)
        belongs = (segments[..., None] == jnp.arange(1, 2 * count + 1)) & counts[..., None]
        values = jnp.stack([logprobs, reference, counts.astype(jnp.float32)])
        return found + jnp.einsum(
            "kbt,bts->kbs", values, belongs.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST,
            out_sharding=mesh.spec(None, "batch", None),
        )  # fmt: skip

    zero = mesh.reshard(jnp.zeros((3, hidden.shape[0], 2 * count), jnp.float32), None, "batch", None)
    sums = scan_logits(model, hidden, (targets, weights, reference, segments), add, zero, chunk=chunk)
    return Pairs(*sums.reshape(3, -1, count, 2, out_sharding=mesh.spec(None, "batch", None, None)))


def _of_answers(pairs: Pairs) -> Array:
    above = pairs.logprobs - pairs.reference
    return above[..., 0] - above[..., 1]


def _of_tokens(pairs: Pairs) -> Array:
    above = (pairs.logprobs - pairs.reference) / jnp.maximum(pairs.lengths, 1)
    return above[..., 0] - above[..., 1]


def _of_odds(pairs: Pairs) -> Array:
    mean = jnp.minimum(pairs.per_token, -1e-6)
    odds = mean - jnp.log(-jnp.expm1(mean))
    return odds[..., 0] - odds[..., 1]


def _logistic(margin: Array, options: PreferenceConfig) -> Array:
    x = options.beta * margin - options.margin
    return -(1 - options.label_smoothing) * jax.nn.log_sigmoid(x) - options.label_smoothing * jax.nn.log_sigmoid(-x)


def _squared(margin: Array, options: PreferenceConfig) -> Array:
    return jnp.square(margin - 1 / (2 * options.beta))


def _hinge(margin: Array, options: PreferenceConfig) -> Array:
    return jax.nn.relu(1 - options.beta * margin)


def _odds_ratio(margin: Array, options: PreferenceConfig) -> Array:
    return -options.beta * jax.nn.log_sigmoid(margin)


class _Kind(NamedTuple):
    """A loss: what its margin is, what it makes of it, and whether it looks at the model before the training."""

    margin: Callable[[Pairs], Array]
    loss: Callable[[Array, PreferenceConfig], Array]
    has_reference: bool


LOSSES: dict[str, _Kind] = {
    "dpo": _Kind(_of_answers, _logistic, True),
    "dpo_norm": _Kind(_of_tokens, _logistic, True),
    "ipo": _Kind(_of_tokens, _squared, True),
    "hinge": _Kind(_of_answers, _hinge, True),
    "simpo": _Kind(_of_tokens, _logistic, False),
    "cpo": _Kind(_of_answers, _logistic, False),
    "orpo": _Kind(_of_odds, _odds_ratio, False),
}
