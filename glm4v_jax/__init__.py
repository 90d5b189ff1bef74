"""GLM-4.1V, a vision-language model, in JAX: run, fine-tune, evaluate and convert it on TPU, GPU and CPU.

Names are imported when they are first used, so that the host side (`glm4v_jax.inputs`) works without JAX.
"""

import importlib
from typing import Any

_EXPORTS = {
    "Glm4vConfig": "config",
    "Glm4vTextConfig": "config",
    "Glm4vVisionConfig": "config",
    "Glm4vError": "errors",
    "Batch": "batch",
    "VisionRows": "batch",
    "Glm4vImageProcessor": "inputs.image",
    "Glm4vImageProcessorFast": "inputs.image",
    "make_batch": "inputs.prepare",
    "Glm4vProcessor": "inputs.processor",
    "Glm4vVideoProcessor": "inputs.video",
    "Glm4vTokenizer": "inputs.tokenizer",
    "GenerationConfig": "generate.config",
    "VideoMetadata": "inputs.decode",
    "Engine": "generate.engine",
    "Request": "generate.engine",
    "Conversation": "generate.conversation",
    "Completion": "generate.completion",
    "Delta": "generate.completion",
    "warmup": "generate.warmup",
    "init_distributed": "distributed",
    "make_mesh": "mesh",
    "use_mesh": "mesh",
    "Glm4v": "model",
    "Glm4vVisionModel": "modeling_parts",
    "Glm4vTextModel": "modeling_parts",
    "Glm4vModel": "modeling",
    "Glm4vForConditionalGeneration": "modeling",
    "pipeline": "pipelines",
}

__all__ = list(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
