"""What of vLLM's options the model takes, and what it refuses, before anything is read.

`--additional-config '{"glm4v_checkpoint": "/checkpoints/orbax", "glm4v_quantize": "int8"}'`; keys that do not begin
with `glm4v_` are tpu-inference's own.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from jax.sharding import Mesh

from glm4v_jax.config.checks import fault, from_mapping, raise_faults, validate
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import ConfigError, naming

_PREFIX, _OPTION = "glm4v_", "--additional-config"
_TENSOR_AXIS = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """The keys of `--additional-config` that are this package's.

    >>> VllmSettings.read({"glm4v_quantize": "int8", "max_decode_steps": 8}).glm4v_quantize
    'int8'
    >>> VllmSettings.read({"glm4v_quantise": "int8"})
    Traceback (most recent call last):
      ...
    glm4v_jax.errors.ConfigError: --additional-config: glm4v_quantise: found an unknown field; expected some of glm4v_checkpoint, glm4v_quantize, glm4v_adapter; did you mean 'glm4v_quantize'?

    Attributes:
      glm4v_checkpoint: where the weights are, in either format; by default where vLLM's `--model` is.
      glm4v_quantize: "int8" quantises them when they are loaded.
      glm4v_adapter: directory of an adapter in PEFT's format: merged into weights in floats, beside integers.

    Raises:
      ConfigError: a value is of another type.
    """  # noqa: E501

    glm4v_checkpoint: str | None = None
    glm4v_quantize: Literal["int8"] | None = None
    glm4v_adapter: str | None = None

    def __post_init__(self) -> None:
        validate(self)

    @classmethod
    def read(cls, additional_config: Any) -> "VllmSettings":
        """Read vLLM's dictionary of further options.

        Raises:
          ConfigError: a key begins with `glm4v_` and is not known, or a value does not fit.
        """
        given = additional_config if isinstance(additional_config, dict) else {}
        with naming(_OPTION, ConfigError):
            return from_mapping(cls, {key: value for key, value in given.items() if key.startswith(_PREFIX)})


def refuse(vllm_config: Any, mesh: Mesh) -> None:
    """Raise a ConfigError for all options of vLLM's engine and mesh that ask for what is not built."""
    raise_faults([*_option_faults(vllm_config), *_mesh_faults(mesh)])


def _option_faults(vllm_config: Any) -> Iterator[str]:
    model, media = vllm_config.model_config, vllm_config.model_config.multimodal_config
    if (size := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        yield fault("--pipeline-parallel-size", size, "1: run an engine for each host, behind a router")
    if vllm_config.lora_config is not None:
        yield f'--enable-lora: found it set; expected {_OPTION} \'{{"glm4v_adapter": "DIRECTORY"}}\', for all requests'
    if vllm_config.speculative_config is not None:
        yield "--speculative-config: found one; expected none"
    if (load := str(vllm_config.load_config.load_format)) == "dummy":
        yield fault("--load-format", load, "'auto': `glm4v convert synth` makes checkpoints of random weights")
    if (dtype := vllm_config.cache_config.cache_dtype) not in ("auto", "bfloat16", "float32"):
        yield fault("--kv-cache-dtype", dtype, "'auto'")
    if (runner := model.runner_type) != "generate":
        yield fault("--runner", runner, "'generate'")
    if "quantization" in (vllm_config.additional_config or {}):
        yield f'{_OPTION}: quantization: found a rule of Qwix; expected {{"glm4v_quantize": "int8"}}'
    if media is not None:
        videos = media.limit_per_prompt.get("video")
        if videos is not None and videos.count > 1:
            yield fault("--limit-mm-per-prompt video", videos.count, "at most 1: vLLM prepares one video for a prompt")
        if media.enable_mm_embeds:
            yield "--enable-mm-embeds: found it set; expected images and videos, not their embeddings"
        if media.video_pruning_rate:
            yield fault("--video-pruning-rate", media.video_pruning_rate, "0")


def _mesh_faults(mesh: Mesh) -> Iterator[str]:
    wide = {axis: size for axis, size in mesh.shape.items() if axis != _TENSOR_AXIS and size > 1}
    if wide:
        yield fault("mesh", wide, f"{_TENSOR_AXIS!r} as its only axis: run an engine for each replica, behind a router")


def check_heads(config: Glm4vConfig, mesh: Mesh) -> None:
    """Raise a ConfigError unless the heads divide by the devices of tpu-inference's mesh that share them."""
    devices, heads = mesh.shape.get(_TENSOR_AXIS, 1), config.text_config.num_key_value_heads
    assert heads is not None
    if heads % devices:
        expected = f"a divisor of {heads}, the model's key and value heads: run more engines, behind a router"
        raise ConfigError(fault("--tensor-parallel-size", devices, expected))


_SHARED = ("num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size")
"""What vLLM plans its memory and reads its tokens by."""


def check_same_model(config: Glm4vConfig, planned: Glm4vConfig, directory: str) -> None:
    """Raise a ConfigError unless weights from elsewhere are of the model that vLLM has planned for."""
    found, expected = config.text_config, planned.text_config
    raise_faults(
        [
            fault(name, getattr(found, name), f"{getattr(expected, name)}, as --model has it")
            for name in _SHARED
            if getattr(found, name) != getattr(expected, name)
        ],
        where=f"{_OPTION}: glm4v_checkpoint: {directory}",
    )
