"""Configurations as transformers 5.24 writes them: the same model and processors as the release's files."""

import json
import shutil

import pytest
from helpers_family import GOLDEN, KINDS

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.inputs.processor import Glm4vProcessor

SAVED = json.loads((GOLDEN / "saved_files.json").read_text(encoding="utf-8"))


@pytest.fixture(params=KINDS)
def both(request, family_checkpoint, tmp_path):
    """The kind, its checkpoint, and the same with files of transformers 5.24."""
    source = family_checkpoint(request.param)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(source / name, tmp_path)
    for name, content in SAVED[request.param].items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    return request.param, source, tmp_path


def test_files_of_transformers_5_say_the_same(both):
    kind, *directories = both
    config, same_config = map(Glm4vConfig.from_pretrained, directories)
    assert same_config == config
    processor, same = map(Glm4vProcessor.from_pretrained, directories)
    for part in ("image_processor", "video_processor"):
        assert getattr(same, part).row == getattr(processor, part).row
        assert getattr(same, part).to_dict() == getattr(processor, part).to_dict()
    if kind == "glm4v":
        return  # 5.24 also writes a tokenizer.json that has all tokens of the older tokenizer_config.json
    prompt = "".join(token for token in processor.tokenizer.get_vocab() if token.startswith(("<", "["))) + " /nothink"
    assert same.tokenizer(prompt).input_ids == processor.tokenizer(prompt).input_ids
    assert same.tokenizer.all_special_ids == processor.tokenizer.all_special_ids


def test_a_model_is_written_so_that_5_24_reads_its_vit(family_checkpoint):
    """As part of another model it would take "glm4v" for a whole GLM-4.1V, and make one of full size."""
    for kind in ("glmga", "ocr"):
        written = Glm4vConfig.from_pretrained(family_checkpoint(kind)).to_dict()["vision_config"]
        assert written["model_type"] == SAVED[kind]["config.json"]["vision_config"]["model_type"]
