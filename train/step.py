"""A training step as one program: forward, backward, the optimizer, and the decision whether to skip it."""

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
from train.loss import CHUNK, Sums, cross_entropy
from train.noise import Noise
from train.optimizers import KEPT
from train.preference import PreferenceConfig, preference_sums
from train.state import Layout, Leaves, TrainState


class UpdateMetrics(NamedTuple):
    """What became of an optimizer's step.

    grad_norm: of all parameters together, before it is clipped.
    is_skipped: whether the step was skipped.
    skipped: how many steps of the training have been skipped, this one included.
    streak: how many of them in a row, up to this one; those without a target do not count.
    learning_rate: of the step; NaN without a schedule.
    """

    grad_norm: Float[Array, ""]
    is_skipped: Bool[Array, ""]
    skipped: Int[Array, ""]
    streak: Int[Array, ""]
    learning_rate: Float[Array, ""]


class Metrics(NamedTuple):
    """Metrics of a step, before its update.

    loss: mean over the weights of all micro-batches.
    accuracy: fraction of the weights whose target is the most likely token.
    weight: sum of the weights.
    update: what became of it.
    samples: how many the batch has; a pair has two.
    work: what was not padding.
    margin: of preferences, mean of how much more the preferred answers are preferred (`preference_loss`).
    """

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    weight: Float[Array, ""]
    update: UpdateMetrics
    samples: Int[Array, ""]
    work: Work
    margin: Float[Array, ""] | None = None


Step = Callable[[TrainState, Leaves, TrainBatch], tuple[TrainState, Metrics]]


def loss_sums(
    model: Glm4v,
    batch: TrainBatch,
    *,
    remat: Remat = "none",
    chunk: int = CHUNK,
    noise: Noise | None = None,
    key: Array | None = None,
    preference: PreferenceConfig | None = None,
) -> Sums:
    """Return the loss of a batch, before it is divided by the weight; `noise` is drawn with `key`.

    With `preference` it is the loss of pairs, else the cross entropy of the targets.
    """
    if noise is None or key is None:
        hidden = model(batch.batch, remat=remat)
    else:
        hidden = noise.hidden(model, batch.batch, key, remat)
    if preference is not None:
        return preference_sums(model, hidden, batch, preference, chunk=chunk)
    return cross_entropy(model, hidden, batch.targets, batch.weights, chunk=chunk)


@functools.lru_cache(maxsize=KEPT)
def make_step(
    layout: Layout,
    optimizer: optax.GradientTransformation,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    remat: Remat = "full",
    max_grad_norm: float = float("inf"),
    learning_rate: optax.Schedule | None = None,
    noise: Noise | None = None,
    preference: PreferenceConfig | None = None,
) -> Step:
    """Return the jitted step: for equal arguments the same one.

    Args:
      layout: of the model.
      optimizer: of `TrainState.params`.
      dtype: compute dtype of the model and of each micro-batch's gradients; sums and updates are float32.
      remat: what of the layers the backward pass recomputes.
      max_grad_norm: a step whose gradients have a larger norm, or one that is not finite, is skipped.
      learning_rate: the optimizer's, by the number of earlier updates; for the metrics alone.
      noise: what is drawn in every step; by default nothing.
      preference: how pairs are learned from; by default the loss is the cross entropy of the targets.

    Returns:
      (state, frozen leaves, batch) -> (state, metrics). The state is donated. Every array of the batch has a first
      dimension of micro-batches, whose gradients are summed before they are divided by all their weights: the
      gradients of one large batch.
    """

    def sums_of(params: Leaves, frozen: Leaves, batch: TrainBatch, key: Array | None) -> tuple[Array, Sums]:
        model = layout.model(params, frozen, dtype)
        sums = loss_sums(model, batch, remat=remat, noise=noise, key=key, preference=preference)
        return sums.loss, sums

    gradients_of = jax.grad(sums_of, has_aux=True)

    def accumulate(
        params: Leaves, frozen: Leaves, carry: tuple[Leaves, Sums], drawn: tuple[TrainBatch, Array | None]
    ) -> tuple[tuple[Leaves, Sums], None]:
        gradients, sums = gradients_of(params, frozen, *drawn)
        return jax.tree.map(jnp.add, carry, (gradients, sums)), None

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen: Leaves, batches: TrainBatch) -> tuple[TrainState, Metrics]:
        count = batches.targets.shape[0]
        drawn = batches, None if noise is None else noise.keys(state.step, count)
        if count == 1:
            gradients, sums = gradients_of(state.params, frozen, *jax.tree.map(lambda x: x[0], drawn))
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params), Sums.zero(preference is not None)
            (gradients, sums), _ = jax.lax.scan(functools.partial(accumulate, state.params, frozen), zeros, drawn)
        weight = jnp.maximum(sums.weight, jnp.finfo(jnp.float32).tiny)
        gradients = jax.tree.map(lambda x: x / weight, gradients)
        updated, taken = update(state, gradients, sums.loss, optimizer, max_grad_norm, learning_rate, sums.weight)
        vision = batches.batch.vision
        work = work_of(batches.batch.segment_ids, None if vision is None else vision.segment_ids)
        samples = jnp.sum(jnp.max(batches.batch.segment_ids, axis=-1))  # a row's are numbered from 1 on
        metrics = Metrics(
            sums.loss / weight, sums.correct / weight, sums.weight, taken, samples, work,
            None if sums.margin is None else sums.margin / weight,
        )  # fmt: skip
        return updated, metrics

    return step


def update(
    state: TrainState,
    gradients: Leaves,
    loss: Float[Array, ""],
    optimizer: optax.GradientTransformation,
    max_grad_norm: float,
    learning_rate: optax.Schedule | None,
    weight: Float[Array, ""],
) -> tuple[TrainState, UpdateMetrics]:
    """Take an optimizer's step, or skip it.

    It is skipped where the loss or the gradients are not finite, or the latter too large; and where nothing has a
    weight, as where all rows of a batch have become unreadable: weight decay and momentum would move the parameters.
    """
    norm = optax.tree.norm(gradients)
    is_good = jnp.isfinite(norm) & jnp.isfinite(loss) & (norm <= max_grad_norm)
    is_taken = is_good & (weight > 0)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    changed = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(is_taken, new, old), changed, (state.params, state.opt_state)
    )
    skipped = 1 - is_taken.astype(jnp.int32)
    streak = jnp.where(is_taken, 0, state.streak + 1 - is_good.astype(jnp.int32))
    updates_before = state.step - state.skipped  # as the optimizer counts them
    rate = jnp.float32(jnp.nan if learning_rate is None else learning_rate(updates_before))
    updated = TrainState(params, opt_state, state.step + 1, state.skipped + skipped, streak)
    return updated, UpdateMetrics(norm, ~is_taken, updated.skipped, updated.streak, rate)
