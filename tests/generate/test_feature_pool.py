"""The pool of vision tokens: what a picture is encoded beside changes nothing, and what comes later has to wait."""

import numpy as np
import pytest

from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.generate.feature_pool import FeaturePool
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.vision_rows import pack

SIZES = [(6, 6), (4, 4), (6, 8), (2, 20), (6, 6), (8, 8), (6, 6)]
"""Rows of 48 patches for all but (4, 4), of 32, and (8, 8), of 64."""


def media(visual, sizes, seed=0, frames=1):
    rng = np.random.default_rng(seed)
    return [
        Medium(rng.standard_normal((frames * h * w, visual.config.patch_dim), np.float32), np.array([frames, h, w]))
        for h, w in sizes
    ]


@pytest.fixture
def visual(engine):
    return engine.model.visual


@pytest.fixture
def runtime(engine):
    return engine.runtime


@pytest.fixture
def pool(runtime):
    return FeaturePool(runtime)


def tokens(pool, medium):
    (begin,) = pool.encode([medium])
    return np.asarray(pool.array)[begin : begin + len(medium.patches) // 4]


def encoded(visual, medium):
    """The tokens of one image or video, packed alone."""
    config = visual.config
    rows, features = pack([medium], merge_size=config.spatial_merge_size, position_grid=config.position_grid)
    with use_mesh(visual.mesh):
        return np.asarray(visual.encode(rows))[features[medium]]


def test_tokens_are_the_encoders(pool, visual):
    pictures, videos = media(visual, SIZES), media(visual, [(4, 6), (2, 2)], 1, frames=3)
    pool.encode([*pictures, *videos])
    for medium in [*pictures, *videos]:
        expected = encoded(visual, medium)
        np.testing.assert_allclose(tokens(pool, medium), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert pool.encoded == len(pictures) + len(videos)


def test_tokens_do_not_depend_on_what_is_encoded_beside_them(pool, visual, runtime):
    pictures = media(visual, SIZES)
    pool.encode(pictures)
    for medium in pictures:
        alone = FeaturePool(runtime)
        alone.encode(media(visual, [(4, 6)], 7))  # so that it begins elsewhere
        assert np.array_equal(tokens(alone, medium), tokens(pool, medium))


def test_a_wave_is_filled_with_what_comes(pool, visual):
    pictures = media(visual, SIZES)
    first, *rest = pictures
    pool.encode([first], upcoming=[*rest, first])
    # Four in rows of 48 patches are as many as 256 patches allow; others would need a wave of their own.
    assert pool.encoded == 4 and pool.reused == 0
    pool.encode(rest[:3])
    assert pool.encoded == 5 and pool.reused == 0  # (4, 4)
    pool.encode([first, *rest])
    assert pool.encoded == len(pictures) and pool.reused == 4


def test_whole_waves_are_encoded_ahead(pool, visual):
    pictures = media(visual, [(6, 6)] * 7)
    pool.prefetch(pictures[:3])
    assert pool.encoded == 0
    pool.prefetch(pictures)
    assert pool.encoded == 4
    pool.prefetch(pictures)
    assert pool.encoded == 4
    pool.encode(pictures)
    assert pool.encoded == 7 and pool.reused == 0


def test_what_is_encoded_ahead_takes_no_room_from_what_comes_before_it(visual, runtime):
    small = FeaturePool(runtime, 256)
    pictures = media(visual, [(16, 16)] * 6)  # 64 tokens each
    small.prefetch(pictures)
    assert small.encoded == 2  # half of the pool
    found = [tokens(small, medium) for medium in pictures]
    assert small.encoded == 6 and small.capacity == 256
    roomy = FeaturePool(runtime)
    assert all(np.array_equal(tokens(roomy, medium), x) for medium, x in zip(pictures, found, strict=True))


def test_a_pool_grows_at_once_to_what_a_prompt_needs(visual, runtime):
    small = FeaturePool(runtime, 64)
    pictures = media(visual, [(16, 16), (4, 4), (20, 20)] * 3)
    begins = small.encode(pictures)
    assert small.encoded == 9 and small.capacity == 1024
    for begin, medium in zip(begins, pictures, strict=True):
        alone = tokens(FeaturePool(runtime), medium)
        assert np.array_equal(np.asarray(small.array)[begin : begin + len(alone)], alone)
    full = FeaturePool(runtime, 64)
    full.encode(pictures[:1])
    assert full.capacity == 64  # to the last token


def test_what_comes_does_not_drive_out_what_is_there(visual, runtime):
    small = FeaturePool(runtime, 64)
    kept, needed, *rest = media(visual, [(8, 8)] * 6)  # 16 tokens each, and waves of two: half of the pool
    small.encode([kept])
    small.encode([needed], upcoming=rest)
    assert small.encoded == 3
    small.encode([kept, needed, rest[0]])
    assert small.encoded == 3
    small.encode([kept, needed, rest[0], rest[1]], upcoming=rest[2:])
    assert small.encoded == 4 and small.capacity == 64


def test_an_error_leaves_an_empty_pool(pool, visual, monkeypatch):
    pictures = media(visual, SIZES)
    pool.encode(pictures[:2])

    def fail(*arguments):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("glm4v_jax.generate.device_steps.store_features", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            pool.encode(pictures)
        with pytest.raises(RuntimeError, match="out of memory"):
            pool.warm((1, 32))
    pool.encode(pictures)
    assert pool.encoded == 2 + len(pictures)
