"""Batches in lanes, and their sharding: rows over the data axes of the mesh, each process with its own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm4v_jax.batch import Batch, VisionRows
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh as axes
from glm4v_jax.errors import ConfigError
from train.config import BatchConfig
from train.data.packing import Packer, TrainBatch, pack
from train.data.samples import Sample


def num_lanes(batch: BatchConfig) -> int:
    """Return into how many lanes a batch is divided: `batch.lanes`, by default as many as its rows allow."""
    return batch.lanes or math.gcd(batch.rows, batch.vision_rows)


def check_batch(batch: BatchConfig, mesh: Mesh) -> None:
    """Raise a ConfigError if a mesh cannot divide the rows of a batch."""
    shards = math.prod(mesh.shape[name] for name in axes.names_of(axes.current_rules()["batch"]))
    for name, rows in (("batch.rows", batch.rows), ("batch.vision_rows", batch.vision_rows)):
        if rows % shards:
            raise ConfigError(f"{name}: found {rows}; expected a multiple of {shards}, the data shards of the mesh")


def lanes_here(batch: BatchConfig, mesh: Mesh) -> list[int]:
    """Return the lanes of which this process's devices hold rows."""
    count = num_lanes(batch)
    sharding = NamedSharding(mesh, axes.spec("batch"))
    held = set()
    for (rows,) in sharding.addressable_devices_indices_map((batch.rows,)).values():
        start, stop, _ = rows.indices(batch.rows)
        held |= set(range(start * count // batch.rows, -(-stop * count // batch.rows)))
    return sorted(held)


def packer_of(batch: BatchConfig, lanes: int = 1) -> Packer:
    """Return the packer of one of `lanes` lanes."""
    # Without packing the first batch that is open takes every sample until it is full.
    return Packer(**lane_shape(batch, lanes), open_batches=batch.open_batches if batch.pack else 1)


def packed(samples: Sequence[Sample], batch: BatchConfig, config: Glm4vConfig, lanes: int = 1) -> TrainBatch:
    """Return one lane's part of a batch, of samples that `packer_of` has put together; DataError if they do not fit."""
    return pack(samples, **lane_shape(batch, lanes), config=config, average=batch.average)


def lane_shape(batch: BatchConfig, lanes: int) -> dict[str, Any]:
    """Arguments of `pack` for one lane's part of a batch."""
    vision = batch.vision_shape
    return {
        "rows": batch.rows // lanes,
        "length": batch.length,
        "vision_shape": None if vision is None else (vision[0] // lanes, vision[1]),
        "per_row": batch.per_row,
    }


def joined(parts: Mapping[int, TrainBatch], count: int, merged_tokens: int) -> TrainBatch:
    """Join the lanes of this process to a batch on the host; the rows of other lanes are never read, nor take memory.

    `parts`: lane -> its batch, of B / count rows. Indices of a lane are shifted by the `merged_tokens` of each before.
    """
    shifted = [_shifted(part, lane * merged_tokens) for lane, part in parts.items()]

    def join(partition: PartitionSpec, *arrays: np.ndarray) -> np.ndarray:
        return _placed(dict(zip(parts, arrays, strict=True)), count, _rows_axis(partition))

    return jax.tree.map(join, _partition(shifted[0]), *shifted, is_leaf=_is_partition)


def stacked(batches: Sequence[TrainBatch]) -> TrainBatch:
    """Stack micro-batches along a new first dimension."""
    if len(batches) == 1:
        return jax.tree.map(lambda x: x[None], batches[0])  # a view, where `np.stack` would copy every image
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)


def put(batch: TrainBatch, mesh: Mesh) -> TrainBatch:
    """Put a step's micro-batches on the devices; every process calls this with its rows, or with all of them."""

    def place(partition: PartitionSpec, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, partition), array.__getitem__)

    return jax.tree.map(place, _partition(batch), batch, is_leaf=_is_partition)


def abstract(batch: TrainBatch, mesh: Mesh) -> TrainBatch:
    """Return the abstract arrays that `put` gives for arrays of these shapes."""

    def place(partition: PartitionSpec, array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, partition))

    return jax.tree.map(place, _partition(batch), batch, is_leaf=_is_partition)


def _partition(batch: TrainBatch) -> Any:
    """Partitions of a step's arrays, first by micro-batch: [N, B, T], [N, R, L], positions [N, 3, B, T]."""
    rows, vision_rows = axes.spec(None, "batch"), axes.spec(None, "rows")
    has_vision = batch.batch.vision is not None
    vision = VisionRows(*[vision_rows] * 5) if has_vision else None
    vision_index = rows if has_vision else None
    reference, advantages = (None if array is None else rows for array in (batch.reference, batch.advantages))
    tokens = Batch(rows, rows, axes.spec(None, None, "batch"), vision_index, vision)
    return TrainBatch(tokens, rows, rows, reference, advantages)


def _is_partition(node: object) -> bool:
    return isinstance(node, PartitionSpec)


def _rows_axis(partition: PartitionSpec) -> int:
    """Of an array without micro-batches."""
    return len(partition) - 2


def _shifted(part: TrainBatch, by: int) -> TrainBatch:
    index = part.batch.vision_index
    if index is None or not by:
        return part
    return part._replace(batch=part.batch._replace(vision_index=np.where(index >= 0, index + np.int32(by), index)))


def _placed(arrays: Mapping[int, np.ndarray], count: int, axis: int) -> np.ndarray:
    if count == 1:
        return arrays[0]
    first = next(iter(arrays.values()))
    rows = first.shape[axis]
    shape = (*first.shape[:axis], rows * count, *first.shape[axis + 1 :])
    joined = np.empty(shape, first.dtype)
    for lane, array in arrays.items():
        joined[(*(slice(None),) * axis, slice(lane * rows, (lane + 1) * rows))] = array
    return joined
