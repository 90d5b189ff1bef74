"""Put leaves of a checkpoint on devices, as the files have them or as integers."""

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from glm4v_jax.checkpoints.leaves import Leaves, Slices, TensorLeaves
from glm4v_jax.checkpoints.safetensors import TensorInfo

# Where an array starts at a multiple of this, JAX on a CPU takes its memory over instead of copying it.
_ALIGNMENT = 64

# From this size on memory comes in huge pages, where the system has them: on a virtual machine they took half the CPU
# time that small ones do. (Three times as much where pages of files filled the memory: see `MappedFile.bypass_cache`.)
_HUGE_BYTES = 4 << 20


def array_of(
    leaves: Leaves,
    path: str | Sequence[str],
    spec: PartitionSpec,
    dtype: np.dtype[Any],
    *,
    pairs_along: int | None = None,
    count: Callable[[int], None] | None = None,
) -> Array:
    """Put a leaf of a checkpoint on the devices of the current mesh; each process reads what its own devices hold.

    Args:
      leaves: of the checkpoint.
      path: of the leaf; or the paths of all layers' leaves, to get them stacked, [L, ...].
      spec: sharding of the leaf, or of each layer's.
      dtype: that it gets.
      pairs_along: the last input axis of a leaf that `Leaves.has_pairs`, to get uint8 of half its length.
      count: called with the number of bytes read, for each slice.
    """
    layers = None if isinstance(path, str) else path
    of_layer = path if isinstance(path, str) else path[0]
    info = leaves.infos.get(of_layer) or leaves.extras[of_layer]
    if pairs_along is not None:
        length = info.shape[pairs_along] // 2
        info = TensorInfo((*info.shape[:pairs_along], length, *info.shape[pairs_along + 1 :]), np.dtype(np.uint8))
        dtype = info.dtype
    shape = info.shape
    if layers is not None:
        shape, spec = (len(layers), *shape), PartitionSpec(None, *spec)
    read: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def slice_of(index: Slices) -> np.ndarray:
        index = (*index, *(slice(None),) * (len(shape) - len(index)))
        key = tuple(entry.indices(length) for entry, length in zip(index, shape, strict=True))
        if key not in read:  # or devices that hold the same would read it again
            read[key] = _aligned([len(range(*bounds)) for bounds in key], dtype)
            if layers is None:
                leaves.fill(read[key], of_layer, index)
            else:
                for layer, name in enumerate(layers):
                    leaves.fill(read[key][layer, ...], name, index[1:])
            if count is not None:
                count(read[key].size * info.dtype.itemsize)
        return read[key]

    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(shape, sharding, slice_of, dtype=dtype)


def int8_of(leaves: TensorLeaves, path: str, spec: PartitionSpec, inputs: Sequence[int]) -> tuple[Array, Array]:
    """Quantise a leaf of floats as it is read, in a mesh of one CPU device: what is in memory of it are the integers.

    `inputs` are its axes that share a scale. Returns int8 in its shape, and float32 scales [*outputs], as
    `quantize_kernel` and `quantize_embedding` make them.
    """
    shape = leaves.infos[path].shape
    outputs = [axis for axis in range(len(shape)) if axis not in inputs]
    integers = _aligned(shape, np.dtype(np.int8))
    scale = _aligned([shape[axis] for axis in outputs], np.dtype(np.float32))
    leaves.fill_int8(integers, scale, path, inputs)
    names = (*spec, *(None,) * len(shape))  # what a spec leaves out is not sharded
    of_scale = PartitionSpec(*(names[axis] for axis in outputs))

    def placed(values: np.ndarray, spec: PartitionSpec) -> Array:
        sharding = NamedSharding(jax.sharding.get_mesh(), spec)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values)

    return placed(integers, spec), placed(scale, of_scale)


def _aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """An array whose memory JAX on a CPU takes over, so that nothing is copied twice."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= _HUGE_BYTES and hasattr(mmap, "MAP_ANONYMOUS"):
        pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, dtype).reshape(shape)
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)
