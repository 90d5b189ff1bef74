"""GLM-OCR's structure in checkpoints: tensors of its own, and a layer that is kept but not run.

All kinds of the family, with all their files: `tests/family/test_round_trips.py`.
"""

import json
import warnings

import jax
import numpy as np
import pytest
from helpers_convert import read_all
from reference import IDS, random_tensors

from convert.inspect import inspect
from convert.quantize import quantize
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.adapter import load_adapter, save_adapter
from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.checkpoints.safetensors import TensorInfo, write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.errors import CheckpointError
from glm4v_jax.model.lora import LoraConfig, add_lora
from glm4v_jax.model.params import linears

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
LAYER = "model.language_model.layers.2."


def tensors_of_ocr() -> dict[str, np.ndarray]:
    """Random tensors, those of the layer that predicts a further token among them."""
    config = Glm4vConfig.from_dict(OCR)
    tensors = random_tensors(config)
    random = np.random.RandomState(0)
    width, vocabulary = config.text_config.hidden_size, config.text_config.vocab_size
    shapes = {name.replace("layers.1.", "layers.2."): x.shape for name, x in tensors.items() if "layers.1." in name}
    shapes |= {LAYER + "eh_proj.weight": (width, 2 * width), LAYER + "enorm.weight": (width,)}
    shapes |= {LAYER + "shared_head.head.weight": (vocabulary, width)}
    return tensors | {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(directory, dtype="float32", tensors=None):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(OCR), encoding="utf-8")
    tensors = tensors_of_ocr() if tensors is None else tensors
    tensors = {name: x.astype(np.dtype(dtype)) for name, x in tensors.items()}
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    return directory


def test_a_round_trip_keeps_every_bit(tmp_path):
    """Of float32; in bfloat16, with all files: `tests/family/test_round_trips.py`."""
    source = write(tmp_path / "source")
    to_orbax(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="original")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_one_fault_beside_an_extra_layer_too(layers):
    config = Glm4vConfig.from_dict(OCR | {"text_config": OCR["text_config"] | {"num_hidden_layers": layers}})
    infos = {name: TensorInfo(x.shape, x.dtype) for name, x in tensors_of_ocr().items()}
    fault = f"text_config.num_hidden_layers: found {layers}; expected 2: the tensors are of 2 layers"
    with pytest.raises(CheckpointError, match=f"^somewhere: {fault}$"):
        hf_mapping.match(config, infos, "somewhere")


def test_glm_ocr_has_the_tensors_of_its_structure():
    names = {name for name in tensors_of_ocr() if not name.startswith(LAYER)}
    block = "model.visual.blocks.1."
    of_block = {name.removeprefix(block) for name in names if name.startswith(block)}
    assert {"attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.bias", "mlp.up_proj.bias"} <= of_block
    assert not [name for name in names if "embeddings" in name or "post_conv" in name or "q_proj.bias" in name]


def test_a_layer_after_the_last_is_not_run_and_may_be_absent(tmp_path):
    tensors = tensors_of_ocr()
    source = write(tmp_path / "source")
    kept = {name: x for name, x in tensors.items() if not name.startswith(LAYER)}
    bare = write(tmp_path / "bare", tensors=kept)
    runtimes = [load_runtime(path, dtype="float32") for path in (source, bare)]
    to_orbax(source, tmp_path / "orbax")
    assert set(open_weights(tmp_path / "orbax")) == tensors.keys()
    runtimes.append(load_runtime(tmp_path / "orbax", dtype="float32"))
    assert len({runtime.text.structure for runtime in runtimes}) == 1
    for leaves in zip(*(runtime.text.leaves for runtime in runtimes), strict=True):
        for leaf in leaves:
            np.testing.assert_array_equal(leaf, leaves[0])


def test_another_number_of_layers_is_refused_without_an_extra_one(tmp_path):
    tensors = {name: x for name, x in tensors_of_ocr().items() if not name.startswith(LAYER)}
    source = write(tmp_path / "source", tensors=tensors)
    data = json.loads((source / "config.json").read_text(encoding="utf-8"))
    data["text_config"]["num_hidden_layers"] = 3
    (source / "config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match="num_hidden_layers: found 3; expected 2"):
        load_runtime(source)


def test_inspection_lists_a_layer_after_the_last_apart(tmp_path):
    found = inspect(write(tmp_path / "source"))
    assert found.tensors == len(tensors_of_ocr())
    (projection,) = (group for group in found.groups if group.name.endswith("layers.2.eh_proj.weight"))
    assert (projection.leaf, projection.device_bytes, projection.shape) == ("", 0, (48, 96))


def test_a_saved_model_has_the_layer_after_the_last_of_its_checkpoint(tmp_path):
    source = write(tmp_path / "source")
    Glm4vForConditionalGeneration.from_pretrained(source, dtype="float32").save_pretrained(tmp_path / "saved")
    saved = read_all(tmp_path / "saved")
    for name, expected in tensors_of_ocr().items():
        np.testing.assert_array_equal(saved.pop(name), expected)
    assert not saved
    assert Glm4vConfig.from_pretrained(tmp_path / "saved") == Glm4vConfig.from_dict(OCR)


@pytest.mark.parametrize(("to", "group"), [("int8", None), ("int4", 16)])
def test_a_quantised_checkpoint_keeps_floats_where_they_are_not_run(tmp_path, to, group):
    source = write(tmp_path / "source")
    quantize(source, tmp_path / to, to=to, group=group, layers="all")
    found = read_all(tmp_path / to)
    for name, expected in tensors_of_ocr().items():
        if name.startswith(LAYER):
            np.testing.assert_array_equal(found[name], expected)
    assert found["model.visual.blocks.0.mlp.down_proj.weight_packed"].dtype == np.int32
    to_orbax(tmp_path / to, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="original")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / to / name).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "jax .*: weights in")
        runtime = load_runtime(tmp_path / to, dtype="float32")  # every entry of `ignore` is known
    assert runtime.config.text_config.head_dim == 16


@pytest.mark.slow
def test_an_adapter_of_the_decoder_and_of_a_vit_with_biases_comes_back(tmp_path):
    model = Glm4vForConditionalGeneration(Glm4vConfig.from_dict(OCR), dtype="float32")
    target = r"language_model\.layers\..*|visual\.blocks\..*"
    with use_mesh(model.mesh):
        adapted = add_lora(model.module, LoraConfig(rank=4, target=target))
        for layer in (linear for found in linears(adapted).values() for linear in found):
            if layer.lora_b is not None:
                layer.lora_b[...] = layer.lora_b[...] + 0.5
        save_adapter(adapted, tmp_path, "base")
        again = load_adapter(model.module, tmp_path)
    for one, other in zip(jax.tree.leaves(adapted), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
