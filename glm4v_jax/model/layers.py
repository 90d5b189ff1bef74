"""A stack of equal layers in either of two layouts, and conversion between them.

*Stacked*: every leaf has a leading dimension of `num_layers`, and the stack runs as `lax.scan`. It compiles in the
time of one layer, is how checkpoints and training keep the model, and on TPU the slice of a layer's weight fuses into
its matmul. *Per layer*: one module a layer, run as a Python loop. On a CPU scanning copies every weight before it is
used, which decoding, bound by memory, feels most.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from glm4v_jax.errors import ConfigError
from glm4v_jax.model.attention.blockwise import SAVED
from glm4v_jax.model.nn import Init

Remat = Literal["none", "full", "attention", "dots"]
"""What of a layer the backward pass recomputes: nothing; everything, from the layer's input; all but attention, whose
result is kept; or all but attention and the linear layers, whose results are kept."""

# A layer is called as step(layer, index, carry) -> (carry, output).
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class Layers(nnx.Module):
    """`num_layers` equal layers; attributes "0", "1", ... when kept per layer, "stacked" otherwise."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers

    @classmethod
    def init(cls, make: Callable[[Init], nnx.Module], num_layers: int, init: Init) -> Self:
        """Make new layers, stacked, each initialised from a key of its own."""
        layers = cls(num_layers)
        if init.rngs is None:
            layers.stacked = jax.vmap(lambda: make(init), axis_size=num_layers)()
            return layers
        keys = jax.random.split(init.rngs.params(), num_layers)
        layers.stacked = jax.vmap(lambda key: make(Init(nnx.Rngs(params=key), init.stddev, init.dtype)))(keys)
        return layers

    @property
    def is_stacked(self) -> bool:
        """Whether all layers share their leaves, the first layout."""
        return hasattr(self, "stacked")

    def run(self, step: Step, carry: Any, *, remat: Remat = "none") -> tuple[Any, Any]:
        """Run the layers in order.

        Args:
          step: step(layer, index, carry) -> (carry, output); the index is traced when stacked.
          carry: what goes from layer to layer.
          remat: what the backward pass recomputes.

        Returns:
          The last carry, and the layers' outputs: stacked along a new first dimension, or a list if layers are kept
          per layer.

        Raises:
          ConfigError: `remat` is unknown.
        """
        step = _rematerialised(step, remat, self.is_stacked)
        if self.is_stacked:
            indices = jnp.arange(self.num_layers)
            return jax.lax.scan(lambda carry, x: step(x[1], x[0], carry), carry, (indices, self.stacked))
        outputs = []
        for i in range(self.num_layers):
            carry, output = step(getattr(self, str(i)), i, carry)
            outputs.append(output)
        return carry, outputs


def stacked_outputs(outputs: Any) -> Any:
    """Outputs of `Layers.run`, stacked along a new first dimension in both layouts."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *outputs) if isinstance(outputs, list) else outputs


def _rematerialised(step: Step, remat: Remat, is_stacked: bool) -> Step:
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(SAVED)
    policy = {
        "full": policies.nothing_saveable,
        "attention": attention,
        "dots": policies.save_from_both_policies(attention, policies.dots_with_no_batch_dims_saveable),
    }
    if remat == "none":
        return step
    if remat not in policy:
        raise ConfigError(f"remat: found {remat!r}; expected one of {', '.join(get_args(Remat))}")
    # In a scan XLA cannot merge the recomputation with the forward pass, and barriers against that only cost.
    return jax.checkpoint(step, policy=policy[remat], prevent_cse=not is_stacked)


def unstack(layers: Layers) -> Layers:
    """Convert to the per-layer layout, a new object; each leaf has its own buffer."""
    if not layers.is_stacked:
        return layers
    result = Layers(layers.num_layers)
    leaves, structure = jax.tree.flatten(layers.stacked)
    for i in range(layers.num_layers):
        setattr(result, str(i), jax.tree.unflatten(structure, _taken(leaves, np.int32(i))))
    return result


def stack(layers: Layers) -> Layers:
    """Convert to the stacked layout, a new object."""
    if layers.is_stacked:
        return layers
    result = Layers(layers.num_layers)
    each = [getattr(layers, str(i)) for i in range(layers.num_layers)]
    leaves = _joined([jax.tree.leaves(layer) for layer in each])
    result.stacked = jax.tree.unflatten(jax.tree.structure(each[0]), leaves)
    return result


@functools.partial(jax.jit, inline=True)
def _taken(leaves: Sequence[Array], layer: Array) -> list[Array]:
    """A layer of stacked leaves, by one program: one by one they took two for each shape, four times as long."""
    return [jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in leaves]


@functools.partial(jax.jit, inline=True)
def _joined(layers: Sequence[Sequence[Array]]) -> list[Array]:
    return [jnp.stack(same) for same in zip(*layers, strict=True)]
