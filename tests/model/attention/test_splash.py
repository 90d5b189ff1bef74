"""The TPU kernels, run as plain programs, against blockwise attention: results, gradients, masks, merging, blocks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close

from glm4v_jax.model.attention import blockwise, splash
from glm4v_jax.model.attention.attend import merge
from glm4v_jax.model.attention.mask import FLOOR, Mask
from glm4v_jax.model.kv_cache import dequantize_side, quantize_side

HEAD_DIM = 16
HALF = 2.0**-8
"""One rounding to bfloat16, at most, of the largest value; queries (scaled), sums and results are rounded."""

pytestmark = pytest.mark.usefixtures("mesh")


def local(kernel):
    """A kernel as it is called: on arrays of one device, in a `shard_map`."""

    def run(q, k, v, mask, *, causal):
        inside = functools.partial(kernel, causal=causal, interpret=True)
        return jax.shard_map(inside, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)(q, k, v, mask)

    return run


attention, partial = local(splash.attention), local(splash.partial)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, in lengths that run fast."""
    monkeypatch.setattr(splash, "QUERY_BLOCKS", (128,))
    monkeypatch.setattr(splash, "KEY_BLOCKS", (256, 128))
    monkeypatch.setattr(splash, "KEYS_AT_ONCE", 128)


def random_qkv(seed, batch, kv_heads, groups, t, s, dtype=np.float32):
    random = np.random.RandomState(seed)
    shapes = ((kv_heads, groups, t), (kv_heads, s), (kv_heads, s))
    return [jnp.asarray(random.standard_normal((batch, *shape, HEAD_DIM)), dtype) for shape in shapes]


def whole(segments):
    """Rows of which the queries are the keys."""
    segments = np.asarray(segments, np.int32)
    return Mask(segments, segments)


def runs(length, *edges):
    """Segments 1, 2, ... between `edges`; 0 elsewhere."""
    row = np.zeros(length, np.int32)
    for number, (a, b) in enumerate(itertools.pairwise(edges), 1):
        row[a:b] = number
    return row


@functools.partial(jax.jit, static_argnums=(0, 3))
def with_gradients(function, qkv, mask, causal, weight):
    """The result and the gradients of its product with `weight`; one program for all masks of a shape."""
    out, pull = jax.vjp(lambda *qkv: function(*qkv, mask, causal=causal), *qkv)
    return out, *pull(weight)


T = 300
MASKS = {
    "whole": whole([runs(T, 0, T)] * 2),
    "right_padding": whole([runs(T, 0, 100), runs(T, 0, 299)]),
    "left_padding": whole([runs(T, 200, T), runs(T, 1, T)]),
    "packed": whole([runs(T, 0, 128, 200, 201, 290), runs(T, 0, T)]),
    "padding_alone": whole([runs(T), runs(T, 0, T)]),
    "padding_within": whole([np.tile(runs(100, 10, 60), 3), np.repeat([2, 0, 1], 100)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_equals_blockwise(name, causal):
    """Results and gradients, of several blocks and a length that is no multiple of theirs."""
    mask = MASKS[name]
    qkv, weight = random_qkv(0, 2, 1, 2, T, T), random_qkv(1, 2, 1, 2, T, 1)[0]
    expected = with_gradients(blockwise.attention, qkv, mask, causal, weight)
    found = with_gradients(attention, qkv, mask, causal, weight)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, tolerance=2e-6)
    blind = np.broadcast_to((mask.q_segments == 0)[:, None, None], found[0].shape[:-1])
    assert not np.asarray(found[0])[blind].any()


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "groups"), [(3, 1), (1, 16)])
def test_each_group_of_query_heads_has_its_own_keys(kv_heads, groups):
    """Each group of query heads has its own keys."""
    mask = whole([runs(128, 0, 100, 120)])
    qkv, weight = random_qkv(2, 1, kv_heads, groups, 128, 128), random_qkv(3, 1, kv_heads, groups, 128, 1)[0]
    expected = with_gradients(blockwise.attention, qkv, mask, True, weight)
    for x, y in zip(with_gradients(attention, qkv, mask, True, weight), expected, strict=True):
        assert_close(x, y, tolerance=2e-6)


@pytest.mark.parametrize("start", [(0, 0), (128, 200), (270, 5), (-70, -200), (500, 400)])
def test_queries_may_start_at_any_slot(start):
    """A chunk of 130 tokens after 0 slots of a cache, after some, at its end; and at slots that are elsewhere."""
    t, s = 130, 400
    mask = Mask(np.stack([runs(t, 0, t), runs(t, 20, t)]), np.stack([runs(s, 0, s)] * 2), np.array(start))
    qkv, weight = random_qkv(4, 2, 1, 2, t, s), random_qkv(5, 2, 1, 2, t, 1)[0]
    expected = with_gradients(blockwise.attention, qkv, mask, True, weight)
    found = with_gradients(attention, qkv, mask, True, weight)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, tolerance=2e-6)
    assert not np.asarray(found[0])[np.asarray(expected[0]) == 0].any()


