"""bench.parity on a few cases: what is equal passes, and what is not is noticed."""

import itertools

import pytest
from helpers_transformers import import_transformers

from glm4v_jax import Glm4vForConditionalGeneration, Glm4vProcessor
from glm4v_jax.tiny import TINY_CHECKPOINT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parity():
    import_transformers()
    from bench import parity

    return parity


@pytest.fixture(scope="module")
def parity_options(parity):
    from bench import parity_options

    return parity_options


@pytest.fixture(scope="module")
def models(parity, tmp_path_factory):
    directory = tmp_path_factory.mktemp("parity")
    return parity.load_models(parity.models.write_checkpoint(directory, parity.models.PACKAGED))


@pytest.fixture(scope="module")
def processors(parity):
    return parity.reference.load_processor(TINY_CHECKPOINT), Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)


@pytest.fixture(scope="module")
def line(parity, processors, models):
    conversations = [parity._user(parity._text("Hi")), parity._user(parity._crop("chelsea.png", (0, 0, 90, 60)))]
    return parity.compare_case("both", conversations, "right", processors, models, new_tokens=4)


def test_a_batch_through_processors_and_models_passes(line):
    assert line.passed and line.inputs_equal
    assert (line.prompts, line.greedy_tokens, line.patches) == (2, 8, 6 * 8)
    assert 0 < line.logit_difference < line.smallest_margin < 1


@pytest.mark.parametrize(
    "wrong",
    [
        dict(inputs_equal=False), dict(positions_equal=False), dict(logit_difference=1.1e-5), dict(greedy_equal=7),
        dict(distinct_tokens=1), dict(smallest_margin=1e-9), dict(logit_difference=float("nan")),
    ],
)  # fmt: skip
def test_any_difference_fails_a_model_line(parity, line, wrong):
    assert not parity.dataclasses.replace(line, **wrong).passed


def test_options_of_generation_pass(parity, parity_options, processors, models):
    inputs = parity._prepare(processors[0], [parity._user(parity._text("Hi"))], "left")
    tokenizers = tuple(each.tokenizer for each in processors)
    assert len(list(parity_options.scenarios(list(range(64)), tokenizers))) >= 11
    # Those that share a program.
    lines = list(itertools.islice(parity_options.compare_options(models, inputs, tokenizers, new_tokens=24), 3))
    assert all(line.passed for line in lines)
    wrong = (
        dict(tokens_equal=23),
        dict(differs=False),
        dict(score_difference=float("inf")),
        dict(logit_difference=1.1e-5),
    )
    assert not any(parity.dataclasses.replace(lines[1], **changes).passed for changes in wrong)


def test_beams_pass(parity, parity_options, processors, models):
    inputs = parity._prepare(processors[0], [parity._user(parity._text("Hi"))], "left")
    # Those that share a program.
    lines = list(itertools.islice(parity_options.compare_beams(models, inputs, new_tokens=24), 4))
    assert [line.case for line in lines if not line.passed] == []
    assert len({line.tokens for line in lines}) > 1


def test_a_configuration_without_a_processor_passes(parity, tmp_path):
    (line,) = parity.compare_configs(tmp_path, names=["base"], new_tokens=2)
    assert line.passed and line.inputs_equal is None and line.tokens > 500


def test_other_weights_are_noticed(parity, processors, models):
    packaged = Glm4vForConditionalGeneration.from_pretrained(TINY_CHECKPOINT)
    conversations = [parity._user(parity._text("Hi"))]
    line = parity.compare_case("wrong", conversations, "left", processors, (models[0], packaged), new_tokens=2)
    assert line.logit_difference > 1e-2 and not line.passed


def test_a_photograph_passes(parity, processors):
    line = parity.compare_image("chelsea.png", processors)
    assert line.passed and (line.size, line.grid) == ((300, 451), [1, 22, 32])


def test_a_video_passes(parity, processors):
    line = parity.compare_video("carphone_distorted.mp4", processors)
    assert line.passed and (line.size, line.grid) == ((120, 144, 176), [4, 10, 12])


def test_another_filter_is_noticed(parity, processors):
    bilinear = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT, resample=2)
    line = parity.compare_image("chelsea.png", (processors[0], bilinear))
    assert line.resize_steps > 1 and not line.passed
