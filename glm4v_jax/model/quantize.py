"""Kernels as 8- or 4-bit integers: a half or a quarter of bfloat16's memory, for inference and for adapters (QLoRA).

A quantised kernel is two leaves of `nn.Linear`: integers, and the float32 scale of each output channel (int8) or of
each group of inputs of it (int4). Both are stacked and split over the mesh as the kernel was. They are multiplied
where the kernel is used, a layer at a time. A quantised embedding has a scale for each token. Rounding is symmetric and
to the nearest: a weight is off by half of its scale at most, which is the largest weight of the channel or group over
127 or 7.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from glm4v_jax.config.checks import Positive, fault, one_of, validate
from glm4v_jax.config.quantization import Scheme
from glm4v_jax.devices import mesh
from glm4v_jax.errors import CheckpointError, ConfigError, naming
from glm4v_jax.model.cpu_matmul import pack_int4
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import reorder
from glm4v_jax.model.lora import copy_without_lora
from glm4v_jax.model.nn import Linear
from glm4v_jax.model.params import DECODER, Axes, check_pattern, linears, matching_linears, sizes

_LARGEST = {"int8": 127, "int4": 7}
_SCALE = "_scale"
_TILE = 1 << 18
"""Numbers that are quantised at a time on the host, which stay in its cache."""
_EMBEDDING = "language_model.embed_tokens.embedding"


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Which kernels are quantised, and how.

    Attributes:
      dtype: "int8", a scale for each output channel; or "int4", a scale for each group of inputs of a channel.
      group: the most inputs of a group; the largest divisor of a kernel's last input dimension up to it is taken.
      target: regular expression that fits the whole path of a linear layer, as in `lora.LoraConfig`. By default the
        decoder's projections and MLPs.
      rest: whether all else that is large becomes int8: the head, the ViT's linear layers, and the embedding of tokens
        unless it is the head as well.

    Raises:
      ConfigError: a field is invalid.
    """

    dtype: Literal["int8", "int4"] = "int8"
    group: Positive = 64
    target: str = DECODER
    rest: bool = False

    def __post_init__(self) -> None:
        validate(self, prefix="quantize.")
        check_pattern(self.target, "quantize.target")


def for_inference(quantize: "QuantConfig | str | None") -> QuantConfig | None:
    """The configuration that a scheme's name stands for where nothing is trained: everything is quantised.

    Raises:
      ConfigError: there is no such scheme, or none on this platform.
    """
    if quantize is None or quantize == "none":
        return None
    if not isinstance(quantize, QuantConfig) and quantize not in get_args(Scheme):
        raise ConfigError(fault("quantize", quantize, f"{one_of(get_args(Scheme), quantize)}, or a QuantConfig"))
    config = QuantConfig(quantize, rest=True) if isinstance(quantize, str) else quantize  # type: ignore[arg-type]
    if config.dtype == "int4" and mesh.platform() == "tpu":
        raise ConfigError(
            "quantize: found 'int4'; expected 'int8' on a TPU, where int4 kernels are copied to float32 before each "
            "product, at eight times the cost of int8"
        )
    return config


def for_training(scheme: Literal["int8", "int4"] | None) -> QuantConfig | None:
    """The configuration for training adapters: the decoder's kernels, which they stand beside."""
    return None if scheme is None else QuantConfig(scheme)


def is_scale(path: str) -> bool:
    """Whether a leaf's path is that of the scale of a quantised kernel or embedding."""
    return path.endswith((f".kernel{_SCALE}", f".embedding{_SCALE}"))


def scale_path(path: str) -> str:
    """The path of the scale of a kernel or embedding at this path."""
    return f"{path}{_SCALE}"


def bits_of(dtype: np.dtype) -> int:
    """Return the bits of an element: two of int4 share a byte on accelerators, on a CPU each has its own.

    >>> bits_of(jnp.dtype("int4")), bits_of(jnp.dtype("bfloat16"))
    (4, 16)
    """
    return int(jnp.iinfo(dtype).bits) if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def kernel_path(path: str) -> str:
    """The path of the kernel or embedding of a scale at this path."""
    return path.removesuffix(_SCALE)


def is_quantized(model: Glm4v) -> bool:
    """Whether any kernel is quantised."""
    return any(linear.kernel_scale is not None for found in linears(model).values() for linear in found)


