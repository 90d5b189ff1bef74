"""The weights of a model as leaves, read when their turn comes: from a checkpoint, or from a live model.

Paths are those of a model that keeps its layers one by one: "language_model.layers.0.mlp.gate_up.kernel".
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.compressed_tensors import (
    QuantizedWeight,
    ScaleLayout,
    check_ignored,
    match,
    signed,
    stored_leaves,
)
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, TensorInfo
from glm4v_jax.checkpoints.strided_copy import copy_in_squares
from glm4v_jax.config.checks import raise_faults
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import StoredQuantization, ignored_layers, stored_quantization
from glm4v_jax.errors import CheckpointError
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import in_order
from glm4v_jax.model.lora import is_lora
from glm4v_jax.model.params import kernels, leaf_paths
from glm4v_jax.model.quantize import is_scale, kernel_path, scale_path

# Where an array starts at a multiple of this, JAX on a CPU takes its memory over instead of copying it.
_ALIGNMENT = 64

# A leaf above this is copied from its file in chunks, and the pages of each chunk are given back.
_LARGE_BYTES = 256 << 20
_CHUNK_BYTES = 64 << 20

Slices = tuple[slice, ...]


class Leaves(Protocol):
    """All leaves in a checkpoint, none of them read yet.

    Attributes:
      infos: path -> shape and dtype; a quantised kernel of either width is read as int8.
      extras: those of tensors of extra layers, which no model has (`hf_mapping.EXTRA`).
      stored: the scheme of the kernels that have a scale; None if none has.
    """

    infos: Mapping[str, TensorInfo]
    extras: Mapping[str, TensorInfo]
    stored: StoredQuantization | None

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
      ConfigError: weights are quantised in a way that is not read here, or does not fit them.
    """

    def __init__(self, files: CheckpointFiles, config: Glm4vConfig):
        self._files = files
        self._sizes = hf_mapping.dimensions(config)
        self.stored = stored_quantization(files.directory)
        matched = match(config, files, str(files.directory), self.stored)
        # Path -> weights of the leaf, by name.
        self._tensors: dict[str, dict[str, hf_mapping.LeafPart]] = {}
        self._quantized: dict[str, QuantizedWeight] = {}
        for name in files:
            if (part := matched.get(name)) is None:  # a copy of a tied head, or of an extra layer
                continue
            if part.rule.suffix and self.stored is not None:
                name = name.removesuffix(f".{part.rule.suffix}")
                shape = part.rule.tensor_shape(self._sizes)
                self._quantized[name] = QuantizedWeight(files, name, shape, self.stored)
            self._tensors.setdefault(part.path, {})[name] = part
        if self.stored is not None:
            quantized = map(hf_mapping.canonical, self._quantized)
            check_ignored(config, ignored_layers(files.directory), set(quantized), str(files.directory))
        faults = [fault for weight in self._quantized.values() for fault in weight.faults()]
        raise_faults(faults, CheckpointError, where=str(files.directory))
        self.infos: Mapping[str, TensorInfo] = self._infos(config)
        self.extras: Mapping[str, TensorInfo] = {}
        for name, info in files.items():
            if hf_mapping.is_extra(config, hf_mapping.canonical(name)):
                part = hf_mapping.extra_part(name, len(info.shape))
                self._tensors[part.path] = {name: part}
                self.extras[part.path] = TensorInfo(info.shape, info.dtype)
        self._kept = threading.local()  # threads read ahead, each another leaf

    def _infos(self, config: Glm4vConfig) -> dict[str, TensorInfo]:
        shapes, infos = hf_mapping.leaf_shapes(config), dict[str, TensorInfo]()
        kernels = [path for path, tensors in self._tensors.items() if not self._quantized.keys().isdisjoint(tensors)]
        quantized = {} if self.stored is None else stored_leaves(config, self.stored, kernels)
        for path, tensors in self._tensors.items():
            if path in quantized:
                infos |= {leaf: quantized[leaf] for leaf in (path, scale_path(path))}
            else:
                infos[path] = TensorInfo(shapes[path], self._dtype(tensors))
        return infos

    def _dtype(self, tensors: Mapping[str, Any]) -> np.dtype:
        dtype, *others = {self._files[name].dtype for name in tensors}
        return np.dtype(np.float32) if others else dtype  # float32 holds either half precision exactly

    def read(self, path: str, index: Slices) -> np.ndarray:
        """Return a slice of a leaf: a view of the mapped file, except of quantised and of fused leaves."""
        if is_scale(path):
            return self._scales(path)[index]
        tensors = self._tensors[path]
        fused = next(iter(tensors.values())).rule.part
        if fused is None:
            (name,) = tensors
            return signed(self._in_layout(name, tensors[name])[index])
        axis, info = fused[0], self.infos[path]
        views = {name: self._in_layout(name, part) for name, part in tensors.items()}
        dtypes = {view.dtype for view in views.values()}
        out = np.empty(
            [len(range(*i.indices(length))) for i, length in zip(index, info.shape, strict=True)],
            dtypes.pop() if len(dtypes) == 1 else info.dtype,
        )
        wanted = range(*index[axis].indices(info.shape[axis]))
        for name, part in tensors.items():
            number = part.rule.index[-1]
            if number in wanted:
                place = (*part.rule.index[:-1], wanted.index(number))
                copy_in_squares(out[place], views[name][(*index[:axis], *index[axis + 1 :])])
        return signed(out)

    def release(self) -> None:
        """Give back the pages of the files that have been read."""
        self._kept.last = None
        self._files.release()

    def _in_layout(self, name: str, part: hf_mapping.LeafPart) -> np.ndarray:
        return part.rule.to_leaf(self._weight(name), self._sizes)

    def _weight(self, name: str) -> np.ndarray:
        """A tensor, or its integers: those of 4 bits are kept, as slices of a leaf come one after another."""
        if (weight := self._quantized.get(name)) is None:
            return self._files.read(name)
        last: tuple[str, np.ndarray] | None = getattr(self._kept, "last", None)
        if last is None or last[0] != name:
            self._kept.last = last = name, weight.values()
        return last[1]

    def _scales(self, path: str) -> np.ndarray:
        """The whole leaf, which is small."""
        assert self.stored is not None
        leaf = np.empty(self.infos[path].shape, np.float32)
        for name, part in self._tensors[kernel_path(path)].items():
            ScaleLayout.of(part.rule, self.stored, self._sizes).fill(leaf, self._quantized[name].scale())
        return leaf


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
        with jax.set_mesh(leaf.sharding.mesh):
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
    info = leaves.infos.get(path) or leaves.extras[path]
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
