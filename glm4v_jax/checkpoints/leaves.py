"""The weights of a model as leaves, read when their turn comes: from a checkpoint, or from a live model.

Paths are those of a model that keeps its layers one by one: "language_model.layers.0.mlp.gate_up.kernel".
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, TensorInfo
from glm4v_jax.checkpoints.strided_copy import copy_in_squares
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.errors import CheckpointError
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import in_order
from glm4v_jax.model.lora import is_lora
from glm4v_jax.model.params import kernels, leaf_paths
from glm4v_jax.model.quantize import is_scale

# Where an array starts at a multiple of this, JAX on a CPU takes its memory over instead of copying it.
_ALIGNMENT = 64

# A leaf above this is copied from its file in chunks, and the pages of each chunk are given back.
_LARGE_BYTES = 256 << 20
_CHUNK_BYTES = 64 << 20

Slices = tuple[slice, ...]


class Leaves(Protocol):
    """All leaves in a checkpoint, none of them read yet."""

    infos: Mapping[str, TensorInfo]

    def read(self, path: str, index: Slices) -> np.ndarray:
        """Return a slice of a leaf; possibly a view in any order, of memory that others may change."""
        ...

    def release(self) -> None:
        """Give back memory that reading has taken; what has been read stays valid."""
        ...


class TensorLeaves:
    """The tensors of a checkpoint in Hugging Face layout, as leaves, in the order of their files.

    Raises:
      CheckpointError: tensors do not fit the configuration; all of them are listed.
    """

    def __init__(self, files: CheckpointFiles, config: Glm4vConfig):
        self._files = files
        self._sizes = hf_mapping.dimensions(config)
        matched = hf_mapping.match(config, files, str(files.directory))
        # Path -> tensors of the leaf, by name.
        self._tensors: dict[str, dict[str, hf_mapping.LeafPart]] = {}
        for name in files:
            if name in matched:  # and not a copy of a tied head
                self._tensors.setdefault(matched[name].path, {})[name] = matched[name]
        shapes = hf_mapping.leaf_shapes(config)
        self.infos: Mapping[str, TensorInfo] = {
            path: TensorInfo(shapes[path], self._dtype(tensors)) for path, tensors in self._tensors.items()
        }

    def _dtype(self, tensors: Mapping[str, Any]) -> np.dtype:
        dtype, *others = {self._files[name].dtype for name in tensors}
        return np.dtype(np.float32) if others else dtype  # float32 holds either half precision exactly

    def read(self, path: str, index: Slices) -> np.ndarray:
        """Return a slice of a leaf: a view of the mapped file, except where a leaf is fused of several tensors."""
        tensors = self._tensors[path]
        fused = next(iter(tensors.values())).rule.part
        if fused is None:
            (name,) = tensors
            return self._in_layout(name, tensors[name])[index]
        axis, info = fused[0], self.infos[path]
        out = np.empty(
            [len(range(*i.indices(length))) for i, length in zip(index, info.shape, strict=True)], info.dtype
        )
        wanted = range(*index[axis].indices(info.shape[axis]))
        for name, part in tensors.items():
            number = part.rule.index[-1]
            if number in wanted:
                place = (*part.rule.index[:-1], wanted.index(number))
                copy_in_squares(out[place], self._in_layout(name, part)[(*index[:axis], *index[axis + 1 :])])
        return out

    def release(self) -> None:
        """Give back the pages of the files that have been read."""
        self._files.release()

    def _in_layout(self, name: str, part: hf_mapping.LeafPart) -> np.ndarray:
        return part.rule.to_leaf(self._files.read(name), self._sizes)


class ModelLeaves:
    """The leaves of a live model, its layers and kernels in any layout, for a checkpoint: kernels inputs first.

    Raises:
      CheckpointError: some are of an adapter or quantised, which a checkpoint cannot hold.
    """

    def __init__(self, model: Glm4v):
        self._leaves = dict(zip(leaf_paths(model), jax.tree.leaves(model), strict=True))
        if adapters := [path for path in self._leaves if is_lora(path)]:
            raise CheckpointError(
                f"{adapters[0]}: found {len(adapters)} leaves of an adapter; expected none: merge it first "
                "(lora.merge_lora), or save it by itself (adapter.save_adapter)"
            )
        if scales := [path for path in self._leaves if is_scale(path)]:
            raise CheckpointError(
                f"{scales[0]}: found {len(scales)} quantised kernels; expected floats: save the original model"
            )
        self.infos: Mapping[str, TensorInfo] = {
            path: TensorInfo(shape, self._find(path)[0].dtype)
            for path, shape in hf_mapping.leaf_shapes(model.config).items()
        }
        self._kernels = kernels(model)

    def array(self, path: str) -> Array:
        """Return a leaf on its devices, a copy where it is a layer of a stacked one or in another order."""
        leaf, layer = self._find(path)
        linear = self._kernels.get(hf_mapping.layerless_path(path))
        with use_mesh(leaf.sharding.mesh):
            if layer is not None:
                leaf = _take(leaf, np.int32(layer))
            return leaf if linear is None else in_order(leaf, linear, linear.leading, 0)

    def _find(self, path: str) -> tuple[Any, int | None]:
        """The leaf, and the layer in it if it is stacked."""
        if path in self._leaves:
            return self._leaves[path], None
        stacked, layer = hf_mapping.stacked_path(path)
        return self._leaves[stacked], layer


@jax.jit
def _take(leaf: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)


def array_of(
    leaves: Leaves,
    path: str,
    spec: PartitionSpec,
    dtype: np.dtype[Any],
    *,
    count: Callable[[int], None] | None = None,
) -> Array:
    """Put a leaf of a checkpoint on the devices of the current mesh; each process reads what its own devices hold.

    Args:
      leaves: of the checkpoint.
      path: of the leaf.
      spec: its sharding.
      dtype: that it gets.
      count: called with the number of bytes read, for each slice.
    """
    info = leaves.infos[path]
    read: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def slice_of(index: Slices) -> np.ndarray:
        index = (*index, *(slice(None),) * (len(info.shape) - len(index)))
        key = tuple(entry.indices(length) for entry, length in zip(index, info.shape, strict=True))
        if key not in read:  # or devices that hold the same would read it again
            values = leaves.read(path, index)
            if count is not None:
                count(values.size * info.dtype.itemsize)
            read[key] = _ready(values, dtype, leaves.release)
        return read[key]

    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(info.shape, sharding, slice_of, dtype=dtype)


def _ready(values: np.ndarray, dtype: np.dtype[Any], release: Callable[[], None]) -> np.ndarray:
    """Copy values if JAX would else keep the memory of a file, which others may change."""
    if values.nbytes > _LARGE_BYTES and not values.flags.writeable:
        return _own(values, dtype, release)
    if values.dtype != dtype:
        return values.astype(dtype)  # in the same order, which is fast
    if values.flags.c_contiguous and not values.flags.writeable:
        return _own(values, dtype, release)
    return values  # new, or in an order that JAX does not have, and changes faster than NumPy can


def _own(values: np.ndarray, dtype: np.dtype[Any], release: Callable[[], None]) -> np.ndarray:
    """Copy values into order in chunks, aligned so that JAX need not copy them again: memory holds them once."""
    buffer = np.empty(values.size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    copy = buffer[start : start + values.size * dtype.itemsize].view(dtype).reshape(values.shape)
    if values.nbytes <= _LARGE_BYTES:
        copy[...] = values
        return copy
    slowest = max(range(values.ndim), key=lambda axis: values.strides[axis])
    rows = max(1, _CHUNK_BYTES // abs(values.strides[slowest]))
    for first in range(0, values.shape[slowest], rows):
        chunk = (*(slice(None),) * slowest, slice(first, first + rows))
        copy_in_squares(copy[chunk], values[chunk])
        release()
    return copy


def in_groups(infos: Mapping[str, TensorInfo], nbytes: int) -> Iterator[list[str]]:
    """Group paths, in order, into `nbytes` each, after single larger leaves: those come while memory is free."""

    def turn(item: tuple[str, TensorInfo]) -> int:
        info = item[1]
        if info.nbytes <= nbytes:
            return 2
        # Orbax cuts a leaf along its longest axis. Only if that is the first are the chunks written without a copy;
        # else they are copied in small blocks, which the allocator then keeps: a whole leaf's worth of memory.
        return int(np.argmax(info.shape) != 0)

    group: list[str] = []
    filled = 0
    for path, info in sorted(infos.items(), key=turn):
        if group and filled + info.nbytes > nbytes:
            yield group
            group, filled = [], 0
        group.append(path)
        filled += info.nbytes
    if group:
        yield group
