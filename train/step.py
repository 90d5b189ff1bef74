"""A training step as one program: forward, backward, the optimiser, and the decision whether to take it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.layers import Remat
from train.data.packing import TrainBatch
from train.flops import Work, work_of
from train.loss import STRETCH, Sums, cross_entropy
from train.state import Layout, Leaves, TrainState


class Metrics(NamedTuple):
    """Of a step, before its update.

    loss: mean over the weights of all micro-batches.
    accuracy: the share of the weights whose target is the likeliest token.
    weight: their sum.
    grad_norm: of all parameters together, before it is clipped.
    is_skipped: whether the step changed nothing.
    skipped: how many steps of the training have changed nothing, with this one.
    streak: how many of them one after another, up to this one.
    learning_rate: of its update; NaN where `make_step` was not told.
    samples: how many the batch has.
    work: what was no padding.
    """

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    weight: Float[Array, ""]
    grad_norm: Float[Array, ""]
    is_skipped: Bool[Array, ""]
    skipped: Int[Array, ""]
    streak: Int[Array, ""]
    learning_rate: Float[Array, ""]
    samples: Int[Array, ""]
    work: Work


Step = Callable[[TrainState, Leaves, TrainBatch], tuple[TrainState, Metrics]]


def loss_sums(model: Glm4v, batch: TrainBatch, *, remat: Remat = "none", stretch: int = STRETCH) -> Sums:
    """The loss of a batch, not divided by its weight."""
    hidden = model(batch.batch, remat=remat)
    return cross_entropy(model, hidden, batch.targets, batch.weights, stretch=stretch)


def make_step(
    layout: Layout,
    optimizer: optax.GradientTransformation,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    remat: Remat = "full",
    stretch: int = STRETCH,
    max_grad_norm: float = float("inf"),
    learning_rate: optax.Schedule | None = None,
) -> Step:
    """The jitted step.

    Args:
      layout: of the model.
      optimizer: of `TrainState.params`.
      dtype: that the model computes in, and each micro-batch's gradients with it; sums and updates are float32.
      remat: what of the layers the backward pass makes again.
      stretch: see `loss.cross_entropy`.
      max_grad_norm: a step whose gradients have a larger norm, or one that is no number, is left out.
      learning_rate: the optimiser's, by the number of updates before; for the metrics alone.

    Returns:
      (state, frozen leaves, batch) -> (state, metrics). The state is donated. Every array of the batch has a first
      dimension of micro-batches, whose gradients are added up before they are divided by all their weights: what one
      batch of them all would give.
    """

    def sums_of(params: Leaves, frozen: Leaves, batch: TrainBatch) -> tuple[Array, Sums]:
        sums = loss_sums(layout.model(params, frozen, dtype), batch, remat=remat, stretch=stretch)
        return sums.loss, sums

    gradients_of = jax.grad(sums_of, has_aux=True)

    def accumulate(
        params: Leaves, frozen: Leaves, carry: tuple[Leaves, Sums], batch: TrainBatch
    ) -> tuple[tuple[Leaves, Sums], None]:
        gradients, sums = gradients_of(params, frozen, batch)
        return jax.tree.map(jnp.add, carry, (gradients, sums)), None

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen: Leaves, batches: TrainBatch) -> tuple[TrainState, Metrics]:
        if batches.targets.shape[0] == 1:
            gradients, sums = gradients_of(state.params, frozen, jax.tree.map(lambda x: x[0], batches))
        else:
            zero = jnp.zeros((), jnp.float32)
            nothing = jax.tree.map(jnp.zeros_like, state.params), Sums(zero, zero, zero)
            (gradients, sums), _ = jax.lax.scan(functools.partial(accumulate, state.params, frozen), nothing, batches)
        weight = jnp.maximum(sums.weight, jnp.finfo(jnp.float32).tiny)
        gradients = jax.tree.map(lambda x: x / weight, gradients)
        norm = optax.tree.norm(gradients)
        is_good = jnp.isfinite(norm) & jnp.isfinite(sums.loss) & (norm <= max_grad_norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        changed = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_good, new, old), changed, (state.params, state.opt_state)
        )
        skipped = 1 - is_good.astype(jnp.int32)
        streak = (state.streak + skipped) * skipped
        vision = batches.batch.vision
        work = work_of(batches.batch.segment_ids, None if vision is None else vision.segment_ids)
        updates_before = state.step - state.skipped  # as the optimiser counts them
        rate = jnp.float32(jnp.nan if learning_rate is None else learning_rate(updates_before))
        samples = jnp.sum(jnp.max(batches.batch.segment_ids, axis=-1))  # a row's are numbered from 1 on
        skipped = state.skipped + skipped
        metrics = Metrics(
            sums.loss / weight, sums.correct / weight, sums.weight, norm, ~is_good, skipped, streak, rate, samples, work
        )
        return TrainState(params, opt_state, state.step + 1, skipped, streak), metrics

    return step
