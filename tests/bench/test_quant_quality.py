"""Quantised weights give the tokens of float32, as far as is aimed at."""

import json

import jax
import jax.numpy as jnp
import pytest

from bench import quant_quality, report
from glm4v_jax import Glm4vProcessor
from glm4v_jax.checkpoints.load import INT4_QUALITY
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.generate.device_steps import init_state
from glm4v_jax.tiny import TINY_CHECKPOINT

PROMPTS = 24


@pytest.fixture(scope="module")
def batches():
    return quant_quality.batches_of(Glm4vProcessor.from_pretrained(TINY_CHECKPOINT), PROMPTS)


@pytest.fixture(scope="module")
def exact(batches):
    return quant_quality.log_probabilities(quant_quality.load(None, stacked=True), batches)


@pytest.mark.slow
def test_answers_follow_prompts(batches):
    (inputs, is_counted), *_ = batches
    assert is_counted.any(axis=1).all() and len(is_counted) == PROMPTS
    tokenizer = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT).tokenizer
    answer = tokenizer.decode(inputs["input_ids"][0, 1:][is_counted[0, :-1]])
    assert answer.startswith("<think>One digit.</think><answer>") and answer.endswith("</answer>")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:int4 by rounding", "ignore:jax 0")
@pytest.mark.parametrize("scheme", quant_quality.SCHEMES)
def test_tokens_are_those_of_float32(exact, batches, scheme):
    model = quant_quality.load(scheme, stacked=True)  # compiles in the time of one layer
    figures = quant_quality.compare(exact, quant_quality.log_probabilities(model, batches))
    assert quant_quality.is_good(scheme, figures) and figures["tokens"] > 400, figures
    assert figures["kl_mean"] > 1e-6  # or nothing was quantised
    # What is kept from one token to the next is in floats, whatever the embedding is in.
    with use_mesh(model.mesh):
        state = jax.eval_shape(lambda text: init_state(text, 1, 256, 1, stacked=False), model.runtime.text)
    assert {array.dtype for array in (state.hidden, *state.cache.k, *state.cache.v)} == {jnp.dtype("float32")}


def test_the_measured_figures_pass_and_are_those_of_the_warning():
    found = json.loads((report.RESULTS / "quant_quality.json").read_text(encoding="utf-8"))
    lines = {line["scheme"]: line for line in found["lines"]}
    assert found["passed"] and all(quant_quality.is_good(name, lines[name]) for name in quant_quality.SCHEMES)
    assert f"{lines['int4']['agreement']:.1%} of tokens" in INT4_QUALITY
    assert f"of int8 {lines['int8']['agreement']:.1%}" in INT4_QUALITY
    for task in quant_quality.EVALUATED:
        low, high = lines["float32"]["tasks"][task]["interval"]
        assert low <= lines["int8"]["tasks"][task]["score"] <= high