def quantize_model(model: Glm4v, config: QuantConfig) -> Glm4v:
    """The model with quantised kernels; new modules, and the arrays of all other leaves.

    The model stays in memory beside its quantised kernels; `load.load_model` quantises kernel by kernel as it reads.

    Args:
      model: in the current mesh, without an adapter, layers in either layout; abstract inside `jax.eval_shape`.
      config: which kernels, and how.

    Raises:
      ConfigError: the pattern fits no linear layer, there is an adapter or a quantised kernel, or groups do not divide
        by the mesh.
    """
    result = copy_without_lora(model)
    for linear, own in chosen(result, config):
        leading = linear.leading
        reorder(linear, 0)
        kernel, scale = quantize_kernel(linear.kernel[...], linear.in_axes, linear.out_axes, own)
        linear.kernel, linear.kernel_scale = nnx.Param(kernel), nnx.Param(scale)
        reorder(linear, leading)
    if config.rest and result.lm_head is not None:
        embed = result.language_model.embed_tokens
        embed.dtype = jnp.dtype(embed.embedding.dtype)
        table, scale = quantize_embedding(embed.embedding[...])
        embed.embedding, embed.embedding_scale = nnx.Param(table), nnx.Param(scale)
    return result


def chosen(model: Glm4v, config: QuantConfig) -> list[tuple[Linear, QuantConfig]]:
    """The linear layers to quantise, and how each is, after a check that all of them can be.

    Raises:
      ConfigError: see `quantize_model`.
    """
    if is_quantized(model):
        raise ConfigError("quantize: found a model that is quantised already; expected one in floats")
    found = matching_linears(model, config.target, "quantize.target")
    for path, (linear, *_) in found.items():
        size, axis = sizes(linear)[0][-1], linear.in_axes[-1]
        group, count = group_size(size, config.group), 1 if axis is None else mesh.shards(axis)
        if config.dtype == "int4" and size // group % count:
            raise ConfigError(
                f"quantize.group: found groups of {group} of {path}'s {size} inputs, which {count} devices share; "
                f"expected a divisor of {size // count}, or int8, which has no groups"
            )
    others = {path: same for path, same in linears(model).items() if config.rest and path not in found}
    schemes = [(found, config), (others, QuantConfig("int8"))]
    return [(linear, own) for paths, own in schemes for same in paths.values() for linear in same]


def with_integers(
    model: Glm4v, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], config: QuantConfig
) -> Glm4v:
    """The model with the kernels in integers that a checkpoint has as such; abstract, inside `jax.eval_shape`.

    Args:
      model: in the current mesh, kernels inputs first; those that are quantised otherwise are replaced.
      shapes: path of a kernel, without the layout and the number of the layer, -> its shape and that of its scale.
      config: dtype of the integers.

    Raises:
      ConfigError: groups do not divide by the mesh.
    """
    result = copy_without_lora(model)
    for path, found in linears(result).items():
        if f"{path}.kernel" not in shapes:
            continue
        shape, scale_shape = shapes[f"{path}.kernel"]
        axes = scale_axes(found[0], len(scale_shape))
        with naming(path, ConfigError):
            mesh.check_divides(scale_shape, axes)
        for linear in found:
            layers = linear.kernel.shape[: -len(shape)]
            names: Axes = (None,) * len(layers)
            spec = mesh.spec(*names, *linear.in_axes, *linear.out_axes)
            values = jnp.zeros((*layers, *shape), jnp.int8, out_sharding=spec)
            scale = jnp.zeros((*layers, *scale_shape), jnp.float32, out_sharding=mesh.spec(*names, *axes))
            kernel, scale = quantized_leaves(values, scale, len(layers) + len(linear.in_axes) - 1, config)
            linear.kernel, linear.kernel_scale = nnx.Param(kernel), nnx.Param(scale)
    return result


def scale_axes(linear: Linear, dimensions: int) -> Axes:
    """Logical axes of a scale with this many dimensions: of each channel, or of groups along the last input."""
    return linear.out_axes if dimensions == len(linear.out_axes) else (*linear.in_axes, *linear.out_axes)


def group_size(size: int, most: int) -> int:
    """The largest divisor of `size` up to `most`: the same on every mesh, so that the numbers are."""
    return next(group for group in range(min(size, most), 0, -1) if size % group == 0)


