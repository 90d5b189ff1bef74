"""The weights of a model as leaves, read when their turn comes: from a checkpoint, or from a live model.

Paths are those of a model that keeps its layers one by one: "language_model.layers.0.mlp.gate_up.kernel".
"""

import functools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.compressed_tensors import (
    QuantizedWeight,
    ScaleLayout,
    check_ignored,
    match,
    stored_leaves,
    write_signed,
)
from glm4v_jax.checkpoints.mapped_file import PART_BYTES
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, TensorInfo
from glm4v_jax.checkpoints.strided_copy import convert, copy
from glm4v_jax.config.checks import raise_faults
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import StoredQuantization, ignored_layers, stored_quantization
from glm4v_jax.errors import CheckpointError
from glm4v_jax.inputs.media.threads import map_threads
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import in_order
from glm4v_jax.model.lora import is_lora
from glm4v_jax.model.params import kernels, leaf_paths
from glm4v_jax.model.quantize import is_scale, kernel_path, quantize_rows, scale_path

# So much of a leaf is copied from its file at a time, by each thread.
_PIECE_BYTES = PART_BYTES

# Stacked leaves of up to this size are read whole. Larger ones are filled layer by layer, by two programs for each
# shape, which together take 0.06 s to compile.
_WHOLE_BYTES = 16 << 20

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

    def has_pairs(self, path: str) -> bool:
        """Whether `fill` has integers of 4 bits in pairs: a byte for two along the last input, as `pack_int4` makes."""
        ...

    def fill(self, out: np.ndarray, path: str, index: Slices) -> None:
        """Write a slice of a leaf into an array, as its dtype; uint8 is for pairs, of which `index` then counts."""
        ...

    def release(self) -> None:
        """Give back memory that reading has taken; what has been read stays valid."""
        ...

    def bypass_cache(self) -> None:
        """Read past the system's page cache from now on, where that can be done."""
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

    def has_pairs(self, path: str) -> bool:
        """Whether all tensors of a leaf are packed, and nothing is to be subtracted."""
        return all(name in self._quantized and self._quantized[name].has_pairs for name in self._tensors[path])

    def fill(self, out: np.ndarray, path: str, index: Slices) -> None:
        """Write a slice of a leaf into an array, as its dtype; each part of a fused one is a tensor."""
        if is_scale(path):
            out[...] = self._scales(path)[index]
            return
        shape = self.infos[path].shape if path in self.infos else self.extras[path].shape
        for name, part in self._tensors[path].items():
            own, of_tensor = out, index
            if part.rule.part is not None:
                axis, number = part.rule.part
                wanted = range(*index[axis].indices(shape[axis]))
                if number not in wanted:
                    continue
                own = out[(*part.rule.index[:-1], wanted.index(number))]
                of_tensor = (*index[:axis], *index[axis + 1 :])
            if out.dtype == np.uint8:
                last = part.rule.axes()[0][1][-1]  # of the inputs
                leaf = part.rule.to_leaf(self._quantized[name].pairs(), {**self._sizes, last: self._sizes[last] // 2})
            else:
                leaf = part.rule.to_leaf(self._weight(name), self._sizes)
            self._copy(own, leaf[of_tensor])

    def fill_int8(self, out: np.ndarray, scale: np.ndarray, path: str, inputs: Sequence[int]) -> None:
        """Write a leaf of floats as int8, and its scales, which the axes `inputs` share: those of `quantize_kernel`."""
        for name, part in self._tensors[path].items():
            index = part.rule.index
            own, own_scale = out[index], np.expand_dims(scale, tuple(inputs))[index]
            view = part.rule.to_leaf(self._files.read(name), self._sizes)
            outputs = [axis for axis in range(view.ndim) if axis not in inputs]
            map_threads(functools.partial(self._quantize, own, own_scale, view, outputs), _pieces(view, outputs))

    def _quantize(
        self, out: np.ndarray, scale: np.ndarray, view: np.ndarray, outputs: Sequence[int], piece: Slices
    ) -> None:
        order = [*outputs, *(axis for axis in range(view.ndim) if axis not in outputs)]
        with self._files.fetched(view[piece]) as values:
            rows = values.transpose(order)
            count = math.prod(rows.shape[: len(outputs)])
            integers, scales = quantize_rows(rows.reshape(count, -1))
        copy(out[piece], integers.reshape(rows.shape).transpose(np.argsort(order)))
        scale[piece] = scales.reshape([size if axis in outputs else 1 for axis, size in enumerate(values.shape)])

    def release(self) -> None:
        """Give back the pages of the files that have been read."""
        self._kept.last = None
        self._files.release()

    def bypass_cache(self) -> None:
        """Read past the page cache; see `MappedFile.bypass_cache`."""
        self._files.bypass_cache()

    def _copy(self, out: np.ndarray, view: np.ndarray) -> None:
        """Copy a view of a file, or integers that were unpacked, piece by piece in threads."""
        write = write_signed if (view.dtype, out.dtype) == (np.uint8, np.int8) else convert
        errors = np.geterr()

        def one(piece: Slices) -> None:
            part = view[piece]
            with np.errstate(**errors), self._files.fetched(part) as values:  # type: ignore[arg-type]
                copy(out[piece], values, write)
                if values is part:
                    self._files.release()

        map_threads(one, _pieces(view))

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


def _pieces(view: np.ndarray, axes: Sequence[int] | None = None) -> Iterator[Slices]:
    """Cut a view along `axes`, or any: slices of `_PIECE_BYTES` at most, the bytes of each as near as can be."""
    axes = range(view.ndim) if axes is None else axes
    axis = max(axes, key=lambda axis: (view.shape[axis] > 1, abs(view.strides[axis])), default=None)
    if axis is None or view.nbytes <= _PIECE_BYTES or view.shape[axis] == 1:
        yield (slice(None),) * view.ndim
        return
    rows = max(1, _PIECE_BYTES * view.shape[axis] // view.nbytes)
    for first in range(0, view.shape[axis], rows):
        part = slice(first, first + rows)
        for within in _pieces(view[(*(slice(None),) * axis, part)], axes):
            yield (*within[:axis], part, *within[axis + 1 :])


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


def read_order(infos: Mapping[str, TensorInfo], stacked: bool) -> list[list[str]]:
    """Return the paths of leaves in the order to read them: each alone, or all layers of a small stacked leaf together.

    Large ones come first: what they take besides, while they are made, is gone when the others have filled the memory.
    Integers stay alone; a scale comes with its kernel, and is not in the list.
    """
    leaves: dict[str, dict[int, str]] = {}
    for path in infos:
        if not is_scale(path):
            target, layer = hf_mapping.stacked_path(path) if stacked else (path, None)
            leaves.setdefault(target, {})[layer or 0] = path
    found: list[list[str]] = []
    for layers in leaves.values():
        paths = [layers[layer] for layer in sorted(layers)]
        is_large = sum(infos[path].nbytes for path in paths) > _WHOLE_BYTES
        differ = len({infos[path].dtype for path in paths}) > 1 or any(scale_path(path) in infos for path in paths)
        found += [[path] for path in paths] if is_large or differ else [paths]
    return sorted(found, key=lambda paths: -sum(infos[path].nbytes for path in paths))


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
