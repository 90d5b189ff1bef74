"""Blockwise attention against the one that makes all scores at once: results, gradients, masks, dropout."""

import functools
import itertools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import assert_close

from glm4v_jax.devices import mesh
from glm4v_jax.model.attention import attend as attend_module
from glm4v_jax.model.attention import blockwise
from glm4v_jax.model.attention.attend import FEW_QUERIES, Dropout, Mask, attend, attend_cached, attend_with_weights
from glm4v_jax.model.kv_cache import dequantize_side, quantize_side

pytestmark = pytest.mark.usefixtures("mesh")

BATCH, HEAD_DIM = 2, 8


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16, 12 or 8: several of them, and padding to their multiples, in sizes that compile fast."""
    for blocks in ("BLOCKS", "CAUSAL_CPU_BLOCKS"):
        monkeypatch.setattr(blockwise, blocks, (16, 12, 8))


def random_qkv(seed, t, s, kv_heads=2, groups=3, dtype=np.float32):
    random = np.random.RandomState(seed)
    shapes = ((t, kv_heads, groups), (s, kv_heads), (s, kv_heads))
    return [random.standard_normal((BATCH, *shape, HEAD_DIM)).astype(dtype) for shape in shapes]


def random_mask(seed, t, s, q_start=0, packed=True):
    """Rows of 1, 2, 3, ... in runs, padding here and there; queries are the keys from `q_start` on."""
    random = np.random.RandomState(seed)
    kv = np.zeros((BATCH, s), np.int32)
    for row in kv:
        edges = np.sort(random.randint(0, s + 1, 4)) if packed else [0, random.randint(0, s // 2), s, s]
        for number, (a, b) in enumerate(itertools.pairwise(edges)):
            row[a:b] = number if packed else min(number, 1)
    start = np.full(BATCH, q_start, np.int32)
    q = np.stack([np.pad(row, (0, t))[a : a + t] for row, a in zip(kv, start, strict=True)])
    return Mask(q, kv, start)


def dense(q, k, v, mask, causal):
    """float64 and loops over nothing but heads: what the docstring of `attention` says, in NumPy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("btkgh,bskh->bkgts", q, k) / np.sqrt(q.shape[-1])
    visible = (mask.q_segments[:, :, None] == mask.kv_segments[:, None]) & (mask.kv_segments > 0)[:, None]
    if causal:
        slots = mask.q_start[:, None] + np.arange(q.shape[1])
        visible &= slots[:, :, None] >= np.arange(k.shape[1])
    visible = visible[:, None, None]
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), -1e9))
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bkgts,bskh->btkgh", p, v), p


run = functools.partial(jax.jit, static_argnames=("causal",))


def compiled():
    """Compiled anew for each test: block sizes are read when it is traced."""
    return run(lambda q, k, v, mask, causal: attend(q, k, v, mask, causal=causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("t", "s", "q_start"), [(40, 40, 0), (37, 53, 16), (16, 16, 0), (9, 64, 55), (50, 24, 0)])
def test_blocks_equal_dense(small_blocks, causal, t, s, q_start):
    """Lengths that are multiples of the blocks and not, keys before and after the queries, packed segments."""
    qkv, mask = random_qkv(0, t, s), random_mask(1, t, s, q_start)
    expected, weights = dense(*qkv, mask, causal)
    assert_close(compiled()(*qkv, mask, causal=causal), expected, tolerance=2e-6)
    found, found_weights = attend_with_weights(*map(jnp.asarray, qkv), mask, causal=causal)
    assert_close(found, expected, tolerance=2e-6)
    assert_close(found_weights, weights, tolerance=2e-6)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), q_start=st.integers(0, 20), packed=st.booleans())
@example(seed=32382, q_start=0, packed=True)  # no query sees any key
def test_any_mask_equals_dense_attention(seed, q_start, packed):
    """One compiled shape, any segments and starts."""
    qkv, mask = random_qkv(seed, 30, 50), random_mask(seed + 1, 30, 50, q_start, packed)
    found, expected = _any_mask(*qkv, mask), dense(*qkv, mask, True)[0]
    if expected.any():
        assert_close(found, expected, tolerance=4e-6)
    else:
        assert not found.any()


