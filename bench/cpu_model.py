"""The model and the inputs that `bench.cpu_vs_torch` measures with: both sides make them alike.

About 260 million parameters in the proportions of GLM-4.1V: heads of 128, four query heads to a key head, MLPs of 3.3
times the width, ViT a quarter of the decoder's width, and in both a share of the whole as there.
"""

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image

from bench import media

IDS = dict(
    image_start_token_id=16339, image_end_token_id=16340, video_start_token_id=16341, video_end_token_id=16342,
    image_token_id=16343, video_token_id=16344,
)  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v", "tie_word_embeddings": False, **IDS,
    "text_config": {
        "model_type": "glm4v_text", "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 3424,
        "num_hidden_layers": 14, "num_attention_heads": 8, "num_key_value_heads": 2, "partial_rotary_factor": 0.5,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    },
    "vision_config": {
        "model_type": "glm4v", "depth": 12, "hidden_size": 384, "num_heads": 3, "image_size": 336,
        "out_hidden_size": 1024, "intermediate_size": 3424,
    },
}  # fmt: skip
GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def write_checkpoint(directory: pathlib.Path, config: dict[str, Any]) -> None:
    """Write random float32 weights in Hugging Face layout."""
    from glm4v_jax.checkpoints.safetensors import write_safetensors
    from glm4v_jax.config.model import Glm4vConfig
    from tests.reference import random_tensors

    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = random_tensors(Glm4vConfig.from_dict(config))
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})


def num_parameters(config: dict[str, Any]) -> int:
    """Of the whole model."""
    from glm4v_jax.config.model import Glm4vConfig
    from tests.reference import tensor_names

    return sum(math.prod(shape) for shape in tensor_names(Glm4vConfig.from_dict(config)).values())


def decode_bytes(config: dict[str, Any], context: int) -> int:
    """Bytes that the next token reads: every weight of the decoder and the head once, and keys and values so far.

    Of the embedding it reads one row, which is not counted, as are biases, norms and activations not.
    """
    text = config["text_config"]
    d, f, heads, kv = (
        text[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    kv_width = d // heads * kv
    layer = 2 * d * d + 2 * d * kv_width + 3 * d * f
    return 4 * (text["num_hidden_layers"] * (layer + 2 * kv_width * context) + d * text["vocab_size"])


def prompt(tokens: int, vocab_size: int) -> np.ndarray:
    """int64 [1, tokens] of text, the same for the same length."""
    return np.random.default_rng(tokens).integers(0, min(vocab_size, IDS["image_start_token_id"]), (1, tokens))


def patches(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of noise, ready for the ViT: float32 [rows * columns, P], and its grid int64 [1, 3]."""
    values = np.random.default_rng(rows).standard_normal((rows * columns, 3 * 2 * 14 * 14), np.float32)
    return values, np.array([[1, rows, columns]])


def photographs() -> Iterator[PIL.Image.Image]:
    """Real photographs, decoded, in RGB."""
    for name in media.PHOTOGRAPHS:
        with PIL.Image.open(media.photograph(name)) as picture:
            yield picture.convert("RGB")
