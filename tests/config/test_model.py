"""Configurations: defaults and round trips against the reference, both spellings, contradictions."""

import dataclasses
import json
import re
from typing import get_args

import numpy as np
import pytest
from reference import CONFIGS

from glm4v_jax.config.model import Activation, Glm4vConfig, Glm4vTextConfig, Glm4vVisionConfig, RopeScaling
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.model import nn


def theirs(name):
    from helpers_transformers import import_transformers

    import_transformers()
    from transformers.models.glm4v import configuration_glm4v

    return getattr(configuration_glm4v, name)


@pytest.mark.parametrize("cls", [Glm4vTextConfig, Glm4vVisionConfig, Glm4vConfig])
def test_defaults_are_the_references(cls):
    reference = theirs(cls.__name__)()
    # Its own text defaults cannot run (no M-RoPE sections): these three stand for the released model's rope instead.
    ours_alone = {"rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"}
    if cls is Glm4vTextConfig:  # and what siblings have
        ours_alone |= {"head_dim", "num_nextn_predict_layers"}
    if cls is Glm4vVisionConfig:
        ours_alone |= {"rope_theta"}
    for field in dataclasses.fields(cls):
        if field.name.endswith("_config") or field.name in ours_alone:
            continue
        assert getattr(cls(), field.name) == getattr(reference, field.name), field.name


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_by_both(tmp_path, name):
    config = Glm4vConfig.from_dict(CONFIGS[name])
    config.save_pretrained(tmp_path)
    assert Glm4vConfig.from_pretrained(tmp_path) == config
    assert hash(Glm4vConfig.from_pretrained(tmp_path)) == hash(config)
    reference = theirs("Glm4vConfig").from_pretrained(tmp_path)
    for field in dataclasses.fields(Glm4vVisionConfig):
        if field.name == "rope_theta":
            continue
        assert getattr(reference.vision_config, field.name) == getattr(config.vision_config, field.name), field.name
    for field in dataclasses.fields(Glm4vTextConfig):
        if field.name == "rope_scaling":
            assert tuple(reference.text_config.rope_scaling["mrope_section"]) == config.text_config.mrope_section
            assert reference.text_config.rope_scaling["rope_type"] == config.text_config.rope.rope_type
        elif field.name in ("head_dim", "num_nextn_predict_layers"):
            assert not hasattr(reference.text_config, field.name)
        elif getattr(config.text_config, field.name) is not None:
            assert getattr(reference.text_config, field.name) == getattr(config.text_config, field.name), field.name


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_reference_writes_is_read(tmp_path, name):
    theirs("Glm4vConfig")(**CONFIGS[name]).save_pretrained(tmp_path)
    assert Glm4vConfig.from_pretrained(tmp_path) == Glm4vConfig.from_dict(CONFIGS[name])


def test_rope_parameters_of_5x_are_read():
    """`rope_parameters` holds all that 4.57 spreads; GLM-4.6V-Flash and AutoGLM-Phone-9B come so."""
    data = json.loads(json.dumps(CONFIGS["base"]))
    text = data["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {
        "rope_theta": 500000.0, "partial_rotary_factor": text.pop("partial_rotary_factor"),
    }  # fmt: skip
    data["vision_config"]["model_type"] = "glm4v_vision"
    config = Glm4vConfig.from_dict(data)
    assert config.text_config.rope_theta == 500000.0
    assert config.text_config.mrope_section == (1, 1, 2) and config.text_config.rotary_dim == 8
    old = Glm4vConfig.from_dict(CONFIGS["base"])
    assert config.text_config == dataclasses.replace(old.text_config, rope_theta=500000.0)


def test_text_fields_at_the_top_level_are_read():
    flat = {k: v for k, v in CONFIGS["tester"].items() if k != "text_config"} | CONFIGS["tester"]["text_config"]
    flat["model_type"] = "glm4v"
    found, expected = Glm4vConfig.from_dict(flat), Glm4vConfig.from_dict(CONFIGS["tester"])
    assert found.vision_config == expected.vision_config
    assert dataclasses.replace(found.text_config, image_token_id=None, video_token_id=None) == expected.text_config


