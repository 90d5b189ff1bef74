"""A step on sampled answers: gradients of micro-batches added up, divided once, and the update."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from glm4v_jax.model.layers import Remat
from train.data.packing import TrainBatch
from train.rl.loss import Objective, PolicySums, policy_loss
from train.state import Layout, Leaves, TrainState
from train.step import UpdateMetrics, update


class PolicyMetrics(NamedTuple):
    """Metrics of a step, before its update; means over the tokens that were learned from.

    loss: about 0 in a first step, whatever is learned: the advantages of a group add up to 0.
    tokens: how many were learned from.
    ratio_mean, ratio_dev, ratio_max: mean of the ratios, and mean and largest of their distances from 1.
    clipped_low, clipped_high: fractions that were clipped below, and above.
    divergence, entropy: see `PolicySums`.
    update: what became of it.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    ratio_mean: Float[Array, ""]
    ratio_dev: Float[Array, ""]
    ratio_max: Float[Array, ""]
    clipped_low: Float[Array, ""]
    clipped_high: Float[Array, ""]
    divergence: Float[Array, ""]
    entropy: Float[Array, ""]
    update: UpdateMetrics


class PolicyStep:
    """A step on the micro-batches of some groups: the same two programs, whatever their number.

    Attributes:
      gradients: (gradients and sums, params, frozen leaves, micro-batch) -> these with the micro-batch's, jitted;
        the first are donated.
      update: (state, gradients, sums, count, position) -> (state, metrics), jitted; the state is donated.
    """

    def __init__(
        self,
        layout: Layout,
        optimizer: optax.GradientTransformation,
        objective: Objective,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        remat: Remat = "full",
        max_grad_norm: float = float("inf"),
        learning_rate: optax.Schedule | None = None,
    ):
        """Make the programs; all arguments but the objective of the loss are those of `train.step.make_step`."""

        def sums_of(params: Leaves, frozen: Leaves, batch: TrainBatch) -> tuple[Array, PolicySums]:
            model, batch = layout.model(params, frozen, dtype), jax.tree.map(lambda x: x[0], batch)
            hidden = model(batch.batch, remat=remat)
            sums = policy_loss(model, hidden, batch, objective)
            return sums.loss, sums

        @functools.partial(jax.jit, donate_argnums=0)
        def policy_gradients(
            found: tuple[Leaves, PolicySums], params: Leaves, frozen: Leaves, batch: TrainBatch
        ) -> tuple[Leaves, PolicySums]:
            gradients, sums = jax.grad(sums_of, has_aux=True)(params, frozen, batch)
            return jax.tree.map(jnp.add, found[0], gradients), found[1].plus(sums)

        @functools.partial(jax.jit, donate_argnums=0)
        def policy_update(
            state: TrainState, gradients: Leaves, sums: PolicySums, count: Array, position: Array
        ) -> tuple[TrainState, PolicyMetrics]:
            gradients = jax.tree.map(lambda x: x / count, gradients)
            state = state._replace(opt_state=at_position(state.opt_state, position))
            rate = None if learning_rate is None else lambda _: learning_rate(position)
            updated, taken = update(state, gradients, sums.loss, optimizer, max_grad_norm, rate, count)
            tokens = jnp.maximum(sums.tokens, 1)
            metrics = PolicyMetrics(
                sums.loss / count, sums.tokens, sums.ratio / tokens, sums.deviation / tokens, sums.largest,
                sums.low / tokens, sums.high / tokens, sums.divergence / tokens, sums.entropy / tokens, taken,
            )  # fmt: skip
            return updated, metrics

        self.gradients, self.update = policy_gradients, policy_update

    def __call__(
        self, state: TrainState, frozen: Leaves, batches: Iterable[TrainBatch], count: float, position: int
    ) -> tuple[TrainState, PolicyMetrics]:
        """Take a step; the state is donated.

        Args:
          batches: micro-batches as `placement.put` returns them, which are taken one by one.
          count: what their loss is divided by: all answers that are learned from (`groups.num_samples`), or all their
            tokens where it is an average over these.
          position: in the schedule of the learning rate, from 0.
        """
        found = nothing(state.params)
        for batch in batches:
            found = self.gradients(found, state.params, frozen, batch)
        return self.update(state, *found, jnp.float32(count), jnp.int32(position))


@jax.jit
def nothing(params: Leaves) -> tuple[Leaves, PolicySums]:
    """Return the gradients and the sums of no micro-batch."""
    return jax.tree.map(jnp.zeros_like, params), PolicySums.zero()


def at_position(opt_state: optax.OptState, position: Array) -> optax.OptState:
    """Return an optimizer's state with schedules of the learning rate at a position; moments and their counts stay.

    >>> optimizer = optax.adam(optax.linear_schedule(1.0, 0.0, 10))
    >>> found = at_position(optimizer.init(jnp.zeros(3)), jnp.int32(7))
    >>> [int(count) for _, count in optax.tree.get_all_with_path(found, "count")]
    [0, 7]
    """

    def is_schedule(state: Any) -> bool:
        return isinstance(state, optax.ScaleByScheduleState)

    def moved(state: Any) -> Any:
        # Of the old count, which is donated: the memory of an argument that nothing uses is not reused.
        return state._replace(count=state.count + (position - state.count)) if is_schedule(state) else state

    return jax.tree.map(moved, opt_state, is_leaf=is_schedule)
