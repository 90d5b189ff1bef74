"""The building blocks: linear layers, norms, embedding, gated MLP; the only place where a parameter is created.

One declaration gives a parameter its shape, its logical axes, its initialiser and its dtype; `jax.eval_shape` of a
constructor therefore yields the abstract, sharded tree that checkpoints are read into.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from glm4v_jax.devices import mesh
from glm4v_jax.errors import ConfigError
from glm4v_jax.model import cpu_matmul

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


def activation(name: str, x: Array) -> Array:
    """Apply the activation that `hidden_act` names ("gelu" is the exact one, with erf)."""
    if name == "gelu":
        return jax.nn.gelu(x, approximate=False)
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act: found {name!r}; expected one of gelu, {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name](x)


def precision(dtype: DTypeLike) -> jax.lax.Precision:
    """Float32 means float32 on every platform: GPU and TPU would otherwise multiply with 10 or 8 bits of mantissa."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


@dataclasses.dataclass
class Init:
    """How a constructor makes parameters: source of random numbers (None for zeros), standard deviation, and dtype."""

    rngs: nnx.Rngs | None
    stddev: float = 0.02
    dtype: DTypeLike = jnp.float32

    def normal(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        """Make a normally distributed parameter, sharded by its logical axes."""
        if self.rngs is None:
            return self.constant(0, shape, axes)
        mesh.check_divides(shape, axes)
        value = self.stddev * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        return nnx.Param(mesh.reshard(value.astype(self.dtype), *axes))

    def constant(self, value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        """Make a constant parameter."""
        mesh.check_divides(shape, axes)
        return nnx.Param(mesh.reshard(jnp.full(shape, value, self.dtype), *axes))


Length = str | tuple[str, ...] | EllipsisType | None
"""Mesh axes that tokens are sharded over; `...` leaves them as they are."""


def gather_tokens(x: Float[Array, "B T *rest"]) -> Float[Array, "B T *rest"]:
    """Gather tokens that are sharded over the tensor axis: each device gets all tokens of its rows."""
    rows, _, *rest = mesh.spec_of(x)
    return jax.sharding.reshard(x, jax.P(rows, None, *rest))


def dequantized(
    kernel: Int[Array, "..."], scale: Float[Array, "..."], inputs: int, dtype: DTypeLike, leading: int = 0
) -> Array:
    """Dequantise a kernel: multiply in float32, round to `dtype` once.

    Args:
      kernel: int8 or int4 [*inputs, *outputs] of one layer, the latter packed if it is uint8; see `cpu_matmul`.
      scale: float32 [*outputs]; or [*inputs but the last, G, *outputs], of G groups of equal size along the last input.
      inputs: how many dimensions are inputs.
      dtype: of the result, in the kernel's shape.
      leading: how many outputs stand before the inputs, in the kernel and in the scale of groups (`Linear`).
    """
    last, spec = leading + inputs - 1, mesh.spec_of(kernel)
    if kernel.dtype == jnp.uint8:
        kernel = cpu_matmul.unpack_int4(kernel, last, spec)
    values, end = kernel.astype(jnp.float32), last + 1
    if scale.ndim < kernel.ndim:
        return (values * jnp.expand_dims(scale, range(leading, end))).astype(dtype)
    groups = (*kernel.shape[:last], scale.shape[last], -1, *kernel.shape[end:])
    values = values.reshape(groups, out_sharding=jax.P(*spec[:end], None, *spec[end:]))
    values = values * jnp.expand_dims(scale, end)
    return values.reshape(kernel.shape, out_sharding=spec).astype(dtype)


def subscripts(inputs: int, outputs: int, leading: int = 0) -> tuple[str, str, str]:
    """Letters for `einsum` of the inputs, the outputs and the kernel.

    >>> subscripts(1, 2), subscripts(1, 2, leading=1)
    (('i', 'mn', 'imn'), ('i', 'mn', 'min'))
    """
    ins, outs = "ijkl"[:inputs], "mnop"[:outputs]
    return ins, outs, outs[:leading] + ins + outs[leading:]


def is_one_row(x: Num[Array, "B T ..."]) -> bool:
    """Whether each device of a TPU multiplies a single row.

    The compiler makes no matrix product of that, but a sum on the vector unit, which wants the kernel in another layout
    (a copy of it in every call) and takes 2 to 3.7 times the cycles of eight rows by its own count.
    """
    # A row of several that are sharded along T stays what it is: the seven others would be appended elsewhere.
    is_short = x.shape[1] == 1
    return is_short and mesh.platform() == "tpu" and jax.typeof(x).sharding.shard_shape(x.shape)[0] == 1


def as_eight(x: Num[Array, "B 1 ..."]) -> Num[Array, "B 8 ..."]:
    """Append seven tokens of zeros, behind a barrier, or the compiler would see through it."""
    return jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (0, 7), *((0, 0),) * (x.ndim - 2))))


