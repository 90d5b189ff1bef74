"""Products with kernels narrower than float32 on a CPU: int8, packed int4 and bfloat16, a few rows at a time.

XLA converts a whole kernel to float32 before it multiplies, and takes the conversion out of the loop that decodes: the
model is then in memory in float32 as well. What follows are loops with an index, which cannot be taken out. Blocks of
rows are converted, in the processor's cache, and multiplied as matrices, on all cores. For one or two tokens eight rows
are converted, multiplied and added at a time, which the compiler makes a single pass over the kernel; it runs on one
core, and is faster than the blocks on two. Everything is accumulated in float32.

Arrays are local to a device: call these within `jax.shard_map`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

# Up to this many tokens the single pass is the faster one. Before 0.12, JAX does not vectorise its conversions.
FEW_TOKENS = 2 if jax.__version_info__ >= (0, 12) else 0
_ROWS = 8
_BLOCK_BYTES = 4 << 20  # of a converted block, which is to stay in the cache
_BLOCK_ROWS = 256  # where there are more sums than a block has


def is_narrow(kernel: Array) -> bool:
    """Whether a kernel is multiplied here rather than by XLA, on a CPU."""
    return kernel.dtype in (jnp.int8, jnp.uint8) or (kernel.dtype == jnp.bfloat16 and not is_copied(kernel))


def is_copied(kernel: Array) -> bool:
    """Whether programs for a CPU make a copy of a kernel in float32: of one in half precision, before JAX 0.12."""
    return kernel.dtype == jnp.float16 or (kernel.dtype == jnp.bfloat16 and FEW_TOKENS == 0)


def unpack_int4(packed: Array, axis: int, spec: PartitionSpec | None = None) -> Array:
    """Two int8 rows of -8 to 7 for each of bytes: their low four bits, and their high ones.

    >>> unpack_int4(pack_int4(jnp.arange(-2, 2), 0), 0).tolist()
    [-2, -1, 0, 1]

    Args:
      packed: uint8.
      axis: the dimension of the rows, counted from the front.
      spec: the partition of the array, and of the result, where that is not local.
    """
    pairs = jnp.stack([packed & 15, packed >> 4], axis + 1).astype(jnp.int8) - jnp.int8(8)
    return pairs.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :], out_sharding=spec)


def pack_int4(values: Array, axis: int, spec: PartitionSpec | None = None) -> Array:
    """Pack an even number of rows of -8 to 7 two to a byte; see `unpack_int4`."""
    shape = (*values.shape[:axis], -1, 2, *values.shape[axis + 1 :])
    split = None if spec is None else PartitionSpec(*spec[: axis + 1], None, *spec[axis + 1 :])
    pairs = (values.astype(jnp.int8) + jnp.int8(8)).astype(jnp.uint8).reshape(shape, out_sharding=split)
    low, high = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return low | (high << 4)


def matmul(x: Float[Array, "T K"], kernel: Array, scale: Array | None = None) -> Float[Array, "T N"]:
    """Multiply, in float32.

    Args:
      x: tokens, of any float dtype.
      kernel: int8 or floats [K, N]; or uint8 [K / 2, N], see `pack_int4`.
      scale: of integers: float32 [N], or [G, N] for G equal groups of rows.
    """
    x = x.astype(jnp.float32)
    product = _few_tokens if len(x) <= FEW_TOKENS else _many_tokens
    grouped = scale is not None and scale.ndim == kernel.ndim
    y = product(x, kernel, scale if grouped else None)
    return y if scale is None or grouped else y * scale


def _few_tokens(x: Float[Array, "T K"], kernel: Array, scale: Float[Array, "G N"] | None) -> Float[Array, "T N"]:
    group = x.shape[1] if scale is None else x.shape[1] // len(scale)
    # Of packed integers an even number, as a group has.
    packed = 2 if kernel.dtype == jnp.uint8 else 1
    rows = packed * _divisor(group // packed, _ROWS // packed)
    inputs = x.reshape(len(x), -1, rows).transpose(1, 2, 0)  # [K / rows, rows, T]

    def step(total: Array, i: Array) -> tuple[Array, None]:
        values = lax.dynamic_index_in_dim(inputs, i, keepdims=False)
        parts = [value[:, None] * weights for value, weights in zip(values, _rows(kernel, i, rows), strict=True)]
        while len(parts) > 1:  # as a tree, which takes half the time of a chain
            parts = [sum(parts[first : first + 2]) for first in range(0, len(parts), 2)]
        if scale is None:
            return total + parts[0], None
        return total + parts[0] * lax.dynamic_index_in_dim(scale, i * rows // group, keepdims=False), None

    return lax.scan(step, jnp.zeros((len(x), kernel.shape[1]), jnp.float32), jnp.arange(len(inputs)))[0]


def _rows(kernel: Array, i: Array, count: int) -> list[Float[Array, " N"]]:
    """Rows i * count up to (i + 1) * count, one by one."""
    if kernel.dtype != jnp.uint8:
        return list(lax.dynamic_slice_in_dim(kernel, i * count, count).astype(jnp.float32))
    pairs = ((row & 15, row >> 4) for row in lax.dynamic_slice_in_dim(kernel, i * (count // 2), count // 2))
    return [half.astype(jnp.float32) - 8 for pair in pairs for half in pair]


def _many_tokens(x: Float[Array, "T K"], kernel: Array, scale: Float[Array, "G N"] | None) -> Float[Array, "T N"]:
    groups = x.shape[1] if scale is None else len(scale)
    group = x.shape[1] // groups
    most = _BLOCK_ROWS
    if len(x) < _BLOCK_ROWS // 8:
        most = min(most, max(_ROWS, _BLOCK_BYTES // (4 * kernel.shape[1])))
    count = _divisor(groups, max(most // group, 1))
    rows = count * group
    stored = rows // 2 if kernel.dtype == jnp.uint8 else rows
    inputs = x.reshape(len(x), -1, rows).transpose(1, 0, 2)  # [K / rows, T, rows]

    def step(total: Array, i: Array) -> tuple[Array, None]:
        block = lax.dynamic_slice_in_dim(kernel, i * stored, stored)
        weights = (unpack_int4(block, 0) if kernel.dtype == jnp.uint8 else block).astype(jnp.float32)
        if scale is not None:
            factors = lax.dynamic_slice_in_dim(scale, i * count, count)
            weights = weights * jnp.repeat(factors, group, 0, total_repeat_length=rows)
        weights = lax.optimization_barrier(weights)  # or the conversion would be part of the product, which is slow
        values = lax.dynamic_index_in_dim(inputs, i, keepdims=False)
        return total + jnp.dot(values, weights, precision=lax.Precision.HIGHEST), None

    return lax.scan(step, jnp.zeros((len(x), kernel.shape[1]), jnp.float32), jnp.arange(len(inputs)))[0]


def _divisor(size: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return next(count for count in range(min(size, most), 0, -1) if size % count == 0)
