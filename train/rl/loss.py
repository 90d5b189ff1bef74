"""The clipped objective of sampled answers, as sums: what micro-batches add up to does not depend on how they are cut.

Of each target with a weight, r is its probability under the model divided by that under the distribution that it was
drawn from, and A the advantage of its answer. The objective is min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv
1707.06347), with a high clip of its own (DAPO, arXiv 2503.14476), and without a penalty for the divergence from a
reference model. The loss is its negative.
"""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from glm4v_jax.model.glm4v import Glm4v
from train.data.packing import TrainBatch
from train.loss import CHUNK, scan_logits, scores_of

_MOST = 20.0
"""Of the logarithm of a ratio: beyond it the step is lost in any case, and its exponential might be infinite."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the loss is made with.

    low, high: a ratio below 1 - low, or above 1 + high, is not pushed any further.
    temperature: that the answers were drawn with.
    banned: tokens that were not drawn, such as those of images: the model's probabilities are without them.
    """

    low: float = 0.2
    high: float = 0.28
    temperature: float = 1.0
    banned: tuple[int, ...] = ()

    def drawn_from(self, logits: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
        """Return the scores of the distribution that answers are drawn from."""
        if self.banned:
            is_banned = np.isin(np.arange(logits.shape[-1]), self.banned)
            logits = jnp.where(is_banned, -jnp.inf, logits)
        return logits / self.temperature if self.temperature != 1 else logits


class PolicySums(NamedTuple):
    """The loss and what is worth knowing about it, before division; all but `loss` of the tokens with a weight.

    loss: sum of each target's weight times its negative objective.
    tokens: how many have a weight.
    ratio, deviation, largest: sums of r and of |r - 1|, and the largest |r - 1|.
    low, high: how many are clipped below, and above.
    divergence: sum of r - 1 - log r, an estimate of the divergence from the distribution drawn from that is never
      negative ("k3", http://joschu.net/blog/kl-approx.html).
    entropy: sum of the entropies of the distributions, in nats.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    ratio: Float[Array, ""]
    deviation: Float[Array, ""]
    largest: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    divergence: Float[Array, ""]
    entropy: Float[Array, ""]

    @classmethod
    def zero(cls) -> Self:
        """Return the sums of nothing."""
        return cls(*[jnp.zeros((), jnp.float32)] * len(cls._fields))

    def plus(self, other: Self) -> Self:
        """Return the sums of both."""
        added = jax.tree.map(jnp.add, self, other)
        return added._replace(largest=jnp.maximum(self.largest, other.largest))


def policy_loss(
    model: Glm4v, hidden: Float[Array, "B T D"], batch: TrainBatch, objective: Objective, *, chunk: int = CHUNK
) -> PolicySums:
    """Return the loss of a micro-batch [B, ...], `hidden` being after the last norm.

    Logits of a `chunk` of each row exist at a time.
    """

    def add(
        sums: PolicySums, logits: Array, targets: Array, weights: Array, advantage: Array, before: Array
    ) -> PolicySums:
        scores = objective.drawn_from(logits)
        found = scores_of(scores, targets)
        counts = weights > 0
        # What was not drawn has no ratio, and may have a probability of 0.
        log_ratio = jnp.where(counts, found.of_target - found.log_z - before, 0.0)
        ratio = jnp.exp(jnp.clip(log_ratio, -_MOST, _MOST))
        is_low = counts & (advantage < 0) & (ratio < 1 - objective.low)
        is_high = counts & (advantage > 0) & (ratio > 1 + objective.high)
        clipped = jnp.where(is_low, 1 - objective.low, jnp.where(is_high, 1 + objective.high, ratio))
        scores, log_z, ratio, log_ratio = jax.lax.stop_gradient((scores, found.log_z, ratio, log_ratio))
        entropy = _entropy(scores, log_z)
        of_tokens = (counts, ratio, jnp.abs(ratio - 1), is_low, is_high, ratio - 1 - log_ratio, entropy)
        tokens, total, deviation, low, high, divergence, entropy = (
            jnp.sum(jnp.where(counts, x, 0.0)) for x in of_tokens
        )
        largest = jnp.max(jnp.where(counts, jnp.abs(ratio - 1), 0.0))
        loss = -jnp.sum(weights * clipped * advantage)
        return sums.plus(PolicySums(loss, tokens, total, deviation, largest, low, high, divergence, entropy))

    assert batch.advantages is not None and batch.reference is not None
    arrays = (batch.targets, batch.weights, batch.advantages, batch.reference)
    return scan_logits(model, hidden, arrays, add, PolicySums.zero(), chunk=chunk)


def _entropy(scores: Float[Array, "B T V"], log_z: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Of distributions, some of whose probabilities may be 0."""
    probabilities = jnp.exp(scores - log_z[..., None])
    return log_z - jnp.sum(jnp.where(probabilities > 0, probabilities * scores, 0.0), axis=-1)