@jax.jit
def _any_mask(q, k, v, mask):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "CAUSAL_CPU_BLOCKS", (16, 12, 8))
        return attend(q, k, v, mask, causal=True)


@pytest.mark.parametrize(("kv_heads", "groups", "core_scores"), [(1, 1, 10**6), (1, 3, 10**6), (3, 1, 1), (2, 2, 1)])
def test_any_number_of_heads_equals_dense_attention(small_blocks, monkeypatch, kv_heads, groups, core_scores):
    """Heads in one block of scores, and in blocks of their own."""
    monkeypatch.setattr(blockwise, "_CORE_SCORES", core_scores)
    qkv, mask = random_qkv(2, 20, 20, kv_heads, groups), random_mask(3, 20, 20)
    assert_close(compiled()(*qkv, mask, causal=True), dense(*qkv, mask, True)[0], tolerance=2e-6)


@pytest.mark.parametrize("t", [1, FEW_QUERIES, FEW_QUERIES + 1])
def test_few_queries_equal_dense_attention_over_a_cache(t):
    """Decoding: the direct path, and the first length past it, at rows of different lengths."""
    qkv = random_qkv(4, t, 40)
    start = np.array([12, 40 - t], np.int32)
    kv = (np.arange(40) < (start + t)[:, None]).astype(np.int32)
    mask = Mask(np.ones((BATCH, t), np.int32), kv, start)
    assert_close(compiled()(*qkv, mask, causal=True), dense(*qkv, mask, True)[0], tolerance=2e-6)


def attend_cached_anew(*args):
    """Trace it again: of `attend_cached`, what was traced for another platform or size of cache would run."""
    return jax.jit(lambda *args: attend_cached.__wrapped__(*args))(*args)


