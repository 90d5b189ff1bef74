"""The arguments of cuDNN, by the implementation that takes the same ones on any platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close

from glm4v_jax.model.attention import blockwise, cudnn
from glm4v_jax.model.attention.mask import Mask

HEAD_DIM = 16
LENGTH = 24


def random_qkv(seed, batch, kv_heads, groups, dtype=np.float32):
    random = np.random.RandomState(seed)
    shapes = ((kv_heads, groups), (kv_heads,), (kv_heads,))
    return [jnp.asarray(random.standard_normal((batch, *shape, LENGTH, HEAD_DIM)), dtype) for shape in shapes]


def right_padded(*lengths):
    segments = (np.arange(LENGTH) < np.array(lengths)[:, None]).astype(np.int32)
    return Mask(segments, segments)


def images(rows, length):
    """Rows of images of `length` patches, numbered; 0 for none."""
    segments = np.repeat(np.array(rows, np.int32), length, axis=1)
    return Mask(segments, segments)


attention = functools.partial(cudnn.attention, implementation="xla")


@functools.partial(jax.jit, static_argnames=("function", "causal"))
def with_gradients(function, qkv, mask, weight, **options):
    """The result and the gradients of its product with `weight`; one program for all masks of a shape."""
    out, pull = jax.vjp(lambda *qkv: function(*qkv, mask, **options), *qkv)
    return out, *pull(weight)


CASES = {
    "whole": (right_padded(LENGTH, LENGTH), True),
    "right_padding": (right_padded(7, LENGTH - 1), True),
    "padding_alone": (right_padded(0, 5), True),
    "no_order": (right_padded(1, 9), False),
    "a_segment_of_another_number": (Mask(*(3 * x for x in right_padded(6, 9)[:2])), False),
}
OTHERS = {
    "packed": images([[1, 2, 3], [1, 2, 3]], 8),
    "left_padding": images([[0, 1, 1], [1, 1, 1]], 8),
    "gap": images([[1, 0, 1], [1, 1, 1]], 8),
    "keys_of_others": Mask(right_padded(9, 9).q_segments, right_padded(9, 8).kv_segments),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "groups"), [(2, 3), (4, 1)])
@pytest.mark.parametrize("name", CASES)
def test_equals_blockwise(monkeypatch, name, kv_heads, groups):
    """cuDNN's way alone: blocks would give something else."""
    mask, causal = CASES[name]
    assert cudnn.is_plain(mask)
    qkv, weight = random_qkv(0, 2, kv_heads, groups), random_qkv(1, 2, kv_heads, groups)[0]
    expected = with_gradients(blockwise.attention, qkv, mask, weight, causal=causal)
    monkeypatch.setattr(cudnn, "fits", lambda q, mask: True)
    monkeypatch.setattr(blockwise, "attention", lambda q, *args, **kwargs: q * jnp.nan)
    found = jax.jit(lambda *args: with_gradients.__wrapped__(attention, *args, causal=causal))(qkv, mask, weight)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, tolerance=2e-6)
    blind = np.broadcast_to((mask.q_segments == 0)[:, None, None], found[0].shape[:-1])
    assert not np.asarray(found[0])[blind].any()


@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_are_not_plain_go_in_blocks(name):
    mask, qkv = OTHERS[name], random_qkv(2, 2, 2, 1, jnp.bfloat16)
    assert not cudnn.is_plain(mask)
    found = jax.jit(lambda *qkv: attention(*qkv, mask, causal=True))(*qkv)
    expected = jax.jit(lambda *qkv: blockwise.attention(*qkv, mask, causal=True))(*qkv)
    assert np.array_equal(found, expected)


def test_bfloat16_rounds_probabilities_and_result():
    """In and out; probabilities and the result are rounded, each by half a unit in the last place."""
    mask = right_padded(7, LENGTH)
    qkv = random_qkv(3, 2, 2, 2, jnp.bfloat16)
    found = jax.jit(lambda *qkv: attention(*qkv, mask, causal=True))(*qkv)
    exact = blockwise.attention(*(x.astype(jnp.float32) for x in qkv), mask, causal=True)
    assert found.dtype == jnp.bfloat16
    assert_close(found.astype(jnp.float32), exact, tolerance=2**-7)


def test_types_and_shapes_that_cudnn_takes():
    mask = right_padded(7, LENGTH)
    q = random_qkv(4, 2, 1, 1, jnp.bfloat16)[0]
    after_cache = Mask(mask.q_segments, np.ones((2, 2 * LENGTH), np.int32), np.array([3, 4]))
    fits = cudnn.fits
    assert fits(q, mask) and fits(q.astype(jnp.float16), mask)
    assert not fits(q.astype(jnp.float32), mask)
    assert not fits(q, after_cache)
    assert not fits(q, after_cache._replace(q_start=None))
    assert not fits(q[..., :12], mask)
    assert not fits(jnp.tile(q, 9), mask)
