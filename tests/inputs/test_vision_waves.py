"""Waves of images and videos: their shapes depend on nothing else, are all listed, and fill every shard."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v_jax.config.model import Glm4vVisionConfig
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.vision_rows import buckets
from glm4v_jax.inputs.vision_waves import ENOUGH, Wave, medium_shape, vision_shapes, wave_rows, wave_size, waves_of

CONFIG = Glm4vVisionConfig()


def media(*grids):
    rng = np.random.default_rng(0)
    return [
        Medium(rng.standard_normal((math.prod(grid), CONFIG.patch_dim), np.float32), np.array(grid)) for grid in grids
    ]


@given(st.integers(1, 40), *[st.integers(1, 60)] * 2, st.sampled_from([1, 2, 4, 6, 8, 32]))
def test_waves_give_every_shard_enough(t, h, w, shards):
    grid = np.array([t, 2 * h, 2 * w])
    rows, length = medium_shape(grid, shards)
    assert rows * length >= math.prod(grid) and length >= 4 * h * w
    size = wave_size((rows, length), shards)
    assert size * rows % shards == 0
    of_a_shard = size * rows * length // shards
    least = math.lcm(rows, shards) * length // shards
    assert of_a_shard == least or ENOUGH // 2 < of_a_shard <= ENOUGH
    assert wave_size((1, length), 1) == 1 or length <= ENOUGH // 2


@settings(max_examples=20)
@given(st.tuples(*[st.integers(1, 30)] * 3), st.sampled_from([1, 2, 3, 4]))
def test_vision_shapes_hold_what_media_take(grid, shards):
    total, shape = 4 * math.prod(grid), medium_shape(np.array(grid) * [1, 2, 2], shards)
    for patches in ((1, total), (total, 2 * total)):
        for frames in (grid[0], None):
            assert shape in vision_shapes(CONFIG, patches, frames=frames, shards=shards)


@given(st.integers(1, 600), st.integers(0, 600), st.integers(1, 9), st.sampled_from([1, 2, 3]))
def test_vision_shapes_are_no_others(low, extra, frames, shards):
    high = low + extra
    images = {medium_shape([1, 1, n], shards) for n in range(low, high + 1)}
    videos = {
        medium_shape([t, 1, n], shards)
        for t in range(2, frames + 1)
        for n in range(4, high // t + 1, 4)
        if low <= t * n <= high
    }
    assert set(vision_shapes(CONFIG, (low, high), frames=frames, shards=shards)) == images | videos


def test_vision_shapes_are_few():
    assert vision_shapes(CONFIG, (4, 512)) == [(1, length) for length in (32, 48, 64, 96, 128, 192, 256, 384, 512)]
    assert vision_shapes(CONFIG, (4, 8192), frames=1) == [(1, length) for length in buckets(32, 8192)]
    assert len(vision_shapes(CONFIG, (4, 8192))) < 2 * len(buckets(32, 8192))
    # The processor's largest videos.
    assert len(vision_shapes(CONFIG, (16, 120_000), frames=300)) < 80


def test_waves_hold_one_shape_and_keep_the_order():
    images = media((1, 6, 6), (1, 8, 8), (1, 6, 8), (1, 2, 20), (1, 6, 6), (1, 6, 6))
    a, b, *others = images
    waves = waves_of(images, 1)
    assert waves == [Wave((1, 48), [a, *others[:3]]), Wave((1, 64), [b]), Wave((1, 48), others[3:])]
    assert [len(wave.media) for wave in waves_of(images, 1, lambda shape: 1)] == [1] * 6
    assert waves_of([], 1) == []


def test_the_rows_of_a_wave_are_padded_to_its_size():
    (video, image) = media((3, 4, 6), (1, 4, 6))
    for medium, count in ((video, 2), (image, 8)):
        shape = medium_shape(medium.grid, 1)
        rows, order = wave_rows(Wave(shape, [medium]), CONFIG, 1)
        assert order.shape == (count, shape[0] * shape[1] // 4) and len(rows.patches) == count * shape[0]
        assert not rows.segment_ids[shape[0] :].any()
        tokens = rows.patches.reshape(-1, 4, CONFIG.patch_dim)[order[0, : len(medium.patches) // 4]]
        assert np.array_equal(tokens.reshape(medium.patches.shape), medium.patches)
    empty, _ = wave_rows(Wave((1, 32), []), CONFIG, 4)
    assert len(empty.patches) == 32 and not empty.segment_ids.any()
