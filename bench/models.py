"""The checkpoints that measurements run on: random float32 weights in Hugging Face layout, and how large they are.

Two are in the proportions of GLM-4.1V: heads of 128, MLPs of 3.3 times the width.
"""

import json
import math
import pathlib
import shutil
from typing import Any

import numpy as np

from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.tiny import TINY_CHECKPOINT
from tests.reference import random_tensors, tensor_names

PACKAGED: dict[str, Any] = json.loads((TINY_CHECKPOINT / "config.json").read_text(encoding="utf-8"))
"""The configuration of the packaged model."""
SHALLOW: dict[str, Any] = PACKAGED | {
    "text_config": PACKAGED["text_config"] | {"num_hidden_layers": 2},
    "vision_config": PACKAGED["vision_config"] | {"depth": 1},
}
"""The same with fewer layers, each of which is a part of every program on a CPU: for runs that measure nothing."""
PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja",
)  # fmt: skip


def _config(ids: dict[str, int], text: dict[str, int], vision: dict[str, int]) -> dict[str, Any]:
    """A config.json; the ViT's merger is as wide as the decoder."""
    return {
        "architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v", "tie_word_embeddings": False, **ids,
        "text_config": {
            "model_type": "glm4v_text", "num_key_value_heads": 2, "partial_rotary_factor": 0.5,
            "max_position_embeddings": 8192, "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}, **text,
        },
        "vision_config": {
            "model_type": "glm4v", "image_size": 336, "out_hidden_size": text["hidden_size"],
            "intermediate_size": text["intermediate_size"], **vision,
        },
    }  # fmt: skip


INFERENCE = _config(
    dict(
        image_start_token_id=16339, image_end_token_id=16340, video_start_token_id=16341, video_end_token_id=16342,
        image_token_id=16343, video_token_id=16344,
    ),
    dict(vocab_size=16384, hidden_size=1024, intermediate_size=3424, num_hidden_layers=14, num_attention_heads=8),
    dict(depth=12, hidden_size=384, num_heads=3),
)  # fmt: skip
"""About 260 million parameters: four query heads to a key head, the ViT with its share of the whole as in the 9B."""
_PACKAGED_IDS = {name: value for name, value in PACKAGED.items() if name.endswith("token_id")}
TRAINING = _config(
    _PACKAGED_IDS,
    dict(vocab_size=8192, hidden_size=512, intermediate_size=1712, num_hidden_layers=6, num_attention_heads=4),
    dict(depth=4, hidden_size=256, num_heads=2),
)
"""About 35 million parameters, wide for its depth, with the token ids of the packaged tokenizer."""


def write_checkpoint(
    directory: pathlib.Path, config: dict[str, Any], *, processor: bool = False, successors: np.ndarray | None = None
) -> pathlib.Path:
    """Write a checkpoint whose weights let every part show in the logits.

    `processor`: with the packaged one, and the token ids of its tokenizer. `successors`: for each token the one that
    the model generates after it; random weights do not say.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = config | (_PACKAGED_IDS if processor else {})
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = random_tensors(Glm4vConfig.from_dict(config))
    if successors is not None:
        # So large that the layers do not hide it, and scored highest by the token that comes next.
        embedding = tensors["model.language_model.embed_tokens.weight"]
        tensors["lm_head.weight"][successors] = embedding / math.sqrt(embedding.shape[1])
        embedding *= 8
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    for file in PROCESSOR_FILES if processor else ():
        shutil.copyfile(TINY_CHECKPOINT / file, directory / file)
    return directory


def num_parameters(config: dict[str, Any]) -> int:
    """Of the whole model."""
    return sum(math.prod(shape) for shape in tensor_names(Glm4vConfig.from_dict(config)).values())


def decode_bytes(config: dict[str, Any], context: int) -> int:
    """Bytes that the next token reads: every weight of the decoder and the head once, and keys and values so far.

    The embedding's one row, biases, norms and activations are not counted.
    """
    text = config["text_config"]
    d, f, heads, kv = (
        text[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    kv_width = d // heads * kv
    layer = 2 * d * d + 2 * d * kv_width + 3 * d * f
    return 4 * (text["num_hidden_layers"] * (layer + 2 * kv_width * context) + d * text["vocab_size"])
