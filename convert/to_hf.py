"""Convert either format to Hugging Face safetensors in shards, tensor by tensor."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.casts import cast_chunks
from convert.source import Summary, check_cast_of, shards_of
from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.atomic_directory import check_room, new_directory
from glm4v_jax.checkpoints.compressed_tensors import match, parameters_of
from glm4v_jax.checkpoints.hf_write import PYTORCH, plan_shards, total_bytes, write_shards
from glm4v_jax.checkpoints.load import resolve_dtype
from glm4v_jax.checkpoints.orbax_read import Weights, open_weights
from glm4v_jax.checkpoints.safetensors import LazyTensor
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import stored_quantization
from glm4v_jax.files import asset_bytes, copy_assets, set_dtype

AS_BEFORE = "original"
"""For `max_shard_size`: the shards that the tensors had when they were in safetensors."""


def cast_tensor(files: Weights, name: str, dtype: np.dtype[Any] | None = None) -> LazyTensor:
    """Return a tensor of a checkpoint, read when its turn comes, and cast if there is a `dtype`; see `cast_chunks`."""
    info = files[name]
    written = info.dtype if dtype is None else dtype

    def chunks() -> Iterator[np.ndarray]:
        yield from cast_chunks(files.read(name), written, name)
        files.release()

    return LazyTensor(info.shape, written, chunks)


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

    Tensors keep the names, and unless `dtype` says otherwise the dtypes and bits, that they had in safetensors. The
    files beside the weights are copied. The directory appears under its name when it is complete; until then it is
    `.NAME.unfinished`, which a later run replaces. Host memory holds a tensor and a chunk of it.

    Args:
      source: a directory with safetensors, or an Orbax checkpoint of `to-orbax`.
      target: the directory to make.
      max_shard_size: of a file's tensors, as "5GB" (5 × 10^9), "200MiB" or a number of bytes; or "original".
      dtype: float32, bfloat16 or float16 to cast to.
      overwrite: replace a checkpoint that is at `target`.
      dry_run: check everything and write nothing.
      progress: called with bytes written and bytes in all.

    Raises:
      CheckpointError: the source is damaged or incomplete, `dtype` cannot hold its numbers, the target is taken, or
        the disk is full.
      ConfigError: the configuration is not a GLM-4.1V's, or max_shard_size is not a size.
    """
    started = time.perf_counter()
    source, target = Path(source), Path(target)
    config = Glm4vConfig.from_pretrained(source)
    files = open_weights(source)
    stored = stored_quantization(source)
    matched, sizes = match(config, files, str(source), stored), hf_mapping.dimensions(config)
    check_cast_of(source, stored, dtype)
    cast = None if dtype is None else resolve_dtype(dtype)
    tensors = {name: cast_tensor(files, name, cast) for name in files}
    plan = shards_of(files) if max_shard_size == AS_BEFORE else plan_shards(tensors, max_shard_size)
    nbytes = total_bytes(tensors)
    check_room(source, target, nbytes + asset_bytes(source), overwrite=overwrite, dry_run=dry_run)
    if not dry_run:
        with new_directory(target, overwrite=overwrite) as directory:
            held = None if stored is None else sum(parameters_of(part.rule, sizes) for part in matched.values())
            write_shards(
                directory, tensors, plan, metadata=PYTORCH | files.metadata, parameters=held, progress=progress
            )
            copy_assets(source, directory)
            if cast is not None:
                set_dtype(directory / "config.json", cast.name)
    read = 0 if dry_run else sum(info.nbytes for info in files.values())
    return Summary(source, target, len(tensors), nbytes, read, len(plan), time.perf_counter() - started, dry_run)
