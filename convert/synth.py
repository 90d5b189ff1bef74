"""Write checkpoints of random weights in Hugging Face layout, of any size: for trials without a download."""

import dataclasses
import functools
import json
import math
import shutil
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.source import Summary
from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.atomic_directory import check_room, new_directory
from glm4v_jax.checkpoints.hf_write import Plan, shard_name, tensor_shapes, total_bytes, write_shards
from glm4v_jax.checkpoints.load import resolve_dtype
from glm4v_jax.checkpoints.safetensors import CHUNK_BYTES, LazyTensor
from glm4v_jax.config.checks import fault
from glm4v_jax.config.family import PROCESSORS
from glm4v_jax.config.members import DEFAULT, MEMBERS, Member, find_member
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import ConfigError, counted
from glm4v_jax.files import read_json_object
from glm4v_jax.tiny import FAMILY_TEMPLATE, TINY_CHECKPOINT

_TOOL_TOKENS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>", "/nothink",
)  # fmt: skip
"""Tokens of the family's tokenizers that the packaged one, GLM-4.1V's, does not have."""
_LEVELS = 1 << 16
_LAYERS = "model.language_model.layers."


def random_tensor(shape: tuple[int, ...], dtype: np.dtype[Any], name: str, deviation: float, seed: int) -> LazyTensor:
    """Return normally distributed numbers that depend on the seed, the name and the dtype only.

    Weights have the configuration's standard deviation, biases a tenth of it, and norms' weights a mean of one.
    """

    def chunks() -> Iterator[np.ndarray]:
        bits = np.random.SFC64([seed, zlib.crc32(name.encode())])
        is_bias = name.endswith(".bias")
        values = 0.1 * deviation * _quantiles() if is_bias else deviation * _quantiles() + ("norm" in name)
        # For each of the 65,536 equally likely values of 16 random bits.
        table = values.astype(np.float32).astype(dtype)
        left = math.prod(shape)
        while left:
            count = min(left, CHUNK_BYTES // 8)
            raw = bits.random_raw(math.ceil(count / 4)).astype("<u8", copy=False).view("<u2")
            yield table[raw[:count]]
            left -= count

    return LazyTensor(shape, dtype, chunks)


@functools.cache
def _quantiles() -> np.ndarray:
    """The medians of 65,536 equally likely intervals of the normal distribution."""
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / _LEVELS) for i in range(_LEVELS)])