@functools.partial(jax.jit, static_argnames=("in_axes", "out_axes", "config"))
def quantize_kernel(kernel: Array, in_axes: Axes, out_axes: Axes, config: QuantConfig) -> tuple[Array, Array]:
    """Integers and scales of a kernel.

    Args:
      kernel: floats [*inputs, *outputs], or the layers' [L, *inputs, *outputs].
      in_axes, out_axes: logical axes of its dimensions.
      config: dtype and group.

    Returns:
      int8 or int4 in the shape and partition of the kernel; float32 scales [*outputs], for int4
      [*inputs but the last, G, *outputs], after L if the kernel has it. Scales of zeros alone are 1; where
      values are not finite they are NaN.
    """
    layers = (None,) * (kernel.ndim - len(in_axes) - len(out_axes))
    first, last = len(layers), len(layers) + len(in_axes) - 1
    axes: Sequence[str | None] = (*layers, *in_axes, *out_axes)
    values = kernel.astype(jnp.float32)
    over: tuple[int, ...] = tuple(range(first, last + 1))
    scale_axes: Sequence[str | None] = (*layers, *out_axes)
    if config.dtype == "int4":
        group = group_size(kernel.shape[last], config.group)
        shape = (*kernel.shape[:last], -1, group, *kernel.shape[last + 1 :])
        values = values.reshape(shape, out_sharding=mesh.spec(*axes[: last + 1], None, *axes[last + 1 :]))
        over, scale_axes = (last + 1,), axes
    scale = _scales(values, over, config.dtype)
    # Not clipped: the largest over its scale is the largest integer up to float32's rounding.
    integers = jnp.round(values / scale).astype(jnp.int8)
    integers = integers.reshape(kernel.shape, out_sharding=mesh.spec(*axes))
    return quantized_leaves(integers, mesh.reshard(jnp.squeeze(scale, over), *scale_axes), last, config)


def quantized_leaves(values: Array, scale: Array, axis: int, config: QuantConfig) -> tuple[Array, Array]:
    """The two leaves of a quantised kernel, from integers that were rounded here or elsewhere.

    Args:
      values: int8 in the shape and partition of the kernel, -8 to 7 for int4.
      scale: float32 of each output channel; or of each group of inputs, with as many dimensions as the kernel.
      axis: the kernel's last input dimension.
      config: the dtype.
    """
    if config.dtype != "int4":
        return values, scale
    if is_packed(values.shape[axis] // scale.shape[axis]):
        return pack_int4(values, axis, mesh.spec_of(values)), scale
    return values.astype(jnp.int4), scale


def is_packed(group: int) -> bool:
    """Whether int4 in groups of this size is kept in pairs: on a CPU, which would keep a byte for each integer."""
    return group % 2 == 0 and mesh.platform() == "cpu"


@jax.jit
def quantize_embedding(table: Float[Array, "V D"]) -> tuple[Int[Array, "V D"], Float[Array, " V"]]:
    """Integers of an embedding, and the scale of each token; as `quantize_kernel` with int8."""
    values = table.astype(jnp.float32)
    scale = _scales(values, (1,), "int8")
    return jnp.round(values / scale).astype(jnp.int8), mesh.reshard(jnp.squeeze(scale, 1), "vocab")


def quantize_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise floats [O, I] on the host: int8 [O, I] and float32 scales [O], bit for bit those of `quantize_kernel`.

    >>> integers, scales = quantize_rows(np.array([[1, -2.54], [0, 0]], np.float32))
    >>> integers.tolist(), scales.round(3).tolist()
    ([[50, -127], [0, 0]], [0.019999999552965164, 1.0])
    """
    integers, scales = np.empty(values.shape, np.int8), np.empty((len(values), 1), np.float32)
    step = max(1, _TILE // max(1, values.shape[1]))
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        if values.dtype == jnp.bfloat16:  # the upper half of float32; ten times as fast as `astype`
            floats = np.left_shift(values[rows].view(np.uint16), 16, dtype=np.uint32).view(np.float32)
        else:
            floats = values[rows].astype(np.float32)
        with np.errstate(all="ignore"):
            largest = np.abs(floats).max(1, keepdims=True, initial=0)
            # XLA multiplies by reciprocals where a divisor is shared.
            scale = np.where(largest == 0, np.float32(1), largest * np.float32(1 / _LARGEST["int8"]))
            scale[~np.isfinite(largest)] = np.nan
            floats *= np.float32(1) / scale
            integers[rows], scales[rows] = np.rint(floats, out=floats), scale
    return integers, scales[:, 0]


def _scales(values: Float[Array, "..."], over: tuple[int, ...], dtype: str) -> Float[Array, "..."]:
    # XLA's maximum on a CPU ignores NaN.
    magnitudes = jnp.where(jnp.isfinite(values), jnp.abs(values), jnp.inf)
    largest = jnp.max(magnitudes, axis=over, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / _LARGEST[dtype])
    return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def check_finite(scales: Mapping[str, Array], where: str) -> None:
    """Raise a CheckpointError, which names `where`, unless all kernels were finite before they were quantised.

    `scales`: path of a scale -> its values.
    """
    found = _are_finite(dict(scales))
    if wrong := [kernel_path(path) for path, is_finite in found.items() if not np.asarray(is_finite)]:
        raise CheckpointError(f"{where}: {wrong[0]}: found numbers that are not finite; expected finite ones")


@jax.jit
def _are_finite(scales: dict[str, Array]) -> dict[str, Array]:
    return {path: jnp.all(jnp.isfinite(scale)) for path, scale in scales.items()}