class Linear(nnx.Module):
    """`x @ kernel + bias` over the last dimensions, with named input and output axes.

    `inputs` and `outputs` map a logical axis to its size: `{"embed": 4096}` -> `{"kv_heads": 2, "q_groups": 16,
    "head_dim": 128}`. The kernel has one dimension for each, so that heads are never reshaped across devices.

    The kernel is [*inputs, *outputs], as in checkpoints; for a TPU the first `leading` outputs stand before the inputs
    (`kernel_order`).

    A quantised kernel (`quantize.quantize_model`) is int8 or int4 and has a float32 `kernel_scale`; see `dequantized`.
    On a CPU it is multiplied as `cpu_matmul` does, and so is one in bfloat16.

    With an adapter (`lora.add_lora`), `lora_scale * (x @ lora_a) @ lora_b` is added: `lora_a` is [*inputs, R], `lora_b`
    [R, *outputs], in the partitions of the kernel's dimensions. With a `lora_magnitude` [*outputs] each output of that
    sum is then scaled, so that its column of the kernel has this norm (DoRA, arXiv 2402.09353).
    """

    def __init__(
        self,
        inputs: Mapping[str | None, int],
        outputs: Mapping[str | None, int],
        init: Init,
        *,
        bias: bool = False,
    ):
        self.in_axes, self.out_axes = tuple(inputs), tuple(outputs)
        self.kernel = init.normal((*inputs.values(), *outputs.values()), (*inputs, *outputs))
        self.bias = init.constant(0.0, tuple(outputs.values()), self.out_axes) if bias else None
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_magnitude: nnx.Param | None = nnx.data(None)
        self.lora_gain: nnx.Param | None = nnx.data(None)  # magnitude by norm, where neither changes any more
        self.lora_key: nnx.Param | None = nnx.data(None)  # of dropout, in training alone
        self.lora_scale = self.lora_dropout = 0.0
        self.leading = 0

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of the kernel's dimensions, in their order."""
        return (*self.out_axes[: self.leading], *self.in_axes, *self.out_axes[self.leading :])

    def __call__(self, x: Float[Array, "B T ..."], length: Length = ...) -> Float[Array, "B T ..."]:
        """Map [B, T, *inputs] to [B, T, *outputs]; the result's embedding axis is replicated, as activations are.

        Rows and tokens stay sharded as in `x`; `length` shards the tokens in another way.
        """
        if is_one_row(x):
            return self(as_eight(x), length)[:, :1]
        rows, own, *_ = mesh.spec_of(x)
        out = jax.P(rows, own if length is ... else length, *mesh.gathered(*self.out_axes))
        kernel = jax.sharding.reshard(self.kernel[...], mesh.gathered(*self.axes))
        scale = None if self.kernel_scale is None else self.kernel_scale[...]
        if scale is not None:
            axes = self.out_axes if scale.ndim < kernel.ndim else self.axes
            scale = jax.sharding.reshard(scale, mesh.gathered(*axes))
        if mesh.platform() == "cpu" and not self.leading and cpu_matmul.is_narrow(kernel):
            y = _narrow_product(x, kernel, scale, len(self.in_axes), out)
        elif scale is None:
            y = _product(x, kernel, None, len(self.in_axes), out, self.leading)
        else:
            # Or the backward pass would keep the dequantised kernels of all layers: the whole model in floats.
            product = jax.checkpoint(_product, static_argnums=(3, 4, 5))
            y = product(x, kernel, scale, len(self.in_axes), out, self.leading)
        gain = self.gain()
        if gain is not None:
            y = (y + self._lora(x, mesh.spec_of(y))) * gain.astype(y.dtype)
        if self.bias is not None:
            y = y + jax.sharding.reshard(self.bias[...], mesh.gathered(*self.out_axes))
        return y if self.lora_a is None or gain is not None else y + self._lora(x, mesh.spec_of(y))

    def gain(self) -> Float[Array, "..."] | None:
        """What the outputs of kernel and adapter are scaled by, float32 [*outputs]; None for an adapter without."""
        if self.lora_gain is not None:
            return jax.sharding.reshard(self.lora_gain[...], mesh.gathered(*self.out_axes))
        if self.lora_magnitude is None:
            return None
        magnitude = jax.sharding.reshard(self.lora_magnitude[...], mesh.gathered(*self.out_axes))
        return magnitude / jax.lax.stop_gradient(self.output_norms())

    def output_norms(self) -> Float[Array, "..."]:
        """Norm of each output's column of `kernel + lora_scale * lora_a @ lora_b`, float32 [*outputs].

        By the binomial theorem, which needs no sum as large as the kernel.
        """
        assert self.lora_a is not None and self.lora_b is not None
        kernel = jax.sharding.reshard(self.kernel[...], mesh.gathered(*self.axes))
        if self.kernel_scale is not None:
            axes = self.out_axes if self.kernel_scale.ndim < kernel.ndim else self.axes
            scale = jax.sharding.reshard(self.kernel_scale[...], mesh.gathered(*axes))
            kernel = dequantized(kernel, scale, len(self.in_axes), jnp.float32, self.leading)
        kernel = kernel.astype(jnp.float32)
        a = jax.sharding.reshard(self.lora_a[...], mesh.gathered(*self.in_axes, None))
        b = jax.sharding.reshard(self.lora_b[...], mesh.gathered(None, *self.out_axes))
        ins, outs, both = subscripts(len(self.in_axes), len(self.out_axes), self.leading)
        out = mesh.gathered(*self.out_axes)
        einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        squares = einsum(f"{both},{both}->{outs}", kernel, kernel, out_sharding=out)
        mixed = einsum(f"{both},{ins}r->r{outs}", kernel, a, out_sharding=jax.P(None, *out))
        gram = einsum(f"{ins}r,{ins}s->rs", a, a, out_sharding=jax.P(None, None))
        added = 2 * mixed + self.lora_scale * einsum(f"rs,s{outs}->r{outs}", gram, b, out_sharding=jax.P(None, *out))
        return jnp.sqrt(jnp.maximum(squares + self.lora_scale * jnp.sum(added * b, axis=0), 0.0))

    def _lora(self, x: Float[Array, "B T ..."], out: jax.sharding.PartitionSpec) -> Float[Array, "B T ..."]:
        """What the adapter adds, in the partition `out`; between its two products the rank is replicated."""
        assert self.lora_a is not None and self.lora_b is not None
        a = jax.sharding.reshard(self.lora_a[...], mesh.gathered(*self.in_axes, None)).astype(x.dtype)
        b = jax.sharding.reshard(self.lora_b[...], mesh.gathered(None, *self.out_axes)).astype(x.dtype)
        if self.lora_key is not None:
            x = dropped(x, self.lora_key[...], self.lora_dropout)
        ins, outs, _ = subscripts(len(self.in_axes), len(self.out_axes))
        exact = precision(x.dtype)
        low = jnp.einsum(f"bt{ins},{ins}r->btr", x, a, precision=exact, out_sharding=jax.P(*out[:2], None))
        return self.lora_scale * jnp.einsum(f"btr,r{outs}->bt{outs}", low, b, precision=exact, out_sharding=out)


