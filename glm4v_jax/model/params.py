"""Parameters by path: leaves, linear layers, their sizes and number.

A path names a leaf as the modules nest: "language_model.layers.stacked.mlp.down.kernel". Paths of linear layers have
neither the layout nor the numbers of layers: "language_model.layers.mlp.down".
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from glm4v_jax.config.checks import fault, raise_faults
from glm4v_jax.devices.mesh import platform
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.layers import Layers
from glm4v_jax.model.nn import Linear

DECODER = r"language_model\.layers\..*"
"""Pattern of the decoder's linear layers, without the head: what users of LoRA on this model train."""

Axes = tuple[str | None, ...]
"""Logical names of dimensions."""


def default_dtype() -> DTypeLike:
    """The dtype to compute in here: float32 on a CPU, where bfloat16 decodes several times slower, else bfloat16."""
    return jnp.float32 if platform() == "cpu" else jnp.bfloat16


def leaf_paths(model: Glm4v) -> Iterator[str]:
    """The leaves' paths, in the order of `jax.tree.leaves`."""
    for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]:
        yield ".".join(str(key.name) for key in path if getattr(key, "name", "value") != "value")


def linears(module: Any, path: str = "") -> dict[str, list[Linear]]:
    """Path -> the linear layers there: a single or stacked one, or one for each layer."""
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


def kernels(model: Glm4v) -> dict[str, Linear]:
    """Path of a kernel, without the layout and the number of its layer, -> the first linear layer that has it."""
    return {f"{path}.kernel": found[0] for path, found in linears(model).items()}


def matching_linears(model: Glm4v, pattern: str, field: str) -> dict[str, list[Linear]]:
    """The linear layers whose whole path fits a regular expression, which the user calls `field`.

    ConfigError if none fits.
    """
    every = linears(model)
    found = {path: layers for path, layers in every.items() if re.fullmatch(pattern, path)}
    if not found:
        raise_faults([fault(field, pattern, f"a pattern of some of {', '.join(every)}")])
    return found


def check_pattern(pattern: str, field: str) -> None:
    """Check that a text is a regular expression; ConfigError if it is not."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise_faults([fault(field, pattern, f"a regular expression ({error})")])


def stacked_layers(linear: Linear) -> int | None:
    """How many layers' kernels are stacked in this one; None for a single kernel."""
    layers = linear.kernel.shape[: -len(linear.in_axes) - len(linear.out_axes)]
    return layers[0] if layers else None


def sizes(linear: Linear) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lengths of a linear layer's inputs and outputs."""
    shape = linear.kernel.shape[-len(linear.in_axes) - len(linear.out_axes) :]
    first, end = linear.leading, linear.leading + len(linear.in_axes)
    *others, last = shape[first:end]
    packed = 2 if linear.kernel.dtype == jnp.uint8 else 1  # see `cpu_matmul.pack_int4`
    return (*others, packed * last), (*shape[:first], *shape[end:])


def num_params(tree: object) -> int:
    """Count the parameters of a module, or of any tree of arrays, abstract ones too."""
    return sum((2 if leaf.dtype == jnp.uint8 else 1) * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
