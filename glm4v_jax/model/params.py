"""Parameters by path: their leaves, linear layers, sizes and number."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from glm4v_jax.devices.mesh import platform
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.layers import Layers
from glm4v_jax.model.nn import Linear


def default_dtype() -> DTypeLike:
    """What to compute in here: float32 on a CPU, where bfloat16 decodes several times slower, else bfloat16."""
    return jnp.float32 if platform() == "cpu" else jnp.bfloat16


def leaf_paths(model: Glm4v) -> Iterator[str]:
    """The leaves' paths, in the order of `jax.tree.leaves`: "language_model.layers.stacked.mlp.down.kernel"."""
    for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]:
        yield ".".join(str(key.name) for key in path if getattr(key, "name", "value") != "value")


DECODER = r"language_model\.layers\..*"
"""All linear layers of the decoder, the head left out: what users of LoRA on this model train."""


Axes = tuple[str | None, ...]


def linears(module: Any, path: str = "") -> dict[str, list[Linear]]:
    """Path, without numbers of layers, -> the linear layers there: a single or stacked one, or one for each layer."""
    if isinstance(module, Linear):
        return {path: [module]}
    found: dict[str, list[Linear]] = {}
    if isinstance(module, Layers):
        layers = [module.stacked] if module.is_stacked else [getattr(module, str(i)) for i in range(module.num_layers)]
        for layer in layers:
            for name, same in linears(layer, path).items():
                found.setdefault(name, []).extend(same)
        return found
    for name, value in sorted(vars(module).items()):
        if isinstance(value, nnx.Module):
            found |= linears(value, f"{path}.{name}" if path else name)
    return found


def stacked_layers(linear: Linear) -> int | None:
    """How many layers' kernels are stacked in this one; None for a single kernel."""
    layers = linear.kernel.shape[: -len(linear.in_axes) - len(linear.out_axes)]
    return layers[0] if layers else None


def sizes(linear: Linear) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lengths of a linear layer's inputs and outputs."""
    shape = linear.kernel.shape[-len(linear.in_axes) - len(linear.out_axes) :]
    return shape[: len(linear.in_axes)], shape[len(linear.in_axes) :]


def num_params(tree: object) -> int:
    """Parameters in a module (or any tree of arrays, abstract ones too)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