def plan_like_released(config: Glm4vConfig, count: int) -> Plan:
    """Plan shards as GLM-4.1V-9B-Thinking has them: decoder layers evenly in all but the last, which has all else.

    Raises:
      ConfigError: there are too few layers for as many shards.
    """
    layers = config.text_config.num_hidden_layers
    if not 1 <= count <= layers + 1:
        raise ConfigError(fault("shards", count, f"1 to {layers + 1} for a decoder of {counted(layers, 'layer')}"))
    each = layers // max(1, count - 1)
    plan = {shard_name(i, count): list[str]() for i in range(count)}
    plan[shard_name(count - 1, count)] += _extra_shapes(config)
    for name, (rule, layer) in hf_mapping.tensor_rules(config).items():
        in_decoder = layer is not None and rule.leaf.startswith("language_model.")
        number = min(layer // each, count - 1) if in_decoder and layer is not None else count - 1
        plan[shard_name(number, count)].append(name)
    return plan


def _extra_shapes(config: Glm4vConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors of layers after the last that predict further tokens, as GLM-OCR has them: name -> shape.

    Each is a layer like the others, with norms and a projection before it, and an embedding and a head of its own.
    """
    text, shapes = config.text_config, tensor_shapes(config)
    width, found = text.hidden_size, dict[str, tuple[int, ...]]()
    for layer in range(text.num_hidden_layers, text.num_hidden_layers + text.num_nextn_predict_layers):
        prefix = f"{_LAYERS}{layer}."
        like = {name: shape for name, shape in shapes.items() if name.startswith(f"{_LAYERS}0.")}
        found |= {name.replace(f"{_LAYERS}0.", prefix): shape for name, shape in like.items()}
        found |= {f"{prefix}{norm}.weight": (width,) for norm in ("enorm", "hnorm", "shared_head.norm")}
        found[f"{prefix}eh_proj.weight"] = (width, 2 * width)
        found |= {f"{prefix}{name}.weight": (text.vocab_size, width) for name in ("embed_tokens", "shared_head.head")}
    return found


def synth(
    config: Glm4vConfig,
    target: str | Path,
    *,
    dtype: Any = "bfloat16",
    seed: int = 0,
    count: int | None = None,
    member: Member | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write a checkpoint of a configuration, tensor by tensor; the same bytes for the same seed.

    With it go config.json, generation_config.json, processor files and a template as the released checkpoint has them,
    and the tiny tokenizer of this package where the configuration has its vocabulary.

    Args:
      config: of the model.
      target: the directory to make.
      dtype: float32, bfloat16 or float16.
      seed: of the numbers.
      count: of shards; by default as in the release, or as many as the layers allow.
      member: whose files go with it; by default those of the first with the configuration's `model_type`.
      overwrite: replace a checkpoint that is at `target`.
      dry_run: check everything and write nothing.
      progress: called with bytes written and bytes in all.

    Raises:
      CheckpointError: the target is taken, or the disk is full.
      ConfigError: `count` is too large.
    """
    started = time.perf_counter()
    target, dtype = Path(target), resolve_dtype(dtype)
    deviation = config.text_config.initializer_range
    shapes = {**tensor_shapes(config), **_extra_shapes(config)}
    tensors = {name: random_tensor(shape, dtype, name, deviation, seed) for name, shape in shapes.items()}
    if member is None:
        member = next((one for one in MEMBERS.values() if one.model_type == config.model_type), MEMBERS[DEFAULT])
    layers = config.text_config.num_hidden_layers
    plan = plan_like_released(config, min(member.shards, layers + 1) if count is None else count)
    nbytes = total_bytes(tensors)
    check_room(None, target, nbytes, overwrite=overwrite, dry_run=dry_run)
    if not dry_run:
        with new_directory(target, overwrite=overwrite) as directory:
            write_shards(directory, tensors, plan, progress=progress)
            _write_assets(directory, config, dtype, member)
    notes = () if _has_tiny_vocabulary(config) else ("no tokenizer: this package has none with that vocabulary",)
    seconds = time.perf_counter() - started
    return Summary(target, target, len(tensors), nbytes, 0, len(plan), seconds, dry_run, notes)


def load_config(name: str, tiny: bool = False) -> Glm4vConfig:
    """Return the configuration of a member of the family, the one named "full" or "tiny", or that of a config.json.

    Args:
      name: of a member, of a file or its directory; "full" is GLM-4.1V, "tiny" the packaged model.
      tiny: take the member at tiny size.

    Raises:
      CheckpointError: a directory has no config.json, or a file cannot be read.
      ConfigError: the name is unknown, the model is of another family, or it has no tiny size.
    """
    if name == "tiny":
        return Glm4vConfig.from_pretrained(TINY_CHECKPOINT)
    if member := find_member(DEFAULT if name == "full" else name):
        return member.config(tiny=tiny)
    if tiny:
        raise ConfigError(fault("--tiny with --config", name, f"one of {', '.join(MEMBERS)}"))
    path = Path(name)
    if not path.exists():
        raise ConfigError(fault("--config", name, f"tiny, full, {', '.join(MEMBERS)}, or a config.json"))
    if path.is_dir():
        return Glm4vConfig.from_pretrained(path)
    try:
        return Glm4vConfig.from_dict(read_json_object(path))
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _write_assets(directory: Path, config: Glm4vConfig, dtype: np.dtype, member: Member) -> None:
    """Write what goes beside the weights."""
    content = config.to_dict()
    content["text_config"]["dtype"] = dtype.name
    ends = {name: content["text_config"].get(name) for name in ("eos_token_id", "pad_token_id")}
    files = {"config.json": content, **_processor_files(member)}
    files["generation_config.json"] = {"_from_model_config": True, **member.sampling} | {
        name: ids for name, ids in ends.items() if ids is not None
    }
    is_family = member.template == "family"
    if _has_tiny_vocabulary(config):
        shutil.copyfile(TINY_CHECKPOINT / "tokenizer.json", directory / "tokenizer.json")
        files["tokenizer_config.json"] = _tokenizer_config(member, _TOOL_TOKENS if is_family else ())
    for name, data in files.items():
        (directory / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template = "chat_template.jinja"
    shutil.copyfile(FAMILY_TEMPLATE if is_family else TINY_CHECKPOINT / template, directory / template)


def _processor_files(member: Member) -> dict[str, Any]:
    """Return the files of the processors, as the member has them; only names and sizes are not GLM-4.1V's."""
    row = PROCESSORS[member.processors]
    image, video = (read_json_object(TINY_CHECKPOINT / f"{kind}preprocessor_config.json") for kind in ("", "video_"))
    owner = {"processor_class": row.processor}
    image |= {"image_processor_type": row.video.replace("Video", "Image"), **owner, **row.image_settings}
    video |= {"video_processor_type": row.video, **owner, **row.video_settings}
    files = {
        "preprocessor_config.json": image,
        "video_preprocessor_config.json": video,
        "processor_config.json": {"image_processor": image, **owner, "video_processor": video},
    }
    return {name: files[name] for name in member.processor_files}


def _tokenizer_config(member: Member, more: tuple[str, ...]) -> dict[str, Any]:
    """Return tokenizer_config.json of the packaged tokenizer with more tokens after its last."""
    content = read_json_object(TINY_CHECKPOINT / "tokenizer_config.json")
    content["processor_class"] = PROCESSORS[member.processors].processor
    known = content["added_tokens_decoder"]
    last = max(known, key=int)
    known |= {str(number): {**known[last], "content": token} for number, token in enumerate(more, int(last) + 1)}
    return content


def _has_tiny_vocabulary(config: Glm4vConfig) -> bool:
    return _vocabulary(config) == _vocabulary(Glm4vConfig.from_pretrained(TINY_CHECKPOINT))


def _vocabulary(config: Glm4vConfig) -> tuple[int, ...]:
    """The figures that a tokenizer must agree with."""
    ids = (getattr(config, field.name) for field in dataclasses.fields(config) if field.name.endswith("token_id"))
    return config.text_config.vocab_size, *ids