@pytest.mark.slow
def test_attention_to_disjoint_keys_merges():
    """Attention to a cache and to the new tokens, each with the sums that it takes to put them together."""
    t, s = 130, 260
    q, k, v = random_qkv(6, 2, 1, 2, t, s)
    new = [x[:, :, -t:] for x in (k, v)]
    segments = np.stack([runs(t, 0, t), runs(t, 60, t)])
    held = np.stack([runs(s - t, 0, 90), runs(s - t)])
    cached = partial(q, k[:, :, : s - t], v[:, :, : s - t], Mask(segments, held), causal=False)
    own = partial(q, *new, Mask(segments, segments), causal=True)
    everything = Mask(segments, np.concatenate([held, segments], axis=1), np.full(2, s - t))
    expected, log_total = blockwise.partial(q, k, v, everything, causal=True)
    found, found_total = merge(cached, own)
    assert_close(found, expected, tolerance=2e-6)
    seen = np.asarray(log_total) > FLOOR / 2
    assert_close(found_total, log_total, seen, tolerance=2e-6)
    assert seen.any() and (np.asarray(found_total)[~seen] < FLOOR / 2).all() and np.isfinite(found_total).all()
    assert all(x.dtype == jnp.float32 for x in (*cached, *own))
    # The row without a cache sees nothing there.
    assert not np.asarray(cached[0][1]).any() and (np.asarray(cached[1][1]) == np.float32(FLOOR)).all()


def test_integers_equal_their_floats():
    """The kernel gets the floats of a row at a time."""
    t, s = 130, 260
    q, k, v = random_qkv(8, 2, 1, 2, t, s)
    mask = Mask(np.stack([runs(t, 0, t), runs(t, 60, t)]), np.stack([runs(s, 0, 190), runs(s, 0, s)]))
    k, v = quantize_side(k), quantize_side(v)
    expected = partial(q, dequantize_side(k, q.dtype), dequantize_side(v, q.dtype), mask, causal=False)
    for x, y in zip(partial(q, k, v, mask, causal=False), expected, strict=True):
        assert np.array_equal(x, y)


def test_bfloat16_rounds_once():
    """bfloat16: within one rounding of the largest value from what float32 makes of the same numbers."""
    mask = MASKS["packed"]
    qkv, weight = random_qkv(7, 2, 1, 2, T, T, jnp.bfloat16), random_qkv(8, 2, 1, 2, T, 1, jnp.bfloat16)[0]
    exact = with_gradients(
        blockwise.attention, [x.astype(jnp.float32) for x in qkv], mask, True, weight.astype(jnp.float32)
    )
    found = with_gradients(attention, qkv, mask, True, weight)
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        assert_close(x.astype(jnp.float32), y, tolerance=HALF)


def test_real_block_sizes_equal_blockwise(monkeypatch):
    """With blocks of the real sizes, of which the keys' are worked on in halves."""
    monkeypatch.undo()
    mask = Mask(np.stack([runs(600, 0, 600)]), np.stack([runs(1100, 0, 900, 1100)]), np.array([300]))
    qkv = random_qkv(9, 1, 1, 2, 600, 1100)
    expected = with_gradients(blockwise.attention, qkv, mask, True, qkv[0])
    for x, y in zip(with_gradients(attention, qkv, mask, True, qkv[0]), expected, strict=True):
        assert_close(x, y, tolerance=2e-6)


def test_block_sizes_cost_the_least(monkeypatch):
    monkeypatch.undo()
    size, keys = splash._block_size, splash.KEY_BLOCKS
    assert [size(n, keys) for n in (1, 128, 129, 640, 1024, 65536)] == [128, 128, 256, 768, 1024, 1024]
    # Little padding for as few blocks as possible: 65 of 1,024 rather than 513 of 128.
    assert size(65664, keys) == 1024
    assert size(24576, splash.QUERY_BLOCKS) == 512


def test_the_next_visited_block_is_held():
    """A block that is visited is held when it is; before, so that reading it can begin; after the last, the first."""
    visited = np.array([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]], bool)
    expected = [[1, 1, 0], [0, 0, 0], [0, 2, 2], [1, 1, 1]]
    np.testing.assert_array_equal(splash._next_visited(visited), expected)
    np.testing.assert_array_equal(splash._next_visited(~visited & False), np.zeros((4, 3)))


def test_float32_products_have_highest_precision():
    """The multiplier of a TPU has 8 bits of mantissa unless it is asked for more, in every product."""
    qkv = random_qkv(10, 1, 1, 2, 128, 128)
    mask = whole([runs(128, 0, 128)])

    def precisions(dtype):
        gradient = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, mask, causal=True)), (0, 1, 2))
        text = str(jax.make_jaxpr(gradient)(*(x.astype(dtype) for x in qkv)))
        return text.count("dot_general["), text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")

    # Two products forward, three for the queries' gradient, four for that of keys and values; row sums of out * d_out.
    assert precisions(jnp.float32) == (10, 10)
    assert precisions(jnp.bfloat16) == (10, 0)
