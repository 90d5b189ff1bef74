"""The packaged checkpoint: it knows its digits, its figures are its own, and it is a GLM-4.1V to the reference."""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_transformers import import_transformers

from glm4v_jax import Engine, Glm4vForConditionalGeneration
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.generate.text.thinking import parse
from glm4v_jax.hf.outputs import PastKeyValues
from glm4v_jax.model.kv_cache import init_cache
from glm4v_jax.tiny import TINY_CHECKPOINT
from glm4v_jax.tiny.digits import NUM_HELD_OUT, held_out
from tools.digit_scores import score
from tools.score_tiny import AIMS, NAMES, SLOTS, answers, shuffled_frames
from tools.tiny_model import TEXT, VISION, VOCABULARY
from tools.train_tiny import REPORT

pytest.importorskip("sklearn")

SAMPLE = 24
SLACK = 0.05
"""Of an accuracy, since a sample is not all of them."""


@pytest.fixture(scope="module")
def figures():
    """What is said about it: name -> row of the table."""
    said = json.loads(REPORT.with_suffix(".json").read_text())
    assert said["weights"] == hashlib.sha256((TINY_CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()
    return {row["name"]: row["scores"] for row in said["rows"]}


@pytest.fixture(scope="module")
def engine():
    """Its layers are stacked, and compile in the time of one."""
    return Engine.from_pretrained(TINY_CHECKPOINT, num_slots=SLOTS, stacked=True)


def test_the_figures_reach_the_aims(figures):
    for task, aim in AIMS.items():
        assert figures[NAMES[task]]["accuracy"] >= aim
        assert (figures[NAMES[task]]["format"], figures[NAMES[task]]["count"]) == (1.0, NUM_HELD_OUT)
    assert figures["grounding, two digits"]["wrong_object"] < 0.25
    assert figures["motion, frames shuffled"]["accuracy"] < 0.6
    # Without M-RoPE.
    for name in ("grounding, one digit", "grounding, two digits"):
        assert figures[f"{name}, positions flat"]["accuracy"] < figures[name]["accuracy"] - 0.2


@pytest.mark.slow
@pytest.mark.parametrize("task", AIMS)
def test_a_sample_is_answered_as_the_figures_say(engine, figures, task):
    truth = held_out(task)[:SAMPLE]
    found = score(answers(engine, truth), truth)
    assert found.accuracy >= AIMS[task] - SLACK
    assert found.format == 1
    # Two standard deviations of a sample's mean.
    expected = figures[NAMES[task]]["accuracy"]
    assert found.accuracy >= expected - 2 * np.sqrt(expected * (1 - expected) / SAMPLE) - 1 / SAMPLE


@pytest.mark.slow
def test_an_int8_cache_is_as_good_as_exact(engine):
    """Next tokens of whole conversations, and greedy answers of a task: nearly all are those of a float32 cache."""
    truth = [example for task in AIMS for example in held_out(task)[:12]]
    inputs = engine.processor.apply_chat_template(
        [list(example.messages) for example in truth], tokenize=True, return_dict=True, padding=True
    )
    model = Glm4vForConditionalGeneration(engine.runtime.config, module=engine.runtime.module)
    with use_mesh(model.mesh):
        make = functools.partial(init_cache, model.config.text_config, len(truth), 64)
        past = PastKeyValues(make(jnp.int8), np.zeros((len(truth), 1), np.int32), 0)
    given = dict(inputs, logits_to_keep=20)
    exact, found = (
        np.asarray(jax.nn.log_softmax(model(**given, past_key_values=cache).logits)) for cache in (None, past)
    )
    assert np.mean(exact.argmax(axis=-1) == found.argmax(axis=-1)) >= 0.99
    assert 1e-6 < np.mean(np.sum(np.exp(exact) * (exact - found), axis=-1)) <= 5e-4
    grounding = held_out("grounding2")[:SAMPLE]
    own = Engine(engine.model, engine.processor, num_slots=SLOTS, cache_dtype="int8")
    pairs = zip(answers(engine, grounding), answers(own, grounding), strict=True)
    assert np.mean([one == other for one, other in pairs]) >= 0.9


def test_scores_drop_without_the_order_of_frames_or_positions(engine):
    """Time for the direction, places for the box."""
    motion = [shuffled_frames(example, number) for number, example in enumerate(held_out("motion")[:SAMPLE])]
    assert score(answers(engine, motion), motion).accuracy < 0.75
    grounding = held_out("grounding1")[:SAMPLE]
    assert score(answers(engine, grounding, flat=True), grounding).accuracy < AIMS["grounding1"] - 0.1


def test_thoughts_name_what_is_there(engine):
    truth = held_out("grounding2")[:SAMPLE]
    thoughts = [parse(example.messages[1]["content"][0]["text"]).thought for example in truth]
    assert np.mean([parse(a).thought == t for a, t in zip(answers(engine, truth), thoughts, strict=True)]) > 0.7


def test_it_is_small_and_has_the_released_files():
    assert sum(path.stat().st_size for path in TINY_CHECKPOINT.iterdir()) < 8_000_000
    for name in ("chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json"):
        assert (TINY_CHECKPOINT / name).read_bytes() == (RANDOM_CHECKPOINT / name).read_bytes()
    config = json.loads((TINY_CHECKPOINT / "config.json").read_text())
    assert config["text_config"].items() >= TEXT.items() and config["vision_config"].items() >= VISION.items()
    assert config["text_config"]["vocab_size"] == VOCABULARY.rows


@pytest.mark.slow
def test_the_reference_says_the_same(engine):
    """Tokens, and logits of an image's question with its answer."""
    transformers = import_transformers()
    import torch

    theirs, report = transformers.Glm4vForConditionalGeneration.from_pretrained(
        TINY_CHECKPOINT, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    example = held_out("grounding2")[0]
    inputs = engine.processor.apply_chat_template(list(example.messages), tokenize=True, return_dict=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_CHECKPOINT)
    text = tokenizer.decode(inputs["input_ids"][0])
    assert tokenizer(text)["input_ids"] == inputs["input_ids"][0].tolist()
    assert text.endswith(example.messages[1]["content"][0]["text"])
    with torch.no_grad():
        expected = theirs.eval()(**{name: torch.as_tensor(value) for name, value in inputs.items()}).logits.numpy()
    model = Glm4vForConditionalGeneration(engine.runtime.config, module=engine.runtime.module)
    found = np.asarray(model(**inputs).logits)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    # Each answer's token is the likeliest but where coordinates are a matter of opinion.
    assert (found[0, :-1].argmax(-1) == inputs["input_ids"][0, 1:])[-28:].mean() > 0.7