def cached_case(t, s=40):
    """Queries, a cache with padding before it, the new tokens, and their segments: rows of different lengths."""
    q, *cached = random_qkv(20, t, s)
    new = random_qkv(21, t, t)[1:]
    slots, fresh = mesh.spec("batch", "kv_heads", "slots"), mesh.spec("batch", "kv_heads")
    cached, new = (
        tuple(jax.device_put(x.swapaxes(1, 2), on) for x in sides) for sides, on in ((cached, slots), (new, fresh))
    )
    q = jax.device_put(q, mesh.spec("batch", None, "kv_heads", "q_groups"))
    segments = np.ones((BATCH, t), np.int32)
    segments[1, t - t // 2 :] = 0
    held = ((np.arange(s) >= 2) & (np.arange(s) < [[s], [17]])).astype(np.int32)
    return q, cached, new, segments, held


@pytest.mark.parametrize("used", [0, 120, 200])
def test_a_large_cache_is_read_as_far_as_it_is_used(small_blocks, monkeypatch, used):
    """In blocks where most of it is free, at once otherwise: the same result."""
    q, cached, new, segments, held = cached_case(2, 256)
    held = held * (np.arange(256) < used)
    expected = attend_cached_anew(q, cached, new, segments, held)
    monkeypatch.setattr(attend_module, "_LARGE_CACHE", 256)
    found = attend_cached_anew(q, cached, new, segments, held)
    assert_close(found, expected, np.asarray(segments) > 0, tolerance=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("t", [1, FEW_QUERIES, FEW_QUERIES + 1])
def test_an_int8_cache_equals_its_floats(small_blocks, monkeypatch, t, platform):
    """In blocks on a CPU, at once elsewhere: scales on scores and probabilities are those on keys and values."""
    q, cached, new, segments, held = cached_case(t)
    cached, new = jax.tree.map(quantize_side, (cached, new))
    with monkeypatch.context() as patch:
        patch.setattr(mesh, "platform", lambda: platform)
        found = attend_cached_anew(q, cached, new, segments, held)
    floats = [tuple(dequantize_side(side, jnp.float32) for side in sides) for sides in (cached, new)]
    expected = jax.jit(attend_cached)(q, *floats, segments, held)
    assert_close(found, expected, np.asarray(segments) > 0, tolerance=2e-6)


def test_an_int8_cache_is_off_by_its_rounding():
    """Scores are off by |q|_1 * scale / 2 at most, so a probability by exp of twice that, and values by scale / 2."""
    q, cached, new, segments, held = cached_case(4)
    exact = jax.jit(attend_cached)(q, cached, new, segments, held)
    rounded = jax.tree.map(quantize_side, (cached, new))
    found = jax.jit(attend_cached)(q, *rounded, segments, held)
    keys, values = (np.concatenate([np.asarray(x.scale), y.scale], axis=2) for x, y in zip(*rounded, strict=True))
    norm = np.abs(q).sum(axis=-1).max(axis=(1, 3))  # of each row and key head
    shift = norm * keys.max(axis=-1) / 2 / np.sqrt(HEAD_DIM)
    largest = np.maximum(*(np.abs(x).max(axis=(2, 3)) for x in (cached[1], new[1])))
    bound = np.expm1(2 * shift) * 2 * largest + values.max(axis=-1) / 2
    error = np.abs(np.asarray(found) - np.asarray(exact)).max(axis=(1, 3, 4))
    assert (error <= bound).all() and (error > bound / 1000).all()


def test_block_sizes_pad_the_least(monkeypatch):
    """1,100 tokens in blocks of a size that pads the least."""
    lengths = (5, 512, 513, 768, 1024, 1100, 1536)
    large = [5, 512, 384, 384, 512, 384, 512]
    assert [blockwise._block_size(n, True) for n in lengths] == [5, 256, 128, 256, 256, 128, 256]
    assert [blockwise._block_size(n, False) for n in lengths] == large
    with monkeypatch.context() as patch:
        patch.setattr(blockwise.mesh, "platform", lambda: "gpu")
        assert [blockwise._block_size(n, True) for n in lengths] == large
    qkv, mask = random_qkv(5, 1100, 1100, 1, 1), random_mask(6, 1100, 1100)
    assert_close(compiled()(*qkv, mask, causal=True), dense(*qkv, mask, True)[0], tolerance=4e-6)


def test_rows_that_see_nothing_are_zero(small_blocks):
    """And not NaN, in results and gradients: rows of padding, and queries before every key of their segment."""
    q, k, v = random_qkv(7, 24, 40)
    mask = Mask(np.zeros((BATCH, 24), np.int32), np.ones((BATCH, 40), np.int32), np.zeros(BATCH, np.int32))
    mask.q_segments[1, 10:] = 1
    mask.kv_segments[1, :20] = 0

    def total(q, k, v):
        return jnp.sum(jnp.square(attend(q, k, v, mask, causal=True)))

    out = np.asarray(compiled()(q, k, v, mask, causal=True))
    assert not out[0].any() and not out[1, :20].any() and np.isfinite(out).all()
    assert np.abs(out[1, 20:]).max() > 0
    gradients = [np.asarray(x) for x in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)]
    assert all(np.isfinite(x).all() and not x[0].any() and x[1].any() for x in gradients)
    assert not attend_with_weights(*map(jnp.asarray, (q, k, v)), mask, causal=True)[0][0].any()


def test_large_scores_do_not_overflow(small_blocks):
    q, k, v = random_qkv(8, 20, 20)
    mask = random_mask(9, 20, 20, packed=False)
    assert_close(compiled()(q * 300, k * 300, v, mask, causal=True), dense(q * 300, k * 300, v, mask, True)[0])


def scalar(attention_function, weight):
    def total(q, k, v):
        return jnp.sum(attention_function(q, k, v) * weight)

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("t", "s", "q_start"), [(40, 40, 0), (21, 45, 20)])
def test_gradients_equal_those_of_dense_attention(small_blocks, causal, t, s, q_start):
    qkv, mask = random_qkv(10, t, s), random_mask(11, t, s, q_start)
    weight = np.random.RandomState(12).standard_normal(qkv[0].shape).astype(np.float32)
    found = scalar(lambda *x: attend(*x, mask, causal=causal), weight)(*qkv)
    expected = scalar(lambda *x: attend_with_weights(*x, mask, causal=causal)[0], weight)(*qkv)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, tolerance=4e-6)


