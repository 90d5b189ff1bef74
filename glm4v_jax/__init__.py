"""GLM-4.1V, a vision-language model, in JAX: run, fine-tune, evaluate and convert it on TPU, GPU and CPU.

Names are imported when they are first used, so that the host side (`glm4v_jax.inputs`) works without JAX.
"""

import importlib
from typing import Any

_EXPORTS = {
    "Glm4vConfig": "config.model",
    "Glm4vTextConfig": "config.model",
    "Glm4vVisionConfig": "config.model",
    "Glm4vError": "errors",
    "Batch": "batch",
    "VisionRows": "batch",
    "Glm4vImageProcessor": "inputs.vision.image",
    "Glm4vImageProcessorFast": "inputs.vision.image",
    "make_batch": "inputs.make_batch",
    "Glm4vProcessor": "inputs.processor",
    "Glm4vVideoProcessor": "inputs.vision.video",
    "Glm4vTokenizer": "inputs.text.tokenizer",
    "GenerationConfig": "config.generation",
    "VideoMetadata": "inputs.media.decode",
    "SampledVideo": "inputs.media.load",
    "Engine": "generate.engine",
    "Request": "generate.engine",
    "Conversation": "generate.conversation",
    "Completion": "generate.completion",
    "Delta": "generate.completion",
    "warmup": "generate.warmup",
    "init_distributed": "devices.distributed",
    "make_mesh": "devices.mesh",
    "use_mesh": "devices.mesh",
    "Glm4v": "model.glm4v",
    "Glm4vVisionModel": "hf.submodels",
    "Glm4vTextModel": "hf.submodels",
    "Glm4vModel": "hf.multimodal",
    "Glm4vForConditionalGeneration": "hf.model",
    "pipeline": "hf.pipeline",
}

__all__ = list(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
