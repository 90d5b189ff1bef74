"""The cache: what is written where, and how large it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.model.kv_cache import grow, init_cache, write_layer, write_layers, write_segments

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
