"""Bans, biases and least lengths, against the processors that transformers 4.57.1 itself puts together."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v_jax.config.generation import GenerationConfig, SamplingParams
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate import constraints
from glm4v_jax.generate.constraints import TableShape, constraints_of
from glm4v_jax.generate.sampling import penalised

pytestmark = pytest.mark.slow

ROWS, VOCAB, CAPACITY, PROMPT = 3, 12, 16, 5


@jax.jit
def _scores(logits, made, params, seen, step, eos):
    biased = constraints.biased(logits, made)
    return constraints.banned(penalised(biased, params, seen), made, step, eos)


def _ours(logits, texts, configs):
    rows = dict(enumerate(zip(texts, configs, strict=True)))
    made = constraints_of(rows, ROWS, CAPACITY, VOCAB, TableShape.of(dict(enumerate(configs)), TableShape()))
    params = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(SamplingParams.of(one, 1) for one in configs))
    seen = np.array([np.isin(np.arange(VOCAB), text) for text in texts])
    eos = np.full((ROWS, 4), -1, np.int32)
    for row, config in enumerate(configs):
        eos[row, : len(config.eos_token_id)] = config.eos_token_id
    steps = np.array([len(text) - PROMPT for text in texts], np.int32)
    return np.asarray(_scores(logits, made, params, seen, steps, eos))


def _theirs(logits, text, config):
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation")
    reference = generation.GenerationConfig(
        repetition_penalty=config.repetition_penalty,
        min_new_tokens=config.min_new_tokens,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        bad_words_ids=[list(tokens) for tokens in config.bad_words_ids] or None,
        suppress_tokens=list(config.suppress_tokens) or None,
        sequence_bias=dict(config.sequence_bias) or None,
    )
    ends = config.eos_token_id
    reference._eos_token_tensor = torch.tensor(ends) if ends else None
    processors = generation.GenerationMixin()._get_logits_processor(reference, input_ids_seq_length=PROMPT)
    return processors(torch.tensor(text[None]), torch.tensor(logits[None]))[0].numpy()


_token = st.integers(0, VOCAB - 1)
_sequence = st.lists(_token, min_size=1, max_size=5).map(tuple)


@st.composite
def _configs(draw):
    return GenerationConfig(
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        min_new_tokens=draw(st.integers(0, 9)),
        no_repeat_ngram_size=draw(st.sampled_from([0, 1, 2, 2, 3, 4, 20])),
        bad_words_ids=draw(st.lists(_sequence, max_size=3)),
        suppress_tokens=draw(st.lists(_token, max_size=3)),
        sequence_bias=draw(st.dictionaries(_sequence, st.floats(-9, 9, width=16) | st.just(-np.inf), max_size=5)),
        eos_token_id=draw(st.lists(_token, max_size=3)),
    )


@settings(max_examples=40, deadline=None)
@given(
    configs=st.tuples(*[_configs()] * ROWS),
    lengths=st.tuples(*[st.integers(PROMPT, CAPACITY)] * ROWS),
    seed=st.integers(0, 2**32 - 1),
)
def test_scores_equal_the_reference(mesh, configs, lengths, seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((ROWS, VOCAB)).astype(np.float32)
    texts = [rng.integers(0, 1 + seed % VOCAB, length) for length in lengths]
    ours = _ours(logits, texts, configs)
    for row, (text, config) in enumerate(zip(texts, configs, strict=True)):
        np.testing.assert_allclose(ours[row], _theirs(logits[row], text, config), rtol=1e-6, atol=1e-6)


def test_a_sequence_is_biased_only_with_a_token_before_it_as_in_the_reference(mesh):
    """4.57.1 passes over sequences longer than the context, although their prefixes may be all of it."""
    logits = np.zeros((ROWS, VOCAB), np.float32)
    texts = [np.array(text) for text in ([1, 2, 3, 4, 5], [6, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 5])]
    configs = [GenerationConfig(sequence_bias={(1, 2, 3, 4, 5, 9): 4.0})] * ROWS
    found = _ours(logits, texts, configs)
    assert found[:, 9].tolist() == [0, 4, 0]
    for row in range(ROWS):
        np.testing.assert_array_equal(found[row], _theirs(logits[row], texts[row], configs[row]))


def test_sequences_longer_than_the_cache_change_nothing(mesh):
    logits = np.zeros((ROWS, VOCAB), np.float32)
    configs = [GenerationConfig(bad_words_ids=[[1] * (CAPACITY + 9)], no_repeat_ngram_size=2**40)] * ROWS
    assert not _ours(logits, [np.ones(CAPACITY, np.int32)] * ROWS, configs).any()


def test_tables_have_few_shapes():
    one = GenerationConfig(bad_words_ids=[[1, 2]])
    many = GenerationConfig(bad_words_ids=[[i, i + 1] for i in range(20)] + [list(range(9))])
    assert TableShape.of({0: GenerationConfig(suppress_tokens=[3])}, TableShape()) == TableShape()
    assert TableShape.of({0: one}, TableShape()) == TableShape() == (8, 4)
    assert TableShape.of({0: one, 3: many}, TableShape()) == (24, 8)
    assert TableShape.of({0: one}, TableShape(24, 8)) == (24, 8)


def test_constraints_grow_in_place(mesh):
    config = GenerationConfig(bad_words_ids=[[1, 2, 3]], no_repeat_ngram_size=2)
    rows = {1: (np.array([5, 1, 2]), config)}
    small = constraints_of(rows, 2, 8, VOCAB, TableShape(8, 4))
    large = constraints.grown(small, 16, TableShape(12, 6))
    expected = constraints_of(rows, 2, 16, VOCAB, TableShape(12, 6))
    jax.tree.map(np.testing.assert_array_equal, large, expected)


def test_functions_see_rows_without_padding_and_must_keep_the_shape(mesh):
    tokens = np.array([[-1, -1, 5], [7, 8, 9]], np.int32)

    def add_newest(tokens, scores):
        return scores + tokens[:, -1:]

    scores = jax.jit(lambda scores: constraints.processed(scores, tokens, (add_newest, add_newest)))(np.zeros((2, 4)))
    np.testing.assert_array_equal(scores, [[10] * 4, [18] * 4])
    with pytest.raises(GenerationError, match=r"logits_processor: found scores \[2, 1\]; expected scores \[2, 4\]"):
        constraints.processed(np.zeros((2, 4)), tokens, (lambda tokens, scores: scores[:, :1],))
    with pytest.raises(GenerationError, match=r"logits_processor: found NoneType; expected scores \[2, 4\]"):
        constraints.processed(np.zeros((2, 4)), tokens, (lambda tokens, scores: None,))
    for function in (lambda tokens, scores: np.array(scores), lambda tokens, scores: scores * bool(tokens[0, 0])):
        with pytest.raises(GenerationError, match=r"logits_processor: found .* while it is compiled"):
            constraints.processed(np.zeros((2, 4)), tokens, (function,))