def dropped(x: Float[Array, "..."], key: Array, rate: float) -> Float[Array, "..."]:
    """Set a fraction `rate` of the numbers to zero, and divide the others by 1 - rate."""
    bits = jax.random.bits(key, x.shape, jnp.uint32, out_sharding=mesh.spec_of(x))
    return jnp.where(bits >= np.uint32(rate * 2**32), x / (1 - rate), 0).astype(x.dtype)


def _product(
    x: Array, kernel: Array, scale: Array | None, inputs: int, out: jax.P, leading: int = 0
) -> Float[Array, "B T ..."]:
    """`x @ kernel` over as many inputs, in the partition `out`; quantised kernels are dequantised first."""
    if scale is not None:
        kernel = dequantized(kernel, scale, inputs, x.dtype, leading)
    ins, outs, both = subscripts(inputs, kernel.ndim - inputs, leading)
    return jnp.einsum(f"bt{ins},{both}->bt{outs}", x, kernel, precision=precision(x.dtype), out_sharding=out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _narrow_product(x: Array, kernel: Array, scale: Array | None, inputs: int, out: jax.P) -> Float[Array, "B T ..."]:
    """`_product` on a CPU, by `cpu_matmul`, on every device alone."""
    x_spec, kernel_spec = mesh.spec_of(x), mesh.spec_of(kernel)
    summed = tuple(name for entry in kernel_spec[:inputs] for name in mesh.names_of(entry))

    def local(x: Array, kernel: Array, scale: Array | None) -> Array:
        rows, outs = x.shape[:2], kernel.shape[inputs:]
        flat = kernel.reshape(math.prod(kernel.shape[:inputs]), -1)
        if scale is not None:
            scale = scale.reshape((math.prod(scale.shape[:inputs]), -1) if scale.ndim == kernel.ndim else -1)
        y = cpu_matmul.matmul(x.reshape(math.prod(rows), -1), flat, scale).reshape(*rows, *outs)
        return jax.lax.psum(y, summed) if summed else y

    # The kernel has the same axes in its inputs; rows and tokens stay where they are until the sum.
    specs = jax.P(*x_spec[:2], *kernel_spec[:inputs]), kernel_spec, None if scale is None else mesh.spec_of(scale)
    run = jax.shard_map(local, in_specs=specs, out_specs=jax.P(*x_spec[:2], *kernel_spec[inputs:]), check_vma=False)
    return jax.sharding.reshard(run(jax.sharding.reshard(x, specs[0]), kernel, scale).astype(x.dtype), out)


def _narrow_forward(x: Array, kernel: Array, scale: Array | None, inputs: int, out: jax.P) -> tuple[Array, Any]:
    return _narrow_product(x, kernel, scale, inputs, out), (x, kernel, scale)


def _narrow_backward(inputs: int, out: jax.P, saved: Any, gradient: Array) -> Any:
    return jax.vjp(lambda x, kernel, scale: _product(x, kernel, scale, inputs, out), *saved)[1](gradient)


_narrow_product.defvjp(_narrow_forward, _narrow_backward)


class RMSNorm(nnx.Module):
    """Root mean square norm: statistics in float32, cast back, then the scale (Glm4vRMSNorm; trap T4)."""

    def __init__(self, dim: int, eps: float, init: Init):
        self.eps = eps
        self.scale = init.constant(1.0, (dim,), (None,))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last dimension; the dtype stays."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...]


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, statistics in float32."""

    def __init__(self, dim: int, eps: float, init: Init):
        self.eps = eps
        self.scale = init.constant(1.0, (dim,), (None,))
        self.bias = init.constant(0.0, (dim,), (None,))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last dimension; the dtype stays."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Embed(nnx.Module):
    """Token embedding; `attend` uses the same table as an output head, unless it is quantised.

    A quantised table (`quantize.quantize_model`) is int8 and has a float32 `embedding_scale` for each row.
    """

    def __init__(self, vocab: int, dim: int, init: Init):
        self.embedding = init.normal((vocab, dim), ("vocab", "embed"))
        self.embedding_scale: nnx.Param | None = nnx.data(None)
        self.dtype: np.dtype | None = None  # of the result, where the table does not say

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up tokens."""
        ids = mesh.reshard(ids, "batch", "length")
        if self.embedding_scale is not None and is_one_row(ids):
            # A slice of one row wants the integers in another layout: a copy of the table for each token.
            return self(as_eight(ids))[:, :1]
        table = jax.sharding.reshard(self.embedding[...], mesh.gathered("vocab", "embed"))
        rows = table.at[ids].get(out_sharding=mesh.spec("batch", "length", None))
        if self.embedding_scale is None:
            return rows
        scale = self.embedding_scale[...].at[ids].get(out_sharding=mesh.spec("batch", "length"))
        return (rows.astype(jnp.float32) * scale[..., None]).astype(self.dtype)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Score the vocabulary: the tied head."""
        if is_one_row(x):
            return self.attend(as_eight(x))[:, :1]
        table = jax.sharding.reshard(self.embedding[...], mesh.gathered("vocab", "embed"))
        out = mesh.spec("batch", "length", "vocab")
        return jnp.einsum("btd,vd->btv", x, table, precision=precision(x.dtype), out_sharding=out)


_TILES = (1024, 768, 512)
"""Tokens of a tile on a CPU, the first that divides a row."""


def in_tiles(function: Callable[[Array], Array], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Apply a function of single tokens to many, on a CPU a tile of them at a time.

    What lies between the products of an MLP then stays in the processor's cache: those of 12,288 patches take 0.66 of
    the time, and an eighth of the memory.
    """
    rows, length, _ = x.shape
    tile = next((size for size in _TILES if length % size == 0), None)
    is_split = mesh.shards("batch") * mesh.shards("tokens") > 1
    if mesh.platform() != "cpu" or is_split or tile is None or rows * length < 2 * _TILES[0]:
        return function(x)
    spec = mesh.spec_of(x)
    tiles = x.reshape(-1, 1, tile, x.shape[-1], out_sharding=jax.P(None, *spec))
    return jax.lax.map(function, tiles).reshape(x.shape, out_sharding=spec)


class GatedMlp(nnx.Module):
    """`down(act(gate(x)) * up(x))`, gate and up as one kernel, [D, 2, F] or [2, D, F]."""

    def __init__(self, dim: int, hidden: int, act: str, init: Init, *, bias: bool = False):
        self.act = act
        self.gate_up = Linear({"embed": dim}, {None: 2, "mlp": hidden}, init, bias=bias)
        self.down = Linear({"mlp": hidden}, {"embed": dim}, init, bias=bias)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP; tokens stay sharded as in `x`."""
        return in_tiles(self._apply, x)

    def _apply(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        length = mesh.spec_of(x)[1]
        gate_up = self.gate_up(gather_tokens(x))
        return self.down(activation(self.act, gate_up[:, :, 0]) * gate_up[:, :, 1], length)
