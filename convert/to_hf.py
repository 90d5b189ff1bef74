"""Either format -> Hugging Face safetensors in shards, tensor by tensor."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.casts import cast_pieces
from convert.source import Reader, check_tensors, metadata_of, open_weights, shards_of
from convert.summary import Summary
from glm4v_jax.checkpoints import hf_shards
from glm4v_jax.checkpoints.atomic_directory import check_space, check_target, new_directory
from glm4v_jax.checkpoints.load import resolve_dtype
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.files import asset_files, assets_directory, copy_assets, say_dtype

AS_BEFORE = "original"
"""For `max_shard_size`: the shards that the tensors were in when they were safetensors."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, to be written as `dtype`; read when its turn comes."""

    files: Reader
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def pieces(self) -> Iterator[np.ndarray]:
        """The tensor, cast (round to nearest even) and put in order by pieces; see `cast_pieces`."""
        yield from cast_pieces(self.files.read(self.name), self.dtype, self.name)
        self.files.release()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.ascontiguousarray(self.files.read(self.name), self.dtype)


def to_hf(
    source: str | Path,
    target: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    dtype: Any = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write a checkpoint of either format in Hugging Face layout, as transformers 4.57 would.

    Tensors keep the names, and unless `dtype` says otherwise the dtypes and bits, that they had in safetensors. What
    stands beside the weights is copied. The directory appears under its name when it is complete; until then it is
    `.NAME.unfinished`, which a later run replaces. Host memory holds a tensor and a piece of it.

    Args:
      source: a directory with safetensors, or an Orbax checkpoint of `to-orbax`.
      target: the directory to make.
      max_shard_size: of a file's tensors, as "5GB" (5 × 10^9), "200MiB" or a number of bytes; or "original".
      dtype: float32, bfloat16 or float16 to cast to.
      overwrite: replace what is at `target`.
      dry_run: check everything and write nothing.
      progress: called with bytes written and bytes in all.

    Raises:
      CheckpointError: the source is damaged or incomplete, `dtype` cannot hold its numbers, the target is taken, or
        the disk is full.
      ConfigError: the configuration is not a GLM-4.1V's, or max_shard_size is no size.
    """
    started = time.perf_counter()
    source, target = Path(source), Path(target)
    config = Glm4vConfig.from_pretrained(source)
    files = open_weights(source)
    check_tensors(files, config)
    check_target(source, target, overwrite=overwrite, dry_run=dry_run)
    cast = None if dtype is None else resolve_dtype(dtype)
    tensors = {name: Tensor(files, name, info.shape, cast or info.dtype) for name, info in files.items()}
    sizes = {name: math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in tensors.items()}
    plan = shards_of(files) if max_shard_size == AS_BEFORE else hf_shards.plan_shards(sizes, max_shard_size)
    total = sum(sizes.values())
    beside = assets_directory(source)
    check_space(target, total + sum((beside / path).stat().st_size for path in asset_files(source)))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    if not dry_run:
        with new_directory(target, overwrite=overwrite) as directory:
            hf_shards.write_shards(directory, tensors, plan, metadata=metadata_of(files), progress=advance)
            copy_assets(source, directory)
            if cast is not None:
                say_dtype(directory / "config.json", cast.name)
    read = 0 if dry_run else sum(info.nbytes for info in files.values())
    return Summary(source, target, len(tensors), total, read, len(plan), time.perf_counter() - started, dry_run)
