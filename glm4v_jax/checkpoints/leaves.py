"""A checkpoint as leaves of the model, whatever format it is in: what loading and converting read.

Paths are those of a model that keeps its layers one by one: "language_model.layers.0.mlp.gate_up.kernel".
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.safetensors import CheckpointFiles
from glm4v_jax.checkpoints.strided_copy import copy_in_squares
from glm4v_jax.config.model import Glm4vConfig

# Where an array starts at a multiple of this, JAX on a CPU takes its memory over instead of copying it.
_ALIGNMENT = 64

# A leaf above this is copied from its file by pieces, and what has been copied leaves the memory.
_LARGE_BYTES = 256 << 20
_PIECE_BYTES = 64 << 20

Slices = tuple[slice, ...]


class LeafInfo(NamedTuple):
    """What a checkpoint says about a leaf; `tensors` is how many of its tensors are in it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int
    tensors: int


class Leaves(Protocol):
    """All leaves of a model, none of them read yet."""

    infos: Mapping[str, LeafInfo]

    def read(self, path: str, index: Slices) -> np.ndarray:
        """A slice of a leaf; possibly a view that is in no order, of memory that others may change."""
        ...

    def release(self) -> None:
        """Give back memory that reading has taken; what has been read stays valid."""
        ...


class TensorLeaves:
    """The tensors of a checkpoint in Hugging Face layout, as leaves, in the order of their files.

    Raises:
      CheckpointError: tensors are missing, unexpected, doubled, misshapen or of a wrong dtype; one error lists all.
    """

    def __init__(self, files: CheckpointFiles, config: Glm4vConfig):
        self._files = files
        self._sizes = hf_mapping.dimensions(config)
        shapes = {name: info.shape for name, info in files.items()}
        dtypes = {name: info.dtype for name, info in files.items()}
        places = {name: info.file.name for name, info in files.items()}
        sources = hf_mapping.match(config, shapes, str(files.directory), dtypes, places)
        place = {name: i for i, name in enumerate(files)}
        self._parts: dict[str, list[hf_mapping.Source]] = {}
        for source in sorted(sources, key=lambda source: place[source.tensor]):
            self._parts.setdefault(source.rule.path(source.layer), []).append(source)
        self.infos: Mapping[str, LeafInfo] = {path: self._info(parts) for path, parts in self._parts.items()}

    def _info(self, parts: list[hf_mapping.Source]) -> LeafInfo:
        shape = parts[0].rule.leaf_shape(self._sizes)
        if parts[0].rule.part is not None:
            axis, _ = parts[0].rule.part
            shape = (*shape[:axis], len(parts), *shape[axis:])
        infos = [self._files[part.tensor] for part in parts]
        dtype = infos[0].dtype
        if any(info.dtype != dtype for info in infos):
            dtype = np.dtype(np.float32)  # holds either half exactly
        return LeafInfo(shape, dtype, int(np.prod(shape)) * dtype.itemsize, len(parts))

    def read(self, path: str, index: Slices) -> np.ndarray:
        """A slice of a leaf: a view of the mapped file, except where a leaf is made of parts."""
        parts = self._parts[path]
        if parts[0].rule.part is None:
            return self._tensor(parts[0])[index]
        axis, _ = parts[0].rule.part
        info = self.infos[path]
        shape = [len(range(*entry.indices(length))) for entry, length in zip(index, info.shape, strict=True)]
        out = np.empty(shape, info.dtype)
        rest = (*index[:axis], *index[axis + 1 :])
        for part in parts:
            assert part.rule.part is not None
            wanted = range(*index[axis].indices(len(parts)))
            if (number := part.rule.part[1]) in wanted:
                place: tuple[Any, ...] = (*(slice(None),) * axis, wanted.index(number))
                copy_in_squares(out[place], self._tensor(part)[rest])
        return out

    def release(self) -> None:
        """Give back the pages of the files that have been read."""
        self._files.release()

    def _tensor(self, source: hf_mapping.Source) -> np.ndarray:
        return source.rule.to_leaf(self._files.read(source.tensor), self._sizes)


def array_of(
    leaves: Leaves,
    path: str,
    spec: PartitionSpec,
    dtype: np.dtype[Any],
    *,
    count: Callable[[int], None] | None = None,
) -> Array:
    """A leaf on the devices of the current mesh; of it this process reads what its own devices hold, once.

    Args:
      leaves: where it is.
      path: of the leaf.
      spec: how it is split.
      dtype: what it is to be.
      count: called with the number of bytes read, for each slice.
    """
    info = leaves.infos[path]
    read: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def slice_of(index: Slices) -> np.ndarray:
        index = (*index, *(slice(None),) * (len(info.shape) - len(index)))
        key = tuple(entry.indices(length) for entry, length in zip(index, info.shape, strict=True))
        if key not in read:  # devices that hold the same do not read it again
            values = leaves.read(path, index)
            if count is not None:
                count(values.size * info.dtype.itemsize)
            read[key] = _ready(values, dtype, leaves.release)
        return read[key]

    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(info.shape, sharding, slice_of, dtype=dtype)


def _ready(values: np.ndarray, dtype: np.dtype[Any], release: Callable[[], None]) -> np.ndarray:
    """Values that JAX may take over, or has to copy: it must not keep the memory of a file, which others may change."""
    if values.nbytes > _LARGE_BYTES and not values.flags.writeable:
        return _own(values, dtype, release)
    if values.dtype != dtype:
        return values.astype(dtype)  # in the same order, which is fast
    if values.flags.c_contiguous and not values.flags.writeable:
        return _own(values, dtype, release)
    return values  # new, or in an order that JAX does not have, and changes faster than NumPy can


def _own(values: np.ndarray, dtype: np.dtype[Any], release: Callable[[], None]) -> np.ndarray:
    """A copy in order which JAX need not copy again, made by pieces, so that no two whole ones are in memory."""
    buffer = np.empty(values.size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    copy = buffer[start : start + values.size * dtype.itemsize].view(dtype).reshape(values.shape)
    if values.nbytes <= _LARGE_BYTES:
        copy[...] = values
        return copy
    slowest = max(range(values.ndim), key=lambda axis: values.strides[axis])
    rows = max(1, _PIECE_BYTES // abs(values.strides[slowest]))
    for first in range(0, values.shape[slowest], rows):
        piece = (*(slice(None),) * slowest, slice(first, first + rows))
        copy_in_squares(copy[piece], values[piece])
        release()
    return copy


def in_groups(infos: Mapping[str, LeafInfo], nbytes: int) -> Iterator[list[str]]:
    """Paths in groups of `nbytes`, in order, after single larger leaves: those come while little else is in memory."""

    def turn(item: tuple[str, LeafInfo]) -> int:
        info = item[1]
        if info.nbytes <= nbytes:
            return 2
        # Orbax cuts a leaf along its longest axis. Only if that is the first are the chunks written from where they
        # are; else they are copied in small blocks, which the allocator then keeps: a whole leaf's worth of memory.
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
