"""A live model -> a checkpoint in Hugging Face layout, which transformers 4.57 and 5.x load."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from glm4v_jax.checkpoints import hf_mapping, hf_shards
from glm4v_jax.checkpoints.safetensors import in_pieces, written_order
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.distributed import is_first, to_host
from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import replacing
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.lora import is_lora
from glm4v_jax.model.params import leaf_paths
from glm4v_jax.model.quantize import is_scale

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_UNFINISHED = ".weights.partial"


@dataclasses.dataclass(frozen=True)
class LeafSource:
    """A tensor of the checkpoint that is a leaf, a layer of a stacked leaf, or a part of a fused one.

    It comes from its devices when it is written, and then is the only one in host memory.
    """

    leaf: Array
    layer: int | None
    rule: hf_mapping.Rule
    sizes: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """As PyTorch has it."""
        return self.rule.tensor_shape(self.sizes)

    @property
    def dtype(self) -> np.dtype:
        """The leaf's."""
        return self.leaf.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        leaf = self.leaf if self.layer is None else self.leaf[self.layer]
        if self.rule.part is not None:
            axis, number = self.rule.part
            leaf = leaf[(*(slice(None),) * axis, number)]
        return self.rule.to_tensor(to_host(leaf), self.sizes)

    def pieces(self) -> Iterator[np.ndarray]:
        """The tensor, put in order by pieces."""
        yield from in_pieces(self.__array__())


def tensor_shapes(config: Glm4vConfig) -> dict[str, tuple[int, ...]]:
    """Name, as transformers 4.57 and 5.x write it, -> shape of every tensor that a model's checkpoint has."""
    sizes = hf_mapping.dimensions(config)
    return {name: rule.tensor_shape(sizes) for name, (rule, _) in hf_mapping.tensor_rules(config).items()}


def check_plain(paths: Iterable[str]) -> None:
    """Check the leaves of a model that is to be saved.

    Raises:
      CheckpointError: some are of an adapter or quantised, for which a checkpoint has no place.
    """
    paths = list(paths)
    if adapters := [path for path in paths if is_lora(path)]:
        raise CheckpointError(
            f"{adapters[0]}: found {len(adapters)} leaves of an adapter; expected none: merge it first "
            "(lora.merge_lora), or save it by itself (adapter.save_adapter)"
        )
    if scales := [path for path in paths if is_scale(path)]:
        raise CheckpointError(
            f"{scales[0]}: found {len(scales)} quantised kernels; expected floats: save the model that was quantised"
        )


def tensors_of(module: Glm4v) -> dict[str, LeafSource]:
    """Tensor name -> source, for a model with its layers in either layout.

    Raises:
      CheckpointError: see `check_plain`.
    """
    leaves = dict(zip(leaf_paths(module), jax.tree.leaves(module), strict=True))
    check_plain(leaves)
    sizes, tensors = hf_mapping.dimensions(module.config), {}
    for name, (rule, layer) in hf_mapping.tensor_rules(module.config).items():
        path, index = rule.path(layer), None
        if path not in leaves:
            path, index = path.replace(f".{layer}.", ".stacked.", 1), layer
        tensors[name] = LeafSource(leaves[path], index, rule, sizes)
    return tensors


def save_pretrained(
    module: Glm4v,
    generation_config: GenerationConfig,
    directory: str | Path,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write weights, config.json and generation_config.json; see `Glm4vForConditionalGeneration.save_pretrained`.

    Where several processes hold the model, all of them call this; the first one writes, and has a tensor at a time.
    """
    directory = Path(directory)
    tensors = tensors_of(module)
    sizes = {name: source.dtype.itemsize * int(np.prod(source.shape)) for name, source in tensors.items()}
    plan = hf_shards.plan_shards(sizes, max_shard_size)
    if not is_first():
        for names in plan.values():
            for name in written_order({name: tensors[name] for name in names}):
                tensors[name].__array__()  # the first process waits for this one's part of it
        return
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: found a file, expected a directory or nothing")
    aside = directory / _UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        hf_shards.write_shards(aside, tensors, plan)
        # An old index beside new shards would pass for a checkpoint: no weights at all do not.
        for old in directory.iterdir():
            if _WEIGHTS.fullmatch(old.name):
                old.unlink()
        for new in sorted(aside.iterdir(), key=lambda path: path.name == hf_shards.INDEX):
            new.replace(directory / new.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    module.config.save_pretrained(directory)
    save_generation_config(generation_config, directory)


def save_generation_config(config: GenerationConfig, directory: Path) -> None:
    """Write generation_config.json."""
    text = json.dumps(generation_options(config), indent=2, sort_keys=True) + "\n"
    with replacing(directory / "generation_config.json") as aside:
        aside.write_text(text, encoding="utf-8")


def generation_options(config: GenerationConfig) -> dict[str, Any]:
    """The options that are not at their defaults, as generation_config.json has them."""
    options = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != "seed" and value != field.default:
            options[field.name] = list(value) if isinstance(value, tuple) else value
    return options
