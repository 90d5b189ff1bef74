"""Quantise a checkpoint, tensor by tensor, into the layout of compressed-tensors, which vLLM and transformers load.

Weights are rounded to the nearest, symmetrically; a scale is the largest weight of a channel or group over 127 or 7,
kept in the dtype of the weights, as those programs keep it, and what is rounded is the weight over that number.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from convert.source import Summary
from convert.to_hf import cast_tensor
from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.atomic_directory import check_room, new_directory
from glm4v_jax.checkpoints.compressed_tensors import PACKED, SCALE, SHAPE, WEIGHT, pack, stored_tensors
from glm4v_jax.checkpoints.hf_write import PYTORCH, plan_shards, total_bytes, write_shards
from glm4v_jax.checkpoints.load import INT4_QUALITY
from glm4v_jax.checkpoints.orbax_read import Weights, leaves_of, open_weights
from glm4v_jax.checkpoints.safetensors import CHUNK_BYTES, LazyTensor, Tensor
from glm4v_jax.config.checks import Positive, checked, fault
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import FIELD, StoredQuantization
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.files import asset_bytes, copy_assets, read_json_object, write_json

GROUP = 64
"""Inputs that share a scale in int4."""

Target = Literal["decoder", "all"]
"""Which linear layers: the decoder's; or all, those of the ViT, its merger and the head as well."""

_LARGEST = {8: 127, 4: 7}
_CONFIG_BYTES = 4096
"""More than the scheme takes in config.json."""


