"""The cache: what is written where, and how large it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.model.kv_cache import (
    QuantizedSide,
    dequantize_side,
    grow,
    init_cache,
    layer_of,
    quantize_side,
    write_layer,
    write_layers,
    write_segments,
)

pytestmark = pytest.mark.usefixtures("mesh")

TEXT = Glm4vConfig.from_dict(CONFIGS["mha"]).text_config  # three layers, four key heads of 16


@pytest.mark.parametrize("stacked", [True, False])
def test_a_new_cache_is_empty(stacked):
    cache = init_cache(TEXT, 2, 7, jnp.bfloat16, stacked=stacked)
    sides = [np.stack(side) if isinstance(side, tuple) else np.asarray(side) for side in (cache.k, cache.v)]
    assert all(side.shape == (3, 2, 4, 7, 16) and side.dtype == jnp.bfloat16 and not side.any() for side in sides)
    assert cache.is_stacked == stacked and cache.capacity == 7
    assert cache.segments.shape == (2, 7) and cache.length.tolist() == [0, 0]


def test_size_of_the_released_models_cache():
    text = Glm4vConfig.glm4_1v_9b().text_config
    cache = jax.eval_shape(lambda: init_cache(text, 8, 4096, jnp.bfloat16))
    assert sum(side.size * side.dtype.itemsize for side in (cache.k, cache.v)) == 8 * 4096 * 40 * 1024


def test_segments_are_written_at_their_own_slots():
    segments = write_segments(jnp.zeros((2, 6), jnp.int32), jnp.ones((2, 2), jnp.int32), jnp.array([0, 3]))
    assert segments.tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("index", [0, 2])
def test_rows_of_a_layer_are_written_at_their_own_slots(stacked, index):
    side = init_cache(TEXT, 2, 7, jnp.bfloat16, stacked=stacked).k
    new = np.arange(2 * 4 * 2 * 16, dtype=np.float32).reshape(2, 4, 2, 16)
    found = jax.jit(lambda side: write_layer(side, index, jnp.asarray(new), jnp.array([1, 5])))(side)
    expected = np.zeros((3, 2, 4, 7, 16), jnp.bfloat16)
    expected[index, 0, :, 1:3], expected[index, 1, :, 5:7] = new
    assert np.array_equal(np.stack(found), expected) and found[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("stacked", [True, False])
def test_rows_of_all_layers_are_written_at_once(stacked):
    side = init_cache(TEXT, 2, 7, jnp.float32, stacked=stacked).k
    new = np.arange(3 * 2 * 4 * 16, dtype=np.float32).reshape(3, 2, 4, 1, 16)
    found = jax.jit(lambda side: write_layers(side, jnp.asarray(new), jnp.array([6, 2])))(side)
    expected = np.zeros((3, 2, 4, 7, 16), np.float32)
    expected[:, 0, :, 6], expected[:, 1, :, 2] = new[:, 0, :, 0], new[:, 1, :, 0]
    assert np.array_equal(np.stack(found), expected)


@pytest.mark.parametrize("stacked", [True, False])
def test_growing_keeps_the_content(stacked):
    cache = init_cache(TEXT, 2, 4, jnp.float32, stacked=stacked)
    ones = tuple(x + 1 for x in cache.k) if not stacked else cache.k + 1
    cache = cache._replace(k=ones, segments=cache.segments + 1, length=cache.length + 4)
    larger = grow(cache, 9)
    k = np.stack(larger.k) if not stacked else np.asarray(larger.k)
    assert larger.capacity == 9 and larger.is_stacked == stacked and larger.length.max() == 4
    assert k.shape == (3, 2, 4, 9, 16) and (k[..., :4, :] == 1).all() and not k[..., 4:, :].any()
    assert np.array_equal(larger.segments, np.repeat([[1] * 4 + [0] * 5], 2, axis=0))


def test_integers_are_off_by_half_of_their_scale():
    """A scale per slot and head: large keys of one do not coarsen those of another. Zeros stay zeros."""
    size = 10.0 ** np.random.default_rng(0).integers(-6, 6, (2, 3, 5, 1))
    keys = (size * np.random.default_rng(1).standard_normal((2, 3, 5, 16))).astype(np.float32)
    keys[1, 2, 4] = 0
    found = jax.jit(quantize_side)(keys)
    assert found.integers.dtype == jnp.int8 and found.scale.shape == (2, 3, 5) and found.scale.dtype == jnp.float32
    assert np.abs(found.integers).max(axis=-1).tolist() == np.where(keys.any(axis=-1), 127, 0).tolist()
    error = np.abs(np.asarray(dequantize_side(found, jnp.float32), np.float64) - keys)
    # Half of the scale, and float32's rounding of a quotient of up to 127 and of a product.
    assert (error <= np.asarray(found.scale)[..., None] * (0.5 + 127 * 2.0**-22)).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(wrong):
    keys = np.ones((2, 4), np.float32)
    keys[0, 1] = wrong
    found = np.asarray(dequantize_side(quantize_side(jnp.asarray(keys)), jnp.float32))
    assert not np.isfinite(found[0]).any() and (found[1] == 1).all()


def test_size_of_an_int8_cache():
    text = Glm4vConfig.glm4_1v_9b().text_config
    caches = [jax.eval_shape(lambda dtype=dtype: init_cache(text, 8, 4096, dtype)) for dtype in (jnp.float32, jnp.int8)]
    of_floats, found = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((one.k, one.v))) for one in caches)
    assert found == of_floats * (1 + 4 / 128) / 4


@pytest.mark.parametrize("stacked", [True, False])
def test_integers_and_scales_are_written_and_grow_together(stacked):
    """One layer, then a token of all; the rest of the slots stay as they were."""
    cache = init_cache(TEXT, 2, 7, jnp.int8, stacked=stacked)
    draw = np.random.default_rng(2).standard_normal
    some, one = (draw(shape).astype(np.float32) for shape in ((2, 4, 2, 16), (3, 2, 4, 1, 16)))

    @jax.jit
    def written(cache):
        side = write_layer(cache.k, 1, quantize_side(jnp.asarray(some)), jnp.array([1, 5]))
        side = write_layers(side, quantize_side(jnp.asarray(one)), jnp.array([6, 2]))
        return grow(cache._replace(k=side), 9)

    larger = written(cache)
    assert larger.is_stacked == stacked and larger.capacity == 9
    expected = np.zeros((3, 2, 4, 9, 16), np.float32)
    expected[1, 0, :, 1:3], expected[1, 1, :, 5:7] = some
    expected[:, 0, :, 6], expected[:, 1, :, 2] = one[:, 0, :, 0], one[:, 1, :, 0]
    expected = quantize_side(jnp.asarray(expected))
    for i in range(3):
        found = layer_of(larger.k, i)
        assert isinstance(found, QuantizedSide)
        assert np.array_equal(found.integers, expected.integers[i]) and np.array_equal(found.scale, expected.scale[i])
