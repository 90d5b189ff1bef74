"""The order of a kernel's dimensions, and changes of it.

*Inputs first*, [*inputs, *outputs]: how checkpoints and training keep kernels, and the one order in which a CPU and
cuBLAS run them as a single matrix product. *Outputs first*, for inference on a TPU: of several outputs the first, which
is small (gate and up; key heads; q, k and v), stands before the inputs, [2, D, F]. With a small dimension in the middle
the compiler's layout of the argument and that of the product differ, and every call copies the stack of all layers:
9.8 GiB of temporaries to decode with the 9B on a v6e:1x1, against 0.001. (A CPU takes up to fifteen times as long for a
product in this order.)
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import Linear
from glm4v_jax.model.params import linears


def outputs_first(model: Glm4v) -> Glm4v:
    """The same model with kernels in that order; new modules, and the arrays of all other leaves."""
    result = jax.tree.map(lambda x: x, model)
    for found in linears(result).values():
        for linear in found:
            reorder(linear, leading=int(len(linear.out_axes) > 1))
    return result


def reorder(linear: Linear, leading: int) -> None:
    """Have the first `leading` outputs before the inputs, in a layer's kernel and in its scales of groups."""
    kernel, scale = linear.kernel[...], None if linear.kernel_scale is None else linear.kernel_scale[...]
    if linear.leading != leading:
        linear.kernel = nnx.Param(in_order(kernel, linear, linear.leading, leading))
        if scale is not None and scale.ndim == kernel.ndim:
            linear.kernel_scale = nnx.Param(in_order(scale, linear, linear.leading, leading))
    linear.leading = leading


def in_order(kernel: Array, linear: Linear, before: int, after: int) -> Array:
    """A kernel, or scales of its groups, of one layer or of all, with `after` outputs before the inputs, not `before`.

    `linear` is for its axes.
    """
    return kernel if before == after else _moved(kernel, len(linear.in_axes), len(linear.out_axes), before, after)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _moved(kernel: Array, inputs: int, outputs: int, before: int, after: int) -> Array:
    first = kernel.ndim - inputs - outputs
    end = first + inputs
    kernel = jnp.moveaxis(kernel, tuple(range(first, first + before)), tuple(range(end, end + before)))
    return jnp.moveaxis(kernel, tuple(range(end, end + after)), tuple(range(first, first + after)))
