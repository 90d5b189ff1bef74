"""The siblings' configurations: in their own spellings, their structure, and refusals of others by name."""

import json

import pytest

from glm4v_jax.config.family import ARCHITECTURES, REFUSED, TEXT, VISION
from glm4v_jax.config.model import Glm4vConfig, Glm4vTextConfig, Glm4vVisionConfig
from glm4v_jax.errors import ConfigError

# As the released files say it, 5.x's spelling; fields at their defaults are left out.
FLASH = {
    "architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v", "tie_word_embeddings": False,
    "image_token_id": 151363, "video_token_id": 151364, "transformers_version": "5.0.0rc0",
    "text_config": {
        "model_type": "glm4v_text", "attention_bias": True, "dtype": "bfloat16", "max_position_embeddings": 131072,
        "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5, "rope_theta": 500000,
        },
    },
    "vision_config": {"model_type": "glm4v_vision", "hidden_dropout_prob": 0.0},
}  # fmt: skip
OCR = {
    "architectures": ["GlmOcrForConditionalGeneration"], "model_type": "glm_ocr", "eos_token_id": [59246, 59253],
    "text_config": {
        "model_type": "glm_ocr_text", "attention_bias": False, "dtype": "bfloat16", "head_dim": 128,
        "hidden_size": 1536, "intermediate_size": 4608, "num_nextn_predict_layers": 1, "pad_token_id": 59246,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [16, 24, 24], "partial_rotary_factor": 1.0, "rope_theta": 10000,
        },
    },
    "vision_config": {
        "model_type": "glm_ocr_vision", "intermediate_size": 4096,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    },
}  # fmt: skip
GA = FLASH | {"architectures": ["Glm46VForConditionalGeneration"], "model_type": "glmga"}


@pytest.mark.parametrize("data", [FLASH, GA, OCR], ids=["flash", "ga", "ocr"])
def test_a_members_file_is_read_and_written_with_its_own_names(data):
    config = Glm4vConfig.from_dict(data)
    written = json.loads(json.dumps(config.to_dict()))
    assert Glm4vConfig.from_dict(written) == config and hash(Glm4vConfig.from_dict(written)) == hash(config)
    assert written["model_type"] == data["model_type"] and written["architectures"] == data["architectures"]
    assert (written["text_config"]["model_type"], written["vision_config"]["model_type"]) in {
        ("glm4v_text", "glm4v"), ("glm4v_text", "glm4v_vision"), ("glm_ocr_text", "glm_ocr_vision"),
    }  # fmt: skip


def test_flash_and_ga_differ_from_glm_4_1v_by_fields_of_the_file_alone():
    for data in (FLASH, GA):
        config = Glm4vConfig.from_dict(data)
        assert (config.text_config.rope_theta, config.text_config.rotary_dim) == (500000.0, 64)
        assert config.text_config.structure is TEXT["glm4v_text"] and config.vision_config == Glm4vVisionConfig()
        assert (config.image_token_id, config.text_config.eos_token_id) == (151363, (151329, 151336, 151338))
    assert Glm4vConfig.from_dict(GA).video_start_token_id == 151361  # the default of its class, as the file says none


def test_glm_ocr_has_its_structure():
    config = Glm4vConfig.from_dict(OCR)
    text, vision = config.text_config, config.vision_config
    assert (text.vocab_size, text.head_dim, text.rotary_dim, text.num_key_value_groups) == (59392, 128, 128, 2)
    assert (text.mrope_section, text.structure.attention_bias) == ((16, 24, 24), False)
    assert text.eos_token_id == (59246, 59253)  # from the top of the file
    assert (vision.hidden_size, vision.num_heads, vision.head_dim, vision.position_grid) == (1024, 16, 64, 0)
    assert (vision.attention_bias, vision.mlp_bias, vision.mlp_width, vision.merger_width) == (True, True, 4096, 4608)
    assert vision.structure.qk_norm and not vision.structure.post_conv_norm
    assert config.image_token_id == 59280
    written = config.to_dict()["text_config"]
    assert written["rope_parameters"]["rope_theta"] == 10000 and "rope_theta" not in written
    assert (written["head_dim"], written["num_nextn_predict_layers"], written["attention_bias"]) == (128, 1, False)


@pytest.mark.parametrize(("model_type", "tied"), [("glm4v", False), ("glmga", True)])
def test_a_head_is_tied_at_the_top_of_files_that_only_5x_reads(model_type, tied):
    config = Glm4vConfig.from_dict(FLASH | {"model_type": model_type, "tie_word_embeddings": True})
    assert config.text_config.tie_word_embeddings == tied


def test_a_base_of_the_vits_own_rope_is_kept():
    config = Glm4vConfig.from_dict(OCR | {"vision_config": {"rope_parameters": {"rope_theta": 500.0}}})
    assert config.vision_config.rope_theta == 500.0
    assert Glm4vConfig.from_dict(config.to_dict()) == config


def test_every_row_names_parts_that_are_there():
    for row in ARCHITECTURES.values():
        assert row.text in TEXT and row.vision in VISION
    assert not ARCHITECTURES.keys() & REFUSED.keys()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"model_type": "glm4v_moe"},
            r"'glm4v_moe' \(GLM-4.5V or GLM-4.6V, a mixture of experts\); expected one of 'g",
        ),
        ({"model_type": "chatglm"}, r"'chatglm' \(glm-4v-9b"),
        ({"model_type": "qwen2_5_vl"}, r"'qwen2_5_vl' \(Qwen2.5-VL\)"),
        ({"model_type": "another"}, "model_type: found 'another'; expected one of 'glm4v'"),
        ({"model_type": ["glm4v"]}, r"model_type: found \['glm4v'\]; expected"),
        (
            FLASH | {"model_type": "glm46v", "text_config": {"model_type": "glm4v_moe_text"}},
            r"text_config.model_type: found 'glm4v_moe_text' \(GLM-4.5V",
        ),
        (
            FLASH | {"vision_config": {"model_type": "glm_ocr_vision"}},
            "vision_config.model_type: found 'glm_ocr_vision'; expected 'glm4v', as of model_type 'glm4v'",
        ),
        (
            {"text_config": {"model_type": "glm_ocr_text"}},
            "text_config.model_type: found 'glm_ocr_text'; expected 'glm4v_text', as of model_type 'glm4v'",
        ),
    ],
)
def test_another_model_is_refused_by_name(data, message):
    with pytest.raises(ConfigError, match=message):
        Glm4vConfig.from_dict(data)


def test_a_part_of_no_model_is_refused():
    with pytest.raises(ConfigError, match=r"text_config.model_type: found 'x'; expected one of 'glm4v_text'"):
        Glm4vTextConfig(model_type="x")
