"""The choice of a next token, against the processors that transformers 4.57.1 itself puts together."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from glm4v_jax.config.generation import GenerationConfig, SamplingParams
from glm4v_jax.devices.mesh import make_mesh
from glm4v_jax.generate import sampling

pytestmark = pytest.mark.slow

ROWS, PROMPT = 3, 7


def process_logits(logits, params, seen):
    """All of what `sample` does to scores: it computes these in parts."""
    return sampling.warped(sampling.penalised(logits, params, seen), params)


_process = jax.jit(process_logits)
_sample = jax.jit(sampling.sample)


def _seen(prompts, vocab_size):
    """bool [B, V]: the tokens of each prompt."""
    return (np.asarray(prompts)[:, :, None] == np.arange(vocab_size)).any(axis=1)


def _stack(configs):
    rows = [SamplingParams.of(config, 1) for config in configs]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)


def _reference(config, prompt, logits):
    """Scores `[V]` of one row, by the processors that the reference chooses and orders for these options."""
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation")
    options = {
        name: getattr(config, name)
        for name in ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    reference = generation.GenerationConfig(**options)
    processors = generation.GenerationMixin()._get_logits_processor(reference, input_ids_seq_length=PROMPT)
    scores = processors(torch.tensor(prompt[None]), torch.tensor(logits[None]))
    return scores[0].numpy()


def _softmax(scores):
    scores = scores.astype(np.float64)
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def _far_from_thresholds(config, prompt, logits):
    """Whether no token is so close to the cut of top-p or min-p that rounding decides about it."""
    wide = _reference(config.replace(top_p=1.0, min_p=0.0), prompt, logits)
    cumulative = np.cumsum(np.sort(_softmax(wide)))
    if config.top_p < 1 and np.abs(cumulative - (1 - config.top_p)).min() < 1e-6:
        return False
    probabilities = _softmax(_reference(config.replace(min_p=0.0), prompt, logits))
    ratios = probabilities / probabilities.max()
    # The most likely tokens are at a ratio of 1 exactly, however one rounds.
    return config.min_p == 0 or np.abs(ratios[ratios < 1] - config.min_p).min(initial=1) > 1e-6


@st.composite
def _configs(draw):
    return GenerationConfig(
        do_sample=draw(st.booleans() | st.just(True)),
        temperature=draw(st.sampled_from([1.0, 0.8]) | st.floats(0.05, 5.0)),
        top_k=draw(st.sampled_from([0, 1, 2, 50, 63, 64, 65, 2000]) | st.integers(0, 120)),
        top_p=draw(st.sampled_from([1.0, 0.6]) | st.floats(0.01, 1.0)),
        min_p=draw(st.sampled_from([0.0, 0.05, 1.0]) | st.floats(0.0, 1.0)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2]) | st.floats(0.5, 2.0)),
    )


@pytest.mark.parametrize("vocab_size", [11, 97, 1000])
@pytest.mark.parametrize("tied", [False, True])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(configs=st.tuples(*[_configs()] * ROWS), seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.5, 3.0]))
def test_scores_equal_the_reference(vocab_size, tied, configs, seed, spread):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((ROWS, vocab_size)) * spread).astype(np.float32)
    if tied:
        logits = np.round(logits * 2) / 2
    prompts = rng.integers(0, vocab_size, (ROWS, PROMPT))
    for row in zip(configs, prompts, logits, strict=True):
        assume(not row[0].do_sample or _far_from_thresholds(*row))

    seen = _seen(prompts, vocab_size)
    ours = np.asarray(_process(logits, _stack(configs), seen))

    assert ours.dtype == np.float32
    for config, prompt, logit, row in zip(configs, prompts, logits, ours, strict=True):
        reference = _reference(config, prompt, logit)
        if tied:  # where top-p cuts among equal scores, torch's unstable sort decides which of them stay
            row, reference = np.sort(row), np.sort(reference)
        np.testing.assert_array_equal(np.isneginf(row), np.isneginf(reference))
        np.testing.assert_allclose(_softmax(row), _softmax(reference), rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.0137, 0.1315, 0.3335, 0.6665, 0.7705, 0.9835])
@pytest.mark.parametrize("vocab_size", [4, 10, 100, 1000])
def test_top_p_among_equal_logits_keeps_as_many_as_the_reference(vocab_size, top_p):
    config = GenerationConfig(do_sample=True, top_k=0, top_p=top_p)
    logits = np.zeros((1, vocab_size), np.float32)
    ours = _process(logits, SamplingParams.of(config, 1), np.zeros(logits.shape, bool))[0]
    # torch's sort is not stable, so that only the number of survivors is defined.
    np.testing.assert_array_equal(np.sort(ours), np.sort(_reference(config, np.array([0]), logits[0])))


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_k": 0}, {"top_p": 1e-12, "top_k": 0}, {"top_p": 1e-12}])
def test_probabilities_that_underflow_and_a_top_p_that_rounds_to_nothing(options):
    logits = np.linspace(-20000, 0, 200, dtype=np.float32)[None]
    config = GenerationConfig(do_sample=True, **options)
    ours = _process(logits, SamplingParams.of(config, 1), np.zeros(logits.shape, bool))[0]
    np.testing.assert_array_equal(ours, _reference(config, np.array([0]), logits[0]))


@pytest.mark.parametrize("extra", [-1, 0, 1, 40])
def test_ties_that_leave_the_window_of_candidates_are_kept(extra):
    logits = np.full((1, 300), -5.0, np.float32)
    tied = np.random.default_rng(0).permutation(300)[: sampling._WINDOW + extra]
    logits[0, tied] = 2.0
    config = GenerationConfig(do_sample=True, top_k=3)
    ours = _process(logits, SamplingParams.of(config, 1), np.zeros(logits.shape, bool))[0]
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(ours)), np.sort(tied))
    np.testing.assert_array_equal(ours, _reference(config, np.array([0]), logits[0]))


def test_one_wide_row_does_not_change_the_others():
    logits = np.random.default_rng(1).standard_normal((2, 500)).astype(np.float32)
    narrow, wide = (GenerationConfig(do_sample=True, top_k=k, top_p=0.7) for k in (5, 0))
    seen = np.zeros(logits.shape, bool)
    together = _process(logits, _stack([narrow, wide]), seen)
    alone = _process(logits, _stack([narrow, narrow]), seen)
    np.testing.assert_array_equal(together[0], alone[0])
    assert np.isfinite(together[1]).sum() > 5 >= np.isfinite(alone[1]).sum()


def test_greedy_rows_only_get_the_penalty():
    logits = np.array([[2.0, -2.0, 1.5, 0.0]], np.float32)
    config = GenerationConfig(temperature=0.0, top_k=1, top_p=0.1, min_p=1.0, repetition_penalty=2.0)
    seen = np.array([[True, True, False, True]])
    scores = _process(logits, SamplingParams.of(config, 1), seen)
    np.testing.assert_array_equal(scores, [[1.0, -4.0, 1.5, 0.0]])


def test_half_precision_logits_are_processed_in_float32():
    logits = jnp.asarray([[3.0, 1.0, -1.0]], jnp.bfloat16)
    params = SamplingParams.of(GenerationConfig(do_sample=True, temperature=0.7), 1)
    seen = np.zeros(logits.shape, bool)
    scores = _process(logits, params, seen)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, np.array([[3.0, 1.0, -1.0]]) / 0.7, rtol=1e-6)


def test_greedy_takes_the_first_maximum_as_torch_does():
    torch = pytest.importorskip("torch")
    logits = np.round(np.random.default_rng(2).standard_normal((16, 97)) * 2).astype(np.float32)
    assert (np.sum(logits == logits.max(axis=1, keepdims=True), axis=1) > 1).any()
    params = SamplingParams.of(GenerationConfig(), 16)
    tokens = _sample(logits, params, np.zeros(logits.shape, bool), sampling.row_keys(0, jnp.arange(16)))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, torch.argmax(torch.tensor(logits), dim=-1))


def test_draws_follow_the_processed_distribution():
    draws = 20_000
    config = GenerationConfig(do_sample=True, temperature=1.3, top_k=8, top_p=0.9, min_p=0.02, repetition_penalty=1.2)
    logits = np.random.default_rng(3).standard_normal(13).astype(np.float32)
    seen = np.arange(13) < 4
    expected = _softmax(np.asarray(_process(logits[None], SamplingParams.of(config, 1), seen[None])[0]))
    assert 3 <= np.count_nonzero(expected) < 13

    batch = SamplingParams.of(config, draws)
    keys = sampling.row_keys(11, jnp.arange(draws))
    tokens = _sample(np.tile(logits, (draws, 1)), batch, np.tile(seen, (draws, 1)), keys)

    counts = np.bincount(tokens, minlength=13)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept] * draws).pvalue > 1e-3


def test_successive_steps_of_one_row_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    params = SamplingParams.of(GenerationConfig(do_sample=True), 1)
    seen = np.zeros((1, 4), bool)
    keys = sampling.row_keys(5, jnp.arange(1))

    def draw(step):
        return sampling.sample(logits[None], params, seen, sampling.step_keys(keys, step))[0]

    tokens = jax.jit(jax.vmap(draw))(jnp.arange(5_000))
    assert stats.chisquare(np.bincount(tokens, minlength=4), _softmax(logits) * 5_000).pvalue > 1e-3


def test_a_row_draws_the_same_in_every_batch():
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((6, 200)).astype(np.float32)
    config = GenerationConfig(do_sample=True, temperature=2.0, top_k=0)

    def tokens(rows, seed, step):
        keys = sampling.step_keys(sampling.row_keys(seed, jnp.arange(6))[rows], step)
        params = SamplingParams.of(config, len(rows))
        return np.asarray(_sample(logits[rows], params, np.zeros((len(rows), 200), bool), keys))

    rows = np.arange(6)
    full = np.stack([tokens(rows, 9, step) for step in range(20)])
    np.testing.assert_array_equal(full, np.stack([tokens(rows, 9, step) for step in range(20)]))
    assert (full != np.stack([tokens(rows, 10, step) for step in range(20)])).any()
    some = np.array([4, 1])
    np.testing.assert_array_equal(full[:, some], np.stack([tokens(some, 9, step) for step in range(20)]))
    np.testing.assert_array_equal(
        jax.random.key_data(sampling.row_keys(9, jnp.arange(2))),
        jax.random.key_data(sampling.row_keys(9, jnp.arange(6))[:2]),
    )
    per_row = sampling.step_keys(sampling.row_keys(9, jnp.arange(2)), jnp.array([3, 5]))
    for row, step in enumerate([3, 5]):
        same = sampling.step_keys(sampling.row_keys(9, jnp.arange(2)), step)[row]
        np.testing.assert_array_equal(jax.random.key_data(per_row[row]), jax.random.key_data(same))


def test_equal_rows_of_one_batch_draw_differently():
    logits = np.zeros((64, 100), np.float32)
    params = SamplingParams.of(GenerationConfig(do_sample=True, top_k=0), 64)
    tokens = _sample(logits, params, np.zeros(logits.shape, bool), sampling.row_keys(0, jnp.arange(64)))
    assert len(set(np.asarray(tokens).tolist())) > 30


def test_a_change_of_options_compiles_nothing():
    traced = []

    @jax.jit
    def counted(logits, params, seen):
        traced.append(1)
        return process_logits(logits, params, seen)

    logits = np.zeros((2, 100), np.float32)
    for temperature, top_k, do_sample in [(1.0, 0, True), (0.3, 5, True), (1.0, 80, False)]:
        config = GenerationConfig(do_sample=do_sample, temperature=temperature, top_k=top_k)
        counted(logits, SamplingParams.of(config, 2), np.zeros(logits.shape, bool))
    assert len(traced) == 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads a program that XLA made for the CPU")
def test_the_whole_row_is_sorted_only_where_the_candidates_do_not_do():
    logits, params = np.zeros((1, 5000), np.float32), SamplingParams.of(GenerationConfig(do_sample=True), 1)
    program = _process.lower(logits, params, np.zeros(logits.shape, bool)).compile().as_text()
    whole_rows = [line for line in program.splitlines() if " sort(" in line and "f32[1,5000]" in line]
    assert len(whole_rows) == 1, "one is the branch that is skipped; a second is XLA's way to get the candidates"


def test_many_rows_are_cut_as_each_alone():
    logits = np.random.default_rng(7).standard_normal((20, 100)).astype(np.float32)
    params = _stack([GenerationConfig(do_sample=True, top_k=0, top_p=p) for p in np.linspace(0.3, 0.9, 20).tolist()])
    seen = np.zeros(logits.shape, bool)
    found = np.isfinite(_process(logits, params, seen))
    each = [_process(logits[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], params), seen[:1]) for i in range(20)]
    assert np.array_equal(found, np.isfinite(np.concatenate(each))) and len(set(found.sum(1).tolist())) > 10


def test_seen_grows_by_token():
    seen = _seen([[3, 4, 3], [5, 6, 7]], 10)
    grown = sampling.mark_seen(jnp.asarray(seen), jnp.array([0, 5]))
    assert [np.flatnonzero(row).tolist() for row in grown] == [[0, 3, 4], [5, 6, 7]]


@pytest.mark.parametrize("batch", [2, 12])
def test_it_runs_in_an_explicit_mesh(batch):
    """As without one; a few of many rows at a time."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    logits = np.random.default_rng(6).standard_normal((batch, 300)).astype(np.float32)
    params = SamplingParams.of(GenerationConfig(do_sample=True, top_k=0, top_p=0.8, min_p=0.01), batch)
    prompt, keys = _seen([[i, i + 1] for i in range(batch)], 300), sampling.row_keys(0, jnp.arange(batch))

    def step(logits, params, seen, keys):
        tokens = sampling.sample(logits, params, seen, sampling.step_keys(keys, 0))
        return tokens, sampling.mark_seen(seen, tokens)

    expected = jax.jit(step)(logits, params, prompt, keys)
    with jax.set_mesh(mesh):
        ours = jax.jit(step)(*jax.device_put((logits, params, prompt, keys), rows))
    np.testing.assert_array_equal(ours[0], expected[0])
    np.testing.assert_array_equal(ours[1], expected[1])


