"""Presets: valid options over those of the released checkpoint, and what they amount to in the reference."""

import dataclasses
import json

import pytest
from helpers_released import GENERATION_CONFIG
from helpers_transformers import import_transformers

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.presets import PRESETS, preset
from glm4v_jax.errors import GenerationError


@pytest.fixture
def released(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    return GenerationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_keeps_the_rest(released, name):
    config = released.replace(**preset(name))
    for field in dataclasses.fields(config):
        expected = PRESETS[name].options.get(field.name, getattr(released, field.name))
        assert getattr(config, field.name) == expected, field.name


# temperature, top_p, top_k, repetition penalty, new tokens; of the sources, over those of the checkpoint.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cli", (True, 1.0, 1e-5, 1, 1.1, 8192)),
        ("gradio", (True, 1.0, 1e-5, 2, 1.1, 8192)),
        ("bench", (True, 0.1, 0.6, 2, 1.0, 8192)),
        ("api", (True, 1.0, 0.6, 2, 1.0, 25_000)),
        ("agent", (True, 0.001, 0.6, 2, 1.0, 8192)),
        ("hf", (True, 0.8, 0.6, 2, 1.0, None)),
        ("rollouts", (True, 0.8, 1.0, 0, 1.0, None)),
        ("ocr", (False, 0.8, 0.6, 2, 1.1, 8192)),
        ("greedy", (False, 0.8, 0.6, 2, 1.0, None)),
    ],
)
def test_numbers_are_those_of_the_source(released, name, expected):
    config = released.replace(**preset(name))
    names = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    assert tuple(getattr(config, name) for name in names) == expected


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("cli", "temperature 1.0, top-p 1e-05, top-k 1, repetition penalty 1.1, at most 8,192 tokens"),
        ("bench", "temperature 0.1, thinking capped at 8,192 tokens, the answer at 8,192"),
        ("hf", "the checkpoint's generation_config.json"),
        ("rollouts", "top-p 1.0, top-k off"),
        ("ocr", "greedy decoding, repetition penalty 1.1, at most 8,192 tokens"),
        ("greedy", "greedy decoding"),
    ],
)
def test_the_description_is_the_numbers(name, description):
    assert PRESETS[name].description == description


def test_bench_forces_an_answer(released):
    config = released.replace(**preset("bench"))
    assert (config.think_budget, config.answer_budget) == (8192, 8192)


def test_no_temperature_is_temperature_one_in_the_reference():
    """What the preset `gradio` says of the script's `temperature=None`."""
    generation = import_transformers().generation
    theirs = generation.GenerationConfig(**GENERATION_CONFIG)
    theirs.update(temperature=None)
    processors = generation.GenerationMixin()._get_logits_processor(theirs, input_ids_seq_length=1)
    names = [type(processor).__name__ for processor in processors]
    assert names == ["TopKLogitsWarper", "TopPLogitsWarper"]


def test_a_preset_is_a_copy():
    preset("cli")["top_k"] = 5
    assert preset("cli")["top_k"] == 1
    with pytest.raises(TypeError):
        PRESETS["cli"].options["top_k"] = 5


def test_an_unknown_name_is_refused():
    with pytest.raises(GenerationError, match=r"preset: found 'cil'; expected one of cli, gradio, .*greedy"):
        preset("cil")