@pytest.mark.parametrize(("top", "text", "tied"), [(True, False, False), (False, True, True), (True, None, False)])
def test_the_text_part_decides_whether_the_head_is_tied(top, text, tied):
    data = json.loads(json.dumps(CONFIGS["base"]))
    data["tie_word_embeddings"] = top
    data["text_config"].pop("tie_word_embeddings")
    if text is not None:
        data["text_config"]["tie_word_embeddings"] = text
    assert Glm4vConfig.from_dict(data).text_config.tie_word_embeddings == tied


def test_the_released_model_has_its_dimensions():
    config = Glm4vConfig.glm4_1v_9b()
    text, vision = config.text_config, config.vision_config
    assert (text.head_dim, text.rotary_dim, text.mrope_section, text.num_key_value_groups) == (128, 64, (8, 12, 12), 16)
    assert (vision.head_dim, vision.patch_dim, vision.position_grid) == (128, 1176, 24)
    assert text.eos_token_id == (151329, 151336, 151338, 151348)
    assert Glm4vConfig.from_dict(config.to_dict()) == config
    assert Glm4vTextConfig().mrope_section == (8, 12, 12)  # so that the defaults can run


def test_absent_fields_follow_from_others():
    assert Glm4vTextConfig(num_key_value_heads=None).num_key_value_heads == 32
    assert Glm4vTextConfig(rope_scaling={"mrope_section": [16, 24, 24]}).partial_rotary_factor == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Glm4vTextConfig(num_attention_heads=3),
            "hidden_size: found 4096; expected a multiple of num_attention_heads",
        ),
        (lambda: Glm4vTextConfig(num_key_value_heads=5), "expected a multiple of num_key_value_heads, 5"),
        (lambda: Glm4vTextConfig(vocab_size=0), "vocab_size: found 0; expected an integer"),
        (lambda: Glm4vTextConfig(hidden_size="64"), "hidden_size: found '64'"),
        (lambda: Glm4vVisionConfig(num_heads=7), "expected a multiple of num_heads, 7"),
        (lambda: Glm4vVisionConfig(hidden_size=24, num_heads=4), "num_heads: found 6; expected a multiple of 4"),
        (lambda: Glm4vConfig(vision_config=Glm4vVisionConfig(out_hidden_size=8)), "out_hidden_size: found 8; expected"),
        (lambda: RopeScaling("su"), "rope_type: found 'su'; expected one of 'default', 'linear'"),
        (lambda: RopeScaling("yarn"), "expected factor with it"),
        (lambda: RopeScaling("longrope", short_factor=(1.0,)), "expected long_factor with it"),
        (lambda: RopeScaling("llama3", factor=2.0), "expected original_max_position_embeddings, low_freq_factor, high"),
        (lambda: RopeScaling("linear", factor=0.5), "factor: found 0.5; expected a number of at least 1"),
        (lambda: RopeScaling(mrope_section=(1, 2)), r"mrope_section: found \(1, 2\); expected three"),
        (lambda: Glm4vTextConfig(rope_scaling={"mrope_section": [1, 1, 2]}).mrope_section, "sums to 4; expected 64"),
        (
            lambda: Glm4vConfig.from_dict({"model_type": "glm4v_moe"}),
            r"'glm4v_moe' \(GLM-4.5V or GLM-4.6V, a mixture of",
        ),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, CheckpointError, r"found no config\.json"),
        ("[1]", CheckpointError, "found a JSON list; expected an object"),
        ('{"text_config": {"num_attention_heads": 3}}', ConfigError, r"config\.json: text_config\.hidden_size"),
    ],
)
def test_a_directory_without_a_configuration_is_refused(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(error, match=message):
        Glm4vConfig.from_pretrained(tmp_path)


def test_an_absent_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        Glm4vConfig.from_pretrained(tmp_path / "nowhere")


LINEAR = {"rope_type": "linear", "factor": 2.0, "mrope_section": [1, 1, 2]}
LONGROPE = {"rope_type": "longrope", "mrope_section": [1, 1, 2]}


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("text_config", "num_key_value_heads", 0, "num_key_value_heads: found 0"),
        ("text_config", "hidden_act", "mish", "hidden_act: found 'mish'; expected one of 'gelu', "),
        ("text_config", "rope_theta", "a", "rope_theta: found 'a'; expected a number above 0"),
        ("text_config", "rms_norm_eps", None, "rms_norm_eps: found None"),
        ("vision_config", "temporal_patch_size", 0, "temporal_patch_size: found 0"),
        ("vision_config", "image_size", 13, "image_size: found 13; expected at least patch_size, 14"),
        ("text_config", "attention_dropout", 2.0, "attention_dropout: found 2.0; expected a number from 0 to 1"),
        (
            "text_config", "rope_scaling", LONGROPE | {"short_factor": [1.0] * 3, "long_factor": [1.0] * 4},
            "short_factor: found 3 numbers; expected 4",
        ),
        (None, "image_token_id", 320, "image_token_id: found 320; expected a token below vocab_size, 320"),
        (None, "text_config", "x", "text_config: found 'x'; expected an object"),
        (None, "text_config", ..., "text_config: found nothing"),
        (None, "vision_config", [1], r"vision_config: found \[1\]; expected an object"),
        (None, "quantization_config", {"bits": 4}, r"config\.quant_method: found None; expected 'compressed-tensors'"),
        ("text_config", "rope_scaling", "x", "rope_scaling: found 'x'; expected an object"),
        ("text_config", "rope_parameters", "x", "rope_parameters: found 'x'; expected an object"),
        (
            "text_config", "rope_scaling", {"rope_type": []},
            r"rope_scaling.rope_type: found \[\]; expected one of 'default'",
        ),
        ("text_config", "rope_scaling", LINEAR | {"factor": "2"}, "rope_scaling.factor: found '2'; expected a number"),
        (
            "text_config", "rope_scaling", LINEAR | {"short_factor": ["a"]},
            r"short_factor: found \['a'\]; expected a list",
        ),
        (
            "text_config", "rope_scaling", {"mrope_section": [1.0, 1.0, 2.0]},
            r"mrope_section: found \[1.0, 1.0, 2.0\]; exp",
        ),
        ("text_config", "rope_scaling", {"mrope_section": 3}, "mrope_section: found 3; expected three counts"),
        ("text_config", "tie_word_embeddings", "no", "tie_word_embeddings: found 'no'; expected true or false"),
        ("text_config", "initializer_range", "a", "initializer_range: found 'a'; expected a number of at least 0"),
        ("text_config", "eos_token_id", "x", "eos_token_id: found 'x'; expected a list of integers or an integer"),
        ("text_config", "eos_token_id", [1, True], r"eos_token_id: found \[1, True\]; expected a list of"),
        ("text_config", "pad_token_id", 1.0, "pad_token_id: found 1.0; expected an integer"),
        ("text_config", "hidden_size", 2**31, r"hidden_size: found 2147483648; expected an integer"),
        ("text_config", "rope_theta", 10**400, "rope_theta: found 1000*; expected a number above 0"),
    ],
)  # fmt: skip
def test_an_invalid_field_is_reported_with_its_file(tmp_path, part, field, value, message):
    data = json.loads(json.dumps(CONFIGS["base"]))
    (data if part is None else data[part])[field] = value
    if value is ...:
        del data[field]
    (tmp_path / "config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(tmp_path))}/config\.json: .*{message}"):
        Glm4vConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("quantization_config", [{}, None])
def test_an_empty_quantization_config_is_ignored(quantization_config):
    data = CONFIGS["base"] | {"quantization_config": quantization_config}
    assert Glm4vConfig.from_dict(data) == Glm4vConfig.from_dict(CONFIGS["base"])


def test_every_activation_is_computed():
    names = get_args(Activation)
    assert sorted(names) == sorted(["gelu", *nn.ACTIVATIONS])
    for name in names:
        assert nn.activation(name, np.float32(1.0)) > 0.6  # as each of them is at 1
    with pytest.raises(ConfigError, match="hidden_act: found 'mish'"):
        nn.activation("mish", np.float32(1.0))


def test_unknown_keys_are_ignored():
    data = json.loads(json.dumps(CONFIGS["base"]))
    data["text_config"]["torch_dtype"] = data["transformers_version"] = data["vision_config"]["novel"] = "x"
    assert Glm4vConfig.from_dict(data) == Glm4vConfig.from_dict(CONFIGS["base"])
