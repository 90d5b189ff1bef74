"""Released checkpoints of the family: as their files say, at both sizes."""

import json

import pytest
from helpers_paths import ROOT

from glm4v_jax.config.family import ARCHITECTURES, PROCESSORS
from glm4v_jax.config.members import DEFAULT, MEMBERS, find_member
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.tiny import TINY_CHECKPOINT

# config.json of the releases, without what is the same in both spellings' defaults.
FLASH = {
    "model_type": "glm4v",
    "text_config": {
        "attention_bias": True, "eos_token_id": [151329, 151336, 151338], "hidden_size": 4096,
        "intermediate_size": 13696, "max_position_embeddings": 131072, "model_type": "glm4v_text",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329,
        "rope_parameters": {
            "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5, "rope_theta": 500000, "rope_type": "default",
        },
        "vocab_size": 151552,
    },
    "image_start_token_id": 151339, "image_end_token_id": 151340, "video_start_token_id": 151341,
    "video_end_token_id": 151342, "image_token_id": 151363, "video_token_id": 151364,
    "vision_config": {"depth": 24, "hidden_size": 1536, "model_type": "glm4v_vision", "num_heads": 12},
}  # fmt: skip
OCR = {
    "model_type": "glm_ocr",
    "text_config": {
        "model_type": "glm_ocr_text", "pad_token_id": 59246, "vocab_size": 59392, "eos_token_id": [59246, 59253],
        "attention_bias": False, "head_dim": 128, "hidden_size": 1536, "intermediate_size": 4608,
        "max_position_embeddings": 131072, "num_attention_heads": 16, "num_hidden_layers": 16,
        "num_nextn_predict_layers": 1, "num_key_value_heads": 8, "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [16, 24, 24], "partial_rotary_factor": 1.0, "rope_theta": 10000,
        },
    },
    "vision_config": {
        "model_type": "glm_ocr_vision", "hidden_size": 1024, "depth": 24, "num_heads": 16, "attention_bias": True,
        "intermediate_size": 4096, "image_size": 336, "patch_size": 14, "out_hidden_size": 1536,
    },
    "image_start_token_id": 59256, "image_end_token_id": 59257, "video_start_token_id": 59258,
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [("GLM-4.6V-Flash", FLASH), ("GLM-OCR", OCR)])
def test_configurations_equal_those_of_the_released_files(name, content):
    assert MEMBERS[name].config() == Glm4vConfig.from_dict(content)


def test_the_first_is_the_model_of_this_package():
    assert next(iter(MEMBERS)) == DEFAULT and MEMBERS[DEFAULT].config() == Glm4vConfig.glm4_1v_9b()


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_is_a_row_of_both_tables_at_both_sizes(name):
    member = MEMBERS[name]
    assert member.model_type in ARCHITECTURES and member.processors in PROCESSORS
    full, tiny = member.config(), member.config(tiny=True)
    for config in (full, tiny):
        assert Glm4vConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    packaged = Glm4vConfig.from_pretrained(TINY_CHECKPOINT)
    assert tiny.text_config.vocab_size == packaged.text_config.vocab_size
    assert (tiny.image_token_id, tiny.video_end_token_id) == (packaged.image_token_id, packaged.video_end_token_id)
    for text in (full.text_config, tiny.text_config):
        widths = text.head_dim * text.num_attention_heads
        assert (widths == text.hidden_size) == (name != "GLM-OCR")
        assert text.pad_token_id == text.eos_token_id[0] and len(text.eos_token_id) == len(member.ends)
    assert tiny.text_config.rope_theta == full.text_config.rope_theta
    assert tiny.text_config.num_nextn_predict_layers == full.text_config.num_nextn_predict_layers


@pytest.mark.parametrize(
    ("name", "vision"),
    [(DEFAULT, "glm4v"), ("GLM-4.6V-Flash", "glm4v"), ("GLM-GA", "glm4v_vision"), ("GLM-OCR", "glm_ocr_vision")],
)
def test_the_vit_is_written_under_the_name_that_transformers_knows_it_by(name, vision):
    """4.57 writes "glm4v"; for GLM-GA 5.24 chooses the class of the part by it, and would make a second 9B of that."""
    assert MEMBERS[name].config().to_dict()["vision_config"]["model_type"] == vision


def test_the_page_has_every_member_as_it_is():
    rows = [line.split("|") for line in (ROOT / "docs/models.md").read_text().splitlines() if line.startswith("|")]
    told = {cells[1].strip(): [cell.strip().replace("`", "") for cell in cells[2:]] for cells in rows}
    for name, member in MEMBERS.items():
        works = told[f"[{name}](https://huggingface.co/{member.repository})"]
        assert works[0] == "yes" and ("not at hand" in works[1]) == member.is_base
        answers, tools, _, time, *_ = told[name]
        assert (answers, tools) == (member.thinking, member.tools)
        text = PROCESSORS[member.processors].time_text
        assert time == text.format(whole=12, seconds=12)


def test_names_are_found_whatever_the_case():
    assert find_member("glm-4.6v-flash") is MEMBERS["GLM-4.6V-Flash"] and find_member("models/glm") is None