def keep_mask(key, rate, shape, t, s, block_q, block_k):
    """The kept probabilities of all blocks put together: [B, K, G, T, S], scaled by 1 / (1 - rate)."""
    rows = [
        np.concatenate(
            [blockwise.keep(key, i, j, (*shape, block_q, block_k), rate) for j in range(-(-s // block_k))], -1
        )
        for i in range(-(-t // block_q))
    ]
    return np.concatenate(rows, axis=-2)[..., :t, :s]


def test_dropout_drops_the_same_forward_and_backward(small_blocks):
    """Results and gradients are those of dense attention whose probabilities are multiplied with the very same mask."""
    t = s = 40
    rate, key = 0.3, jax.random.key(5)
    qkv, mask = random_qkv(13, t, s), random_mask(14, t, s, packed=False)
    block = blockwise._block_size(t, True)
    assert 40 % block == 0 and block < 40
    keep = keep_mask(key, rate, (BATCH, 2, 3), t, s, block, block)
    np.testing.assert_allclose(np.unique(keep), [0, 1 / 0.7], rtol=1e-6)

    def with_mask(q, k, v):
        _, p = attend_with_weights(q, k, v, mask, causal=True)
        return jnp.einsum("bkgts,bskh->btkgh", p * keep, v, precision="highest")

    def with_dropout(q, k, v):
        return attend(q, k, v, mask, causal=True, dropout=Dropout(key, rate))

    assert_close(jax.jit(with_dropout)(*qkv), jax.jit(with_mask)(*qkv), tolerance=4e-6)
    weight = np.random.RandomState(15).standard_normal(qkv[0].shape).astype(np.float32)
    for one, other in zip(scalar(with_dropout, weight)(*qkv), scalar(with_mask, weight)(*qkv), strict=True):
        assert_close(one, other, tolerance=4e-6)


def test_dropout_keeps_the_expectation(small_blocks):
    """The mean over 400 keys is the result without dropout, within five of its standard errors."""
    qkv, mask = random_qkv(16, 20, 20, 1, 1), random_mask(17, 20, 20, packed=False)
    plain = np.asarray(compiled()(*qkv, mask, causal=True))
    keys = jax.random.split(jax.random.key(0), 400)
    one = jax.jit(lambda key: attend(*map(jnp.asarray, qkv), mask, causal=True, dropout=Dropout(key, 0.4)))
    drawn = np.stack([one(key) for key in keys])
    error = drawn.std(axis=0) / np.sqrt(len(keys))
    assert (np.abs(drawn.mean(axis=0) - plain) <= 5 * error + 1e-6).all()
    assert drawn.std(axis=0).max() > 0.1
    assert np.array_equal(one(keys[0]), drawn[0])


def test_dropout_of_rate_zero_changes_nothing(small_blocks):
    qkv, mask = random_qkv(18, 20, 20), random_mask(19, 20, 20)
    dropout = Dropout(jax.random.key(0), 0.0)
    found = jax.jit(lambda q, k, v: attend(q, k, v, mask, causal=True, dropout=dropout))(*qkv)
    assert np.array_equal(found, compiled()(*qkv, mask, causal=True))


def test_in_bfloat16_only_probabilities_are_rounded(small_blocks):
    """Scores and sums stay float32: against float64 on the same rounded inputs, an error of bfloat16's 2^-8."""
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in random_qkv(20, 40, 40)]
    mask = random_mask(21, 40, 40)
    found = compiled()(*qkv, mask, causal=True)
    assert found.dtype == jnp.bfloat16
    assert_close(found.astype(jnp.float32), dense(*qkv, mask, True)[0], tolerance=2**-8)


def test_no_array_of_all_scores_is_made(small_blocks):
    """Neither forward nor backward: the largest array that the programs compute has fewer than T x S elements."""
    t = 128
    qkv, mask = random_qkv(22, t, t, 1, 1), random_mask(23, t, t)

    def total(q, k, v):
        return jnp.sum(attend(q, k, v, mask, causal=True))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (
                int(np.prod(variable.aval.shape)) for variable in equation.outvars if hasattr(variable.aval, "shape")
            )
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    largest = max(sizes(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*qkv).jaxpr))
    assert largest < BATCH * t * t
