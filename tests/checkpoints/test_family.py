"""Checkpoints of each structural kind of the family: tensors of their own, and layers that are kept but not run."""

import json

import numpy as np
import pytest
from reference import IDS, random_tensors

from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError

# GLM-OCR's structure: heads wider than their share of the hidden size, all of each rotated; no biases in the decoder.
OCR = {
    "architectures": ["GlmOcrForConditionalGeneration"], "model_type": "glm_ocr", "tie_word_embeddings": False, **IDS,
    "text_config": {
        "model_type": "glm_ocr_text", "vocab_size": 320, "hidden_size": 48, "intermediate_size": 96, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0, "rope_theta": 10000.0,
        },
    },
    "vision_config": {
        "model_type": "glm_ocr_vision", "depth": 2, "hidden_size": 32, "num_heads": 4, "attention_bias": True,
        "image_size": 70, "out_hidden_size": 48, "intermediate_size": 80,
    },
}  # fmt: skip
GA = {
    "architectures": ["Glm46VForConditionalGeneration"], "model_type": "glmga", **IDS,
    "text_config": {
        "model_type": "glm4v_text", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5, "rope_theta": 500000.0,
        },
    },
    "vision_config": {
        "model_type": "glm4v_vision", "depth": 2, "hidden_size": 32, "num_heads": 4, "image_size": 70,
        "out_hidden_size": 64, "intermediate_size": 96,
    },
}  # fmt: skip
KINDS = {"ga": GA, "ocr": OCR}
LAYER = "model.language_model.layers.2."


def tensors_of(kind: str) -> dict[str, np.ndarray]:
    """Random tensors, those of a layer that predicts a further token among them where the kind has one."""
    config = Glm4vConfig.from_dict(KINDS[kind])
    tensors = random_tensors(config)
    if kind == "ocr":
        random = np.random.RandomState(0)
        width, vocabulary = config.text_config.hidden_size, config.text_config.vocab_size
        shapes = {name.replace("layers.1.", "layers.2."): x.shape for name, x in tensors.items() if "layers.1." in name}
        shapes |= {LAYER + "eh_proj.weight": (width, 2 * width), LAYER + "enorm.weight": (width,)}
        shapes |= {LAYER + "shared_head.head.weight": (vocabulary, width)}
        tensors |= {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors


def write(kind, directory, dtype="float32", tensors=None):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(KINDS[kind]), encoding="utf-8")
    tensors = tensors_of(kind) if tensors is None else tensors
    tensors = {name: x.astype(np.dtype(dtype)) for name, x in tensors.items()}
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_keeps_every_bit(tmp_path, kind, dtype):
    source = write(kind, tmp_path / "source", dtype)
    to_orbax(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="original")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_glm_ocr_has_the_tensors_of_its_structure():
    names = {name for name in tensors_of("ocr") if not name.startswith(LAYER)}
    block = "model.visual.blocks.1."
    of_block = {name.removeprefix(block) for name in names if name.startswith(block)}
    assert {"attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.bias", "mlp.up_proj.bias"} <= of_block
    assert not [name for name in names if "embeddings" in name or "post_conv" in name or "q_proj.bias" in name]


def test_a_layer_after_the_last_is_not_run_and_may_be_absent(tmp_path):
    tensors = tensors_of("ocr")
    source = write("ocr", tmp_path / "source")
    kept = {name: x for name, x in tensors.items() if not name.startswith(LAYER)}
    bare = write("ocr", tmp_path / "bare", tensors=kept)
    runtimes = [load_runtime(path, dtype="float32") for path in (source, bare)]
    to_orbax(source, tmp_path / "orbax")
    assert set(open_weights(tmp_path / "orbax")) == tensors.keys()
    runtimes.append(load_runtime(tmp_path / "orbax", dtype="float32"))
    assert len({runtime.text.structure for runtime in runtimes}) == 1
    for leaves in zip(*(runtime.text.leaves for runtime in runtimes), strict=True):
        for leaf in leaves:
            np.testing.assert_array_equal(leaf, leaves[0])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (1, r"layers.2.* expected no such tensor"),  # the file's second is then taken for the one after the last
        (3, "num_hidden_layers: found 3; expected 2"),
    ],
)
def test_another_number_of_layers_is_refused(tmp_path, layers, message):
    tensors = {name: x for name, x in tensors_of("ocr").items() if layers < 3 or not name.startswith(LAYER)}
    source = write("ocr", tmp_path / "source", tensors=tensors)
    data = json.loads((source / "config.json").read_text(encoding="utf-8"))
    data["text_config"]["num_hidden_layers"] = layers
    (source / "config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_runtime(source)
