"""Checkpoints in Hugging Face layout, written: shards and their index, of any tensors or of a live model.

Names, order and index are those that transformers 4.57 writes, so that what it would have made of the same tensors is
what comes out here; transformers 4.57 and 5.x load it.
"""

import collections
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.leaves import ModelLeaves
from glm4v_jax.checkpoints.safetensors import LazyTensor, Tensor, in_chunks, write_safetensors, written_order
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.distributed import is_first, to_host
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.files import replacing, set_dtype
from glm4v_jax.model.glm4v import Glm4v

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
PYTORCH = {"format": "pt"}
"""What transformers writes into the metadata of its files, and wants to find there."""

_UNITS = {unit: 1000**power for power, unit in enumerate(("KB", "MB", "GB", "TB"), 1)}
_UNITS |= {unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), 1)}

Plan = Mapping[str, Sequence[str]]
"""File name -> names of the tensors in it."""

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_UNFINISHED = ".weights.partial"


def parse_size(size: int | str) -> int:
    """Parse a size in bytes.

    >>> parse_size("5GB"), parse_size("200MiB"), parse_size(1000)
    (5000000000, 209715200, 1000)

    Raises:
      ConfigError: it is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", str(size).upper())
    count = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2], 1))
    if count < 1:
        raise ConfigError(f"max_shard_size: found {size!r}; expected a size such as 5GB, 200MiB or 1000000")
    return count


def shard_name(number: int, count: int) -> str:
    """Return the file name of shard `number` (from 0) of `count`."""
    return _PATTERN.format(suffix="" if count == 1 else f"-{number + 1:05d}-of-{count:05d}")


def plan_shards(tensors: Mapping[str, Tensor], max_shard_size: int | str = "5GB") -> Plan:
    """Distribute tensors over files as transformers does: in order, a new file where the next would not fit.

    A tensor larger than `max_shard_size` gets a file of its own; ConfigError if that is not a size (`parse_size`).
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # 0.1 s, which loading a model need not take

    return split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=_PATTERN,
        max_shard_size=parse_size(max_shard_size),
    ).filename_to_tensors


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write_shards(
    directory: Path,
    tensors: Mapping[str, Tensor],
    plan: Plan,
    *,
    metadata: Mapping[str, str] = PYTORCH,
    parameters: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the files of a plan into a directory, and last their index if the plan has several.

    Args:
      tensors: name -> what to write; each is asked for its values once, when its turn comes.
      metadata: of every file.
      parameters: how many the tensors hold, for the index; by default one for each number.
      progress: called with the bytes written so far and in all.

    Raises:
      CheckpointError: a tensor's dtype, name or values cannot be stored.
      OSError: the disk refuses.
    """
    done, total = 0, total_bytes(tensors)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for file, names in plan.items():
        write_safetensors(directory / file, {name: tensors[name] for name in names}, metadata, advance)
    if list(plan) != [SINGLE]:
        if parameters is None:
            parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
        index = {
            "metadata": {"total_parameters": parameters, "total_size": total},
            "weight_map": {name: file for file, names in plan.items() for name in names},
        }
        with replacing(directory / INDEX) as aside:
            text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            aside.write_text(text, encoding="utf-8")


def tensor_shapes(config: Glm4vConfig) -> dict[str, tuple[int, ...]]:
    """Return name, as transformers writes it, -> shape of every tensor that a model's checkpoint has."""
    sizes = hf_mapping.dimensions(config)
    return {name: rule.tensor_shape(sizes) for name, (rule, _) in hf_mapping.tensor_rules(config).items()}


def tensors_of(model: Glm4v) -> dict[str, LazyTensor]:
    """Return the tensors, by name, of a model with its layers in either layout.

    A tensor comes from the devices when it is written, and then is the only one in host memory; all processes that hold
    the model must ask for its chunks.

    Raises:
      CheckpointError: see `ModelLeaves`.
    """
    leaves, sizes = ModelLeaves(model), hf_mapping.dimensions(model.config)

    def chunks(part: hf_mapping.LeafPart) -> Iterator[np.ndarray]:
        leaf = leaves.array(part.path)
        if part.rule.part is not None:
            leaf = leaf[part.rule.index]
        yield from in_chunks(part.rule.to_tensor(to_host(leaf), sizes))

    def tensor(part: hf_mapping.LeafPart) -> LazyTensor:
        shape, dtype = part.rule.tensor_shape(sizes), leaves.infos[part.path].dtype
        return LazyTensor(shape, dtype, functools.partial(chunks, part))

    return {name: tensor(part) for name, part in hf_mapping.tensor_rules(model.config).items()}


def save_pretrained(
    model: Glm4v,
    generation_config: GenerationConfig,
    directory: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    extras: Mapping[str, LazyTensor] | None = None,
) -> None:
    """Write weights, config.json and generation_config.json; see `Glm4vForConditionalGeneration.save_pretrained`.

    Where several processes hold the model, all of them call this; the first one writes, and holds a tensor at a time.
    `extras` are tensors beside the model's, such as those of extra layers (`hf_mapping`).

    Raises:
      CheckpointError: see `ModelLeaves`; or the directory is a file.
      ConfigError: max_shard_size is not a size.
      OSError: the disk refuses.
    """
    directory = Path(directory)
    tensors = {**tensors_of(model), **(extras or {})}
    plan = plan_shards(tensors, max_shard_size)
    if not is_first():
        for names in plan.values():
            for name in written_order({name: tensors[name] for name in names}):
                next(tensors[name].chunks(), None)  # the first process waits for this one's part of it
        return
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: found a file; expected a directory or nothing")
    aside = directory / _UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_shards(aside, tensors, plan)
        # An old index beside new shards would pass for a checkpoint; a directory without weights does not.
        for old in directory.iterdir():
            if _WEIGHTS.fullmatch(old.name):
                old.unlink()
        for new in sorted(aside.iterdir(), key=lambda path: path.name == INDEX):
            new.replace(directory / new.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    save_config(model.config, directory, tensors)
    save_generation_config(generation_config, directory)


def save_config(config: Glm4vConfig, directory: Path, tensors: Mapping[str, Any]) -> None:
    """Write config.json; one that is there already and says the same keeps the fields that only other programs read.

    The dtype of most of the tensors' bytes becomes the configuration's.
    """
    try:
        is_there = Glm4vConfig.from_pretrained(directory) == config
    except (CheckpointError, ConfigError):
        is_there = False
    if not is_there:
        config.save_pretrained(directory)
    nbytes = collections.Counter[str]()
    for tensor in tensors.values():
        nbytes[tensor.dtype.name] += tensor.nbytes
    set_dtype(directory / "config.json", nbytes.most_common(1)[0][0])


def save_generation_config(config: GenerationConfig, directory: Path) -> None:
    """Write generation_config.json."""
    text = json.dumps(config.changed(), indent=2, sort_keys=True) + "\n"
    with replacing(directory / "generation_config.json") as aside:
        aside.write_text(text, encoding="utf-8")