def quantize(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["int8", "int4"] = "int8",
    group: int | None = None,
    layers: Target = "decoder",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write a checkpoint of either format with quantised weights, in Hugging Face layout.

    By default the decoder's linear layers are quantised, which are most of the weights: vLLM loads a quantised head in
    its newer versions only, and others who publish such checkpoints leave the ViT in floats. Norms, biases,
    convolutions, the embedding and extra layers (`hf_mapping`) are copied in any case, and so are the files beside the
    weights. The directory appears under its name when it is complete; until then it is `.NAME.unfinished`. Host memory
    holds a tensor and some chunks.

    Args:
      source: a directory with safetensors, or an Orbax checkpoint.
      target: the directory to make.
      to: "int8", a scale for each output channel; or "int4", a scale for each group of inputs.
      group: of int4, how many inputs share a scale; 64 by default.
      layers: which linear layers.
      max_shard_size: of a file's tensors, as "5GB" (5 × 10^9), "200MiB" or a number of bytes.
      overwrite: replace a checkpoint that is at `target`.
      dry_run: check everything and write nothing.
      progress: called with bytes written and bytes in all.

    Raises:
      CheckpointError: the source is damaged or incomplete, or has numbers that are not finite; the target is taken, or
        the disk is full.
      ConfigError: the configuration is not a GLM-4.1V's, the source is quantised already, a group does not divide the
        inputs of a layer, or max_shard_size is not a size.
    """
    started = time.perf_counter()
    source, target = Path(source), Path(target)
    config = Glm4vConfig.from_pretrained(source)
    files = open_weights(source)
    if (stored := leaves_of(files, config).stored) is not None:  # and checks every tensor
        raise ConfigError(f"{source}: found weights that are quantised already ({stored}); expected floats")
    if to == "int8" and group is not None:
        raise ConfigError(fault("--group", group, "it with --to int4: int8 has a scale for each channel"))
    size = checked("--group", group, Positive | None)
    scheme = StoredQuantization(8) if to == "int8" else StoredQuantization(4, size or GROUP)
    tensors = _tensors(files, config, scheme, layers)
    plan = plan_shards(tensors, max_shard_size)
    nbytes = total_bytes(tensors)
    needed = nbytes + asset_bytes(source) + _CONFIG_BYTES
    check_room(source, target, needed, overwrite=overwrite, dry_run=dry_run)
    if not dry_run:
        with new_directory(target, overwrite=overwrite) as directory:
            parameters = sum(math.prod(info.shape) for info in files.values())
            write_shards(
                directory, tensors, plan,
                metadata=PYTORCH | files.metadata, parameters=parameters, progress=progress,
            )  # fmt: skip
            copy_assets(source, directory)
            ignore = [] if layers == "all" else ["re:.*visual.*"]
            if layers != "all" or config.text_config.tie_word_embeddings:
                ignore.append("lm_head")
            ignore += [f"re:.*[.]layers[.]{layer}[.].*" for layer in config.text_config.extra_layers]
            content = read_json_object(directory / "config.json") | {FIELD: scheme.to_dict(ignore)}
            write_json(directory / "config.json", content)
    read = 0 if dry_run else sum(info.nbytes for info in files.values())
    notes = (INT4_QUALITY,) if to == "int4" else ()
    seconds = time.perf_counter() - started
    return Summary(source, target, len(tensors), nbytes, read, len(plan), seconds, dry_run, notes)


def _tensors(files: Weights, config: Glm4vConfig, scheme: StoredQuantization, layers: Target) -> dict[str, Tensor]:
    """The tensors to write, by name; ConfigError if a group does not divide a layer's inputs."""
    table, tensors = hf_mapping.wanted(config), dict[str, Tensor]()
    for name, info in files.items():
        part = table.get(hf_mapping.canonical(name))
        is_chosen = part is not None and (layers == "all" or part.rule.leaf.startswith(hf_mapping.DECODER_LAYERS))
        if part is None or not (part.rule.is_linear and is_chosen):
            tensors[name] = cast_tensor(files, name)
            continue
        if scheme.group is not None and info.shape[1] % scheme.group:
            raise ConfigError(fault("--group", scheme.group, f"a divisor of the {info.shape[1]} inputs of {name}"))
        weight = _Weight(files, name, scheme)
        for suffix, tensor in stored_tensors(info.shape, scheme).items():
            key = name.removesuffix(WEIGHT) + suffix
            if suffix == SHAPE:
                tensors[key] = np.array(info.shape, np.int64)
            elif suffix == SCALE:
                tensors[key] = LazyTensor(tensor.shape, info.dtype, weight.scale_chunks)
            else:
                assert suffix == PACKED
                tensors[key] = LazyTensor(tensor.shape, np.dtype(tensor.dtypes[0]), weight.packed_chunks)
    return tensors


@dataclasses.dataclass
class _Weight:
    """A weight [out, in] to quantise, in chunks of output channels."""

    files: Weights
    name: str
    scheme: StoredQuantization
    scales: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    """First channel of a chunk -> its scales; kept from the first of the two tensors that need them to the other."""

    def scale_chunks(self) -> Iterator[np.ndarray]:
        """Return the scales, made when their turn comes."""
        for start, values in self._chunks():
            yield self._scale(start, values)

    def packed_chunks(self) -> Iterator[np.ndarray]:
        """Return the packed integers, made when their turn comes."""
        for start, values in self._chunks():
            values /= self._scale(start, values).astype(np.float32)[:, :, None]
            integers = np.rint(values, out=values).astype(np.int8)
            yield pack(integers.reshape(len(integers), -1), self.scheme.bits)

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The first channel and the numbers of each chunk, float32 [rows, groups, inputs of a group]."""
        tensor = self.files.read(self.name)
        outputs, inputs = tensor.shape
        rows = max(1, CHUNK_BYTES // (4 * inputs))
        for start in range(0, outputs, rows):
            values = np.ascontiguousarray(tensor[start : start + rows]).astype(np.float32)
            yield start, values.reshape(len(values), -1, self.scheme.group or inputs)
        self.files.release()

    def _scale(self, start: int, values: np.ndarray) -> np.ndarray:
        """The scales [rows, groups] of a chunk, in the dtype of the weight.

        Raises:
          CheckpointError: a number is not finite.
        """
        if start in self.scales:
            return self.scales.pop(start)
        dtype = self.files[self.name].dtype
        largest = np.maximum(values.max(axis=-1), -values.min(axis=-1))  # which keep NaN
        if not np.isfinite(largest).all():
            raise CheckpointError(f"{self.name}: found numbers that are not finite; expected finite ones")
        # What float16 has no normal number for is rounded to 0.
        scale = np.maximum(largest / _LARGEST[self.scheme.bits], np.float32(ml_dtypes.finfo(dtype).smallest_normal))
        self.scales[start] = np.where(largest == 0, np.float32(1), scale).astype(dtype)
        return self.scales[start]
