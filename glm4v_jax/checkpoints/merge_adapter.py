"""A checkpoint and an adapter for it -> a checkpoint in Hugging Face layout with the adapter in its weights.

From file to file, tensor by tensor on the host: no device holds the model, and memory two tensors of it.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm4v_jax.checkpoints import hf_mapping, hf_shards
from glm4v_jax.checkpoints.adapter import Pair, read_adapter
from glm4v_jax.checkpoints.load import resolve_dtype
from glm4v_jax.checkpoints.orbax_read import OrbaxCheckpoint, leaves_of, open_weights
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, in_pieces
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import copy_assets, say_dtype


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """A tensor of a checkpoint, with what an adapter adds to it; read when its turn comes."""

    files: CheckpointFiles | OrbaxCheckpoint
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pair: Pair | None

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        tensor = self.files.read(self.name)
        if self.pair is not None:
            tensor = self.pair.added_to(tensor.astype(np.float32))
        return tensor.astype(self.dtype, copy=False)

    def pieces(self) -> Iterator[np.ndarray]:
        """The tensor, put in order by pieces."""
        yield from in_pieces(self.__array__())
        self.files.release()


def merged_tensors(base: str | Path, adapter: str | Path, dtype: Any = None) -> dict[str, MergedTensor]:
    """Name, as the base has it, -> every tensor of the merged checkpoint.

    Sums are made in float32 and rounded to the nearest once.

    Args:
      base: a checkpoint in either format, that which the adapter was trained beside or, if that was quantised, made of.
      adapter: a directory of `adapter.save_adapter`, or of PEFT.
      dtype: float32, bfloat16 or float16, of all tensors; each keeps its own by default.

    Raises:
      CheckpointError: one of the two is damaged, or they do not fit.
    """
    config = Glm4vConfig.from_pretrained(base)
    files = open_weights(base)
    leaves_of(files, config)  # checks every tensor
    pairs = read_adapter(adapter, config)
    cast = None if dtype is None else resolve_dtype(dtype)
    tensors = {
        name: MergedTensor(files, name, info.shape, cast or info.dtype, pairs.pop(hf_mapping.canonical(name), None))
        for name, info in files.items()
    }
    if pairs:
        raise CheckpointError(f"{adapter}: {next(iter(pairs))}: found an adapter beside it; {base} has no such tensor")
    return tensors


def nbytes(tensors: dict[str, MergedTensor]) -> int:
    """Bytes of all tensors together."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())


def write_merged(
    base: str | Path,
    tensors: dict[str, MergedTensor],
    directory: Path,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a merged checkpoint, with all that the base has beside its weights.

    Args:
      base: see `merged_tensors`.
      tensors: see there.
      directory: exists, and is empty.
      max_shard_size: of one file, as "5GB", "200MiB" or a number of bytes.

    Raises:
      ConfigError: max_shard_size is no size.
      OSError: the disk refuses.
    """
    sizes = {name: math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in tensors.items()}
    hf_shards.write_shards(directory, tensors, hf_shards.plan_shards(sizes, max_shard_size))
    copy_assets(base, directory)
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
    if len(dtypes) == 1 and dtypes != {tensor.files[name].dtype.name for name, tensor in tensors.items()}:
        say_dtype(directory / "config.json", dtypes.pop())
