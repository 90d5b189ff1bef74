"""Merge an adapter into a checkpoint: a checkpoint in Hugging Face layout with the adapter in its weights.

From file to file, tensor by tensor on the host: no device holds the model, and memory two tensors of it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.adapter_files import Pair, read_adapter
from glm4v_jax.checkpoints.hf_write import plan_shards, write_shards
from glm4v_jax.checkpoints.load import resolve_dtype
from glm4v_jax.checkpoints.orbax_read import Weights, leaves_of, open_weights
from glm4v_jax.checkpoints.safetensors import LazyTensor, in_chunks
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import copy_assets, set_dtype


def merged_tensors(base: str | Path, adapter: str | Path, dtype: Any = None) -> dict[str, LazyTensor]:
    """Return every tensor of the merged checkpoint, by the name that it has in the base.

    Args:
      base: the checkpoint, in either format, that the adapter was trained with; if that was quantised, its original.
      adapter: a directory of `adapter.save_adapter`, or of PEFT.
      dtype: float32, bfloat16 or float16, of all tensors; each keeps its own by default.

    Raises:
      CheckpointError: one of the two is damaged, or they do not fit.
    """
    config = Glm4vConfig.from_pretrained(base)
    files = open_weights(base)
    if (stored := leaves_of(files, config).stored) is not None:  # and checks every tensor
        raise CheckpointError(
            f"{base}: found quantised weights ({stored}); expected floats: merge the adapter into the checkpoint that "
            "they were made from"
        )
    pairs, _, saved = read_adapter(adapter, config)
    cast = None if dtype is None else resolve_dtype(dtype)
    tensors = {
        name: _tensor(files, name, cast, pairs.pop(canonical, None), saved.pop(canonical, None))
        for name, canonical in ((name, hf_mapping.canonical(name)) for name in files)
    }
    if pairs or saved:
        raise CheckpointError(
            f"{adapter}: {next(iter(pairs | saved))}: found an adapter for it; expected {base} to have it"
        )
    return tensors


def extra_tensors(base: str | Path, config: Glm4vConfig) -> dict[str, LazyTensor]:
    """Return the tensors of a checkpoint that belong to extra layers, which no model has (`hf_mapping`)."""
    files = open_weights(base)
    return {name: _tensor(files, name) for name in files if hf_mapping.is_extra(config, hf_mapping.canonical(name))}


def _tensor(
    files: Weights,
    name: str,
    dtype: np.dtype[Any] | None = None,
    pair: Pair | None = None,
    saved: np.ndarray | None = None,
) -> LazyTensor:
    """A tensor of a checkpoint, plus what an adapter adds to it, or that of the adapter; read when its turn comes."""
    info = files[name]
    written = info.dtype if dtype is None else dtype

    def chunks() -> Iterator[np.ndarray]:
        tensor = files.read(name) if saved is None else saved
        if pair is not None:
            tensor = pair.added_to(tensor.astype(np.float32))  # and rounded once
        yield from in_chunks(tensor.astype(written, copy=False))
        files.release()

    return LazyTensor(info.shape, written, chunks)


def write_merged(
    base: str | Path,
    tensors: Mapping[str, LazyTensor],
    directory: Path,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a merged checkpoint into an empty directory, with the files that the base has beside its weights.

    ConfigError if `max_shard_size` is not a size, such as "5GB"; OSError if the disk refuses.
    """
    write_shards(directory, tensors, plan_shards(tensors, max_shard_size))
    copy_assets(base, directory)
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
    if len(dtypes) == 1 and dtypes != {info.dtype.name for info in open_weights(base).values()}:
        set_dtype(directory / "config.json", dtypes.pop())
