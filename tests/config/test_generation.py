"""Generation options: defaults, files and precedence of transformers 4.57.1, and one named error for nonsense."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_released import GENERATION_CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v_jax.config.generation import GenerationConfig, SamplingParams
from glm4v_jax.config.grammar import KINDS
from glm4v_jax.errors import CheckpointError, GenerationError


def _directory(path: Path, **files) -> Path:
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


OWN = {
    "seed", "think_budget", "answer_budget", "stop_repetition", "logprobs", "logprobs_of", "logits_processor", *KINDS,
}  # fmt: skip
"""Options that the reference does not have."""


def _reference():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers").GenerationConfig


def _assert_equal_to_reference(ours, reference):
    for field in dataclasses.fields(ours):
        if field.name in OWN:
            continue
        value, expected = getattr(ours, field.name), getattr(reference, field.name)
        if field.name == "eos_token_id":
            expected = () if expected is None else tuple(np.atleast_1d(expected).tolist())
        elif field.name == "max_length" and expected == 20:
            expected = None
        elif field.name == "min_p" and expected is None:
            expected = 0.0
        elif expected is None and isinstance(value, int | tuple):
            expected = type(value)()
        assert value == expected, field.name


class TestFiles:
    def test_the_released_file_is_read(self, tmp_path):
        config = GenerationConfig.from_pretrained(_directory(tmp_path, generation_config=GENERATION_CONFIG))
        assert config == GenerationConfig(
            do_sample=True,
            eos_token_id=(151329, 151336, 151338, 151348),
            pad_token_id=151329,
            top_p=0.6,
            temperature=0.8,
            top_k=2,
        )

    @pytest.mark.parametrize(
        "options",
        [
            GENERATION_CONFIG,
            {},
            {"do_sample": True},
            {"eos_token_id": 7, "max_length": 20},
            {"max_length": 300, "max_new_tokens": 40, "use_cache": False, "my_own_key": {"a": 1}},
            {"do_sample": True, "num_return_sequences": 3, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 5},
            {"num_beams": 1, "typical_p": 1.0, "min_length": 0, "bad_words_ids": None, "length_penalty": 1.0},
            {"num_beams": 4, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": -0.5},
            {"prompt_lookup_num_tokens": 7, "early_stopping": True},
        ],
    )
    def test_files_read_as_the_reference_reads_them(self, tmp_path, options):
        directory = _directory(tmp_path, generation_config=options)
        ours = GenerationConfig.from_pretrained(str(directory))
        assert ours.seed == 0
        _assert_equal_to_reference(ours, _reference().from_pretrained(directory))

    def test_defaults_are_the_references(self):
        _assert_equal_to_reference(GenerationConfig(), _reference()())

    @pytest.mark.parametrize(
        "model",
        [
            {"text_config": {"eos_token_id": [5, 6], "pad_token_id": 5}},
            {"text_config": {"eos_token_id": [5, 6], "pad_token_id": 5}, "eos_token_id": 9},
            {"text_config": {"eos_token_id": None}, "pad_token_id": 3},
            {"text_config": {}},
        ],
    )
    def test_without_a_file_the_models_configuration_gives_the_token_ids(self, tmp_path, model):
        ours = GenerationConfig.from_pretrained(_directory(tmp_path, config={"model_type": "glm4v"} | model))
        assert not ours.do_sample and ours.new_tokens(100) == 20
        _reference()
        from transformers import Glm4vConfig

        _assert_equal_to_reference(ours, _reference().from_model_config(Glm4vConfig(**model)))

    def test_an_empty_directory_gives_defaults(self, tmp_path):
        assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig()

    def test_nulls_switch_options_off(self):
        off = dict.fromkeys(["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]) | {"do_sample": True}
        config = GenerationConfig.from_dict(off | {"eos_token_id": None, "max_length": None})
        assert config == GenerationConfig(do_sample=True, top_k=0)

    @pytest.mark.parametrize("file", ["generation_config", "config"])
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "found invalid JSON"),
            ("", "found invalid JSON"),
            ("[" * 100_000, "found invalid JSON"),
            ("[1]", "found a JSON list; expected an object"),
            ('{"do_sample": true, "temperature": NaN}', "temperature: found nan; expected"),
            ('{"top_p": "most"}', "top_p: found 'most'; expected"),
            ('{"eos_token_id": [1, "</s>"]}', "eos_token_id: found [1, '</s>']; expected"),
            ('{"num_beam_groups": 4}', "num_beam_groups: found 4; expected 1, because this option is not supported"),
        ],
    )
    def test_malformed_files_are_named(self, tmp_path, file, content, message):
        with pytest.raises(CheckpointError, match=re.escape(message)) as error:
            GenerationConfig.from_pretrained(_directory(tmp_path, **{file: content}))
        assert str(tmp_path / f"{file}.json") in str(error.value)

    def test_a_file_that_is_not_text_is_refused(self, tmp_path):
        (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe{")
        with pytest.raises(CheckpointError, match="found invalid JSON"):
            GenerationConfig.from_pretrained(tmp_path)

    def test_an_absent_directory_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="found no directory"):
            GenerationConfig.from_pretrained(tmp_path / "none")


class TestChecks:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"do_sample": True, "temperature": float("nan")}, "temperature: found nan; expected a finite number"),
            ({"temperature": float("inf")}, "temperature: found inf"),
            ({"temperature": -0.5}, "temperature: found -0.5"),
            (
                {"do_sample": True, "temperature": 0.0},
                "temperature: found 0.0; expected a finite number .*do_sample=False",
            ),
            ({"do_sample": True, "temperature": 1e-40}, "temperature: found 1e-40"),
            ({"temperature": "hot"}, "temperature: found 'hot'"),
            ({"top_p": 0.0}, "top_p: found 0.0; expected a number above 0 and at most 1"),
            ({"top_k": -1}, "top_k: found -1; expected an integer of at least 0"),
            ({"min_p": -0.1}, "min_p: found -0.1"),
            ({"repetition_penalty": 0}, "repetition_penalty: found 0"),
            ({"max_new_tokens": 0}, "max_new_tokens: found 0; expected an integer of at least 1"),
            ({"num_return_sequences": 0}, "num_return_sequences: found 0"),
            ({"num_return_sequences": 2}, "num_return_sequences: found 2; expected 1 without do_sample=True"),
            (
                {"num_beams": 2, "num_return_sequences": 3},
                "num_return_sequences: found 3; expected at most num_beams=2",
            ),
            ({"num_beams": 2, "do_sample": True}, "num_beams: found 2; expected 1 with do_sample=True"),
            ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: found 3; expected nothing"),
            ({"num_beams": 2, "stop_strings": "a"}, "stop_strings: found .*; expected none beside num_beams"),
            ({"early_stopping": "always"}, "early_stopping: found 'always'; expected true, false or 'never'"),
            ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens: found 0; expected an integer of at least 1"),
            ({"eos_token_id": -2}, r"eos_token_id: found \(-2,\); expected a list of integers from -1 to 2147483647"),
            ({"pad_token_id": -1}, "pad_token_id: found -1"),
            ({"seed": 2**32}, "seed: found 4294967296; expected an integer from 0 to"),
            ({"do_sample": 1}, "do_sample: found 1; expected true or false"),
            ({"min_new_tokens": -1}, "min_new_tokens: found -1; expected an integer of at least 0"),
            ({"bad_words_ids": [1]}, r"bad_words_ids: found \[1\]; expected a list of lists of at least one token id"),
            ({"bad_words_ids": [[]]}, r"bad_words_ids: found \[\[\]\]"),
            ({"suppress_tokens": [-1]}, r"suppress_tokens: found \[-1\]; expected a list of integers from 0 to"),
            ({"sequence_bias": {5: 1.0}}, "sequence_bias: found .*; expected a number for each list of token ids"),
            ({"sequence_bias": {(5,): float("inf")}}, "sequence_bias: found inf; expected numbers from"),
            ({"sequence_bias": {(5,): float("nan")}}, "sequence_bias: found nan"),
            ({"sequence_bias": {(5,): -1e39}}, "sequence_bias: found -1e"),
            ({"logits_processor": [3]}, "logits_processor: found 3; expected a hashable JAX function"),
        ],
    )
    def test_invalid_values_are_refused(self, options, message):
        with pytest.raises(GenerationError, match=message):
            GenerationConfig(**options)
        with pytest.raises(GenerationError, match=message):
            GenerationConfig().replace(**options)

    @pytest.mark.parametrize(
        ("name", "value", "harmless"),
        [
            ("num_beam_groups", 4, 1),
            ("typical_p", 0.9, 1.0),
            ("min_length", 5, 0),
            ("begin_suppress_tokens", [1], None),
            ("output_attentions", True, False),
        ],
    )
    def test_unsupported_options_are_refused_only_where_they_matter(self, name, value, harmless):
        assert GenerationConfig().replace(**{name: harmless}) == GenerationConfig()
        with pytest.raises(GenerationError, match=f"{name}: found .*; expected .*not supported"):
            GenerationConfig().replace(**{name: value})

    def test_bans_are_biases_and_leave_end_tokens_alone_as_bad_words(self):
        config = GenerationConfig(
            bad_words_ids=[[7], [3, 7], [5]],
            suppress_tokens=[8],
            eos_token_id=[7, 8],
            sequence_bias=[[[5], 2], [[4, 4], -1.5]],
        )
        assert config.biases == {(5,): -math.inf, (4, 4): -1.5, (3, 7): -math.inf, (8,): -math.inf}
        assert GenerationConfig(sequence_bias={(4, 4): -1.5}) == GenerationConfig(sequence_bias=[[[4, 4], -1.5]])

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, False),
            ({"min_new_tokens": 4}, False),
            ({"min_new_tokens": 4, "eos_token_id": 3}, True),
            ({"no_repeat_ngram_size": 1}, True),
            ({"suppress_tokens": [0]}, True),
            ({"bad_words_ids": [[0]]}, True),
            ({"sequence_bias": {(0,): 0.5}}, True),
            ({"logits_processor": max}, True),
            ({"repetition_penalty": 2.0, "do_sample": True, "output_scores": True}, False),
        ],
    )
    def test_a_request_is_constrained_by_what_the_ordinary_program_does_not_do(self, options, expected):
        assert GenerationConfig(**options).is_constrained is expected

    @pytest.mark.parametrize(
        "options", [{"suppress_tokens": [99]}, {"bad_words_ids": [[1, 99]]}, {"sequence_bias": {(99, 1): 1.0}}]
    )
    def test_banned_and_biased_tokens_are_of_the_vocabulary(self, options):
        config = GenerationConfig(**options)
        config.check_vocabulary(100)
        with pytest.raises(
            GenerationError, match="suppress_tokens or sequence_bias: found 99; expected tokens below 99"
        ):
            config.check_vocabulary(99)

    def test_functions_of_transformers_are_refused(self):
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("torch")
        processor = transformers.LogitsProcessorList([transformers.MinLengthLogitsProcessor(3, eos_token_id=1)])
        with pytest.raises(GenerationError, match=r"logits_processor: found .*; expected a hashable JAX function"):
            GenerationConfig(logits_processor=processor)
        assert GenerationConfig(logits_processor=transformers.LogitsProcessorList()) == GenerationConfig()

    def test_every_unsupported_option_is_one_of_the_reference_and_harmless_at_its_default(self):
        from glm4v_jax.config.generation import _UNSUPPORTED

        reference = _reference()()
        passed_to_generate = {
            "assistant_model",
            "negative_prompt_ids",
            "prefix_allowed_tokens_fn",
            "stopping_criteria",
            "synced_gpus",
        }
        assert _UNSUPPORTED.keys() - vars(reference).keys() == passed_to_generate
        defaults = {name: getattr(reference, name) for name in _UNSUPPORTED.keys() - passed_to_generate}
        assert GenerationConfig().replace(**defaults) == GenerationConfig()

    def test_unknown_options_are_named(self):
        with pytest.raises(GenerationError, match="unknown 'max_tokens', 'temprature'; expected some of answer_budget"):
            GenerationConfig().replace(temprature=0.5, max_tokens=3)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        st.dictionaries(
            st.sampled_from([field.name for field in dataclasses.fields(GenerationConfig)]),
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers()),
        )
    )
    def test_any_value_is_taken_or_named(self, options):
        try:
            config = GenerationConfig.from_dict(options)
        except GenerationError as error:
            assert str(error).split(":")[0] in options
        else:
            params = SamplingParams.of(config, 2)
            assert all(np.isfinite(leaf).all() and leaf.shape == (2,) for leaf in params)
            assert not config.do_sample or params.temperature[0] > 0


class TestReplace:
    def test_none_means_not_given(self):
        config = GenerationConfig.from_dict(GENERATION_CONFIG)
        assert config.replace(temperature=None, max_new_tokens=None, eos_token_id=None) == config
        changed = config.replace(temperature=0.3, do_sample=None, max_new_tokens=9)
        assert (changed.temperature, changed.do_sample, changed.max_new_tokens) == (0.3, True, 9)
        assert config.temperature == 0.8

    def test_a_released_checkpoint_can_be_made_greedy(self):
        assert not GenerationConfig.from_dict(GENERATION_CONFIG).replace(do_sample=False, temperature=0).do_sample

    @pytest.mark.parametrize("nothing", [-1, [-1], [], ()])
    def test_an_end_id_of_minus_one_never_stops(self, nothing):
        config = GenerationConfig.from_dict(GENERATION_CONFIG).replace(eos_token_id=nothing)
        assert config.eos_token_id == ()
        assert config.padding_id == 151329

    def test_end_ids_become_a_tuple(self):
        assert GenerationConfig(eos_token_id=7).eos_token_id == (7,)
        assert GenerationConfig(eos_token_id=[7, -1, 8]).eos_token_id == (7, 8)
        assert GenerationConfig(eos_token_id=np.array([7, 8])).eos_token_id == (7, 8)

    def test_numpy_scalars_become_plain_values(self):
        config = GenerationConfig(
            do_sample=np.True_, temperature=np.float32(0.5), top_k=np.int64(3), max_new_tokens=np.int32(4)
        )
        assert [type(v) for v in (config.do_sample, config.temperature, config.top_k)] == [bool, float, int]
        assert hash(config) == hash(GenerationConfig(do_sample=True, temperature=0.5, top_k=3, max_new_tokens=4))

    def test_padding_falls_back_to_the_first_end_id(self):
        assert GenerationConfig(eos_token_id=(7, 8)).padding_id == 7
        assert GenerationConfig(eos_token_id=(7, 8), pad_token_id=0).padding_id == 0
        assert GenerationConfig().padding_id == 0


class TestLength:
    @pytest.mark.parametrize(
        ("options", "limit", "expected"),
        [
            ({}, None, 20),
            ({}, 110, 10),
            ({"max_new_tokens": 7}, None, 7),
            ({"max_new_tokens": 28}, 128, 28),
            ({"max_length": 130}, None, 30),
            ({"max_length": 101}, None, 1),
            ({"max_length": 30, "max_new_tokens": 5}, None, 5),
        ],
    )
    def test_new_tokens_follow_from_options_and_limit(self, options, limit, expected):
        assert GenerationConfig(**options).new_tokens(100, limit) == expected

    @pytest.mark.parametrize(
        ("options", "limit", "message"),
        [
            ({"max_length": 100}, None, "max_length: found 100; expected more than the 100 tokens of the prompt"),
            ({"max_new_tokens": 29}, 128, "max_new_tokens: found 29 .*100 tokens.*max_position_embeddings=128"),
            ({"max_length": 200}, 128, "max_length: found 200 .*max_position_embeddings=128"),
            ({}, 100, "max_new_tokens: found None .*max_position_embeddings=100"),
        ],
    )
    def test_tokens_beyond_a_limit_are_refused(self, options, limit, message):
        with pytest.raises(GenerationError, match=message):
            GenerationConfig(**options).new_tokens(100, limit)


class TestSamplingParams:
    def test_options_become_scalars_or_rows(self):
        config = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1)
        assert config.sampling == SamplingParams(True, 0.5, 3, 0.9, 0.1, 1.0)
        rows = SamplingParams.of(config, 4)
        assert [leaf.dtype.name for leaf in rows] == ["bool", "float32", "int32", "float32", "float32", "float32"]
        assert all(leaf.shape == (4,) for leaf in rows)
        for leaf, value in zip(rows, config.sampling, strict=True):
            np.testing.assert_array_equal(leaf, np.float32(value))

    def test_it_needs_no_jax(self):
        code = "import sys, glm4v_jax.config.generation; assert not {'jax', 'torch'} & sys.modules.keys()"
        subprocess.run([sys.executable, "-c", code], check=True)


class _OfTransformers:
    """As `transformers.GenerationConfig`: says what differs from its defaults."""

    def __init__(self, **options):
        self._options = options

    def to_diff_dict(self):
        return {"transformers_version": "4.57.1", **self._options}


def test_a_configuration_of_transformers_goes_over_this_one():
    ours = GenerationConfig(do_sample=True, top_k=2, temperature=0.8, eos_token_id=7)
    assert ours.overridden(None) is ours
    other = GenerationConfig(max_new_tokens=3)
    assert ours.overridden(other) is other
    assert ours.overridden(_OfTransformers()) == ours
    # A null is no default there: it switches the option off.
    given = _OfTransformers(max_new_tokens=3, top_k=None, bos_token_id=1, max_length=20)
    assert ours.overridden(given) == ours.replace(max_new_tokens=3, top_k=0)
    assert ours.overridden({"max_new_tokens": 3}) == ours.replace(max_new_tokens=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (_OfTransformers(max_new_token=3), "found unknown 'max_new_token'"),
        (_OfTransformers(penalty_alpha=0.5), "penalty_alpha: found 0.5"),
        (_OfTransformers(top_p=2.0), "top_p: found 2.0"),
        (7, "generation_config: found 7; expected a GenerationConfig, of glm4v_jax or of transformers"),
    ],
)
def test_what_a_given_configuration_cannot_ask_for_is_named(given, message):
    with pytest.raises(GenerationError, match=message):
        GenerationConfig().overridden(given)


def test_bans_and_biases_of_transformers_are_taken_as_they_are():
    options = dict(
        min_new_tokens=3, no_repeat_ngram_size=2, bad_words_ids=[[1, 2]], suppress_tokens=[4], output_scores=True,
        sequence_bias=[[[1], 2.0]], return_dict_in_generate=True,
    )  # fmt: skip
    given = _reference()(**options)
    assert GenerationConfig().overridden(given) == GenerationConfig(**options)
    assert GenerationConfig.from_dict(given.to_dict()) == GenerationConfig(**options)