def drawn(rows=8, vocab_size=512, top_p=1.0, **axes):
    """Tokens of rows that sample, and the shapes of matrices in the program of a device."""
    logits = np.random.default_rng(8).standard_normal((rows, vocab_size)).astype(np.float32)
    params = SamplingParams.of(GenerationConfig(do_sample=True, top_k=0, top_p=top_p), rows)

    def sampled(logits, params, numbers):
        return sampling.choose(lambda: logits, params, sampling.row_keys(numbers, numbers))

    with jax.set_mesh(make_mesh(**axes)):
        batch = jax.device_put((params, np.arange(rows)), jax.P("data"))
        arguments = jax.device_put(logits, jax.P("data", "kv")), *batch
        compiled = jax.jit(sampled).lower(*arguments).compile()
        tokens = compiled(*arguments)
    return np.asarray(tokens).tolist(), set(re.findall(r"[uf]32\[\d+,\d+\]", compiled.as_text()))


def test_a_device_draws_noise_for_its_part_of_the_vocabulary(run_on_devices):
    tokens, shapes = drawn()
    ours, parts = run_on_devices(drawn_on_mesh, 8, 1.0)
    assert ours == tokens and "u32[8,512]" in shapes
    assert "u32[4,128]" in parts and "u32[4,512]" not in parts


def test_whole_rows_of_a_sharded_vocabulary_are_a_few_at_a_time(run_on_devices):
    ours, shapes = run_on_devices(drawn_on_mesh, 40, 0.8)
    assert ours == drawn(40, top_p=0.8)[0]
    assert "f32[5,512]" in shapes and "f32[20,512]" not in shapes
    # The largest of each part: of its rows, and of a matrix.
    assert "f32[20,64]" in shapes and "f32[160,64]" not in shapes


def drawn_on_mesh(rows, top_p):
    """See `drawn`; rows in two parts, the vocabulary in four."""
    return drawn(rows, top_p=top_p, data=2, kv=4)
