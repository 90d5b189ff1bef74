"""Checkpoints in Hugging Face layout, written: sizes of shards, names of files, their index. NumPy only.

Names, order and index are those that transformers 4.57 writes (`split_state_dict_into_shards_factory` of
huggingface_hub 0.36), so that what it would have made of the same tensors is what comes out here.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from glm4v_jax.checkpoints.safetensors import ArraySource, write_safetensors
from glm4v_jax.errors import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PYTORCH = {"format": "pt"}
"""What transformers writes into the metadata of its files, and wants to find there."""

_UNITS = {unit: 1000**power for power, unit in enumerate(("KB", "MB", "GB", "TB"), 1)}
_UNITS |= {unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), 1)}

Plan = Mapping[str, Sequence[str]]
"""File name -> names of the tensors in it."""


def parse_size(size: int | str) -> int:
    """Bytes of "5GB" (5 × 10^9), "200MiB" (200 × 2^20), or of a plain number.

    Raises:
      ConfigError: it is no size, or not a positive one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", str(size).upper())
    count = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2], 1))
    if count < 1:
        raise ConfigError(f"max_shard_size: found {size!r}; expected a size such as 5GB, 200MiB or 1000000")
    return count


def shard_name(number: int, count: int) -> str:
    """The file name of shard `number` (from 0) of `count`."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def plan_shards(sizes: Mapping[str, int], max_shard_size: int | str = "5GB") -> dict[str, list[str]]:
    """Distribute tensors over files as transformers does: in order, a new file where the next would not fit.

    Args:
      sizes: name -> bytes.
      max_shard_size: of a file's tensors; a larger tensor gets a file of its own.
    """
    limit = parse_size(max_shard_size)
    shards: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if size > limit:
            shards.append([name])
            continue
        if filled + size > limit:
            shards.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    if current or not shards:
        shards.append(current)
    return {shard_name(i, len(shards)): shard for i, shard in enumerate(shards)}


def nbytes(tensors: Mapping[str, ArraySource]) -> int:
    """Bytes of all tensors together."""
    return sum(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize for tensor in tensors.values())


def write_shards(
    directory: Path,
    tensors: Mapping[str, ArraySource],
    plan: Plan,
    *,
    metadata: Mapping[str, str] = PYTORCH,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the files of a plan, and last their index if the plan has several.

    Args:
      directory: exists.
      tensors: name -> what to write; each is asked for its values once, when its turn comes.
      plan: see `plan_shards`.
      metadata: of every file.
      progress: called with the number of bytes just written.

    Raises:
      CheckpointError: a tensor's dtype, name or values cannot be stored.
      OSError: the disk refuses.
    """
    for file, names in plan.items():
        write_safetensors(directory / file, {name: tensors[name] for name in names}, metadata, progress)
    if list(plan) != [SINGLE]:
        parameters = sum(math.prod(tensors[name].shape) for names in plan.values() for name in names)
        index = {
            "metadata": {"total_parameters": parameters, "total_size": nbytes(tensors)},
            "weight_map": {name: file for file, names in plan.items() for name in names},
        }
        text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        aside = directory / f".{INDEX}.partial"
        aside.write_text(text, encoding="utf-8")
        aside.replace(directory / INDEX)
