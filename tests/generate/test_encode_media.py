"""Vision as a function: each image alone, in one program for each shape.

`tests/serve/vllm_plugin/test_model.py` has it on two devices.
"""

import numpy as np
import pytest

from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.generate.encode_media import encode_media, encode_wave, run_wave
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.vision_rows import pack
from glm4v_jax.inputs.vision_waves import Wave, vision_shapes
from glm4v_jax.model.runtime import encode_rows

GRIDS = [(1, 6, 6), (1, 4, 4), (1, 6, 8), (3, 4, 6), (1, 2, 20), (1, 6, 6), (1, 8, 8), (3, 2, 2), (1, 6, 6)]


@pytest.fixture
def encode(engine):
    """The encoder of the tiny model; `encode.random` makes something to encode."""
    runtime, config = engine.runtime, engine.runtime.config.vision_config

    def run(media):
        with use_mesh(runtime.mesh):
            return [np.asarray(x) for x in encode_media(runtime.visual, config, media)]

    def random(grid, seed=0):
        patches = np.random.default_rng(seed).standard_normal((np.prod(grid), config.patch_dim), np.float32)
        return Medium(patches, np.array(grid))

    run.random, run.runtime, run.config = random, runtime, config
    return run


def test_features_are_those_of_packed_rows(encode):
    media = [encode.random(grid, i) for i, grid in enumerate(GRIDS)]
    rows, features = pack(media, merge_size=2, position_grid=encode.config.position_grid)
    with use_mesh(encode.runtime.mesh):
        packed = np.asarray(encode_rows(encode.runtime.visual, 2, rows))
    for medium, found in zip(media, encode([*media]), strict=True):
        expected = packed[features[medium]]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_features_do_not_depend_on_what_is_encoded_beside_them(encode):
    media = [encode.random(grid, i) for i, grid in enumerate(GRIDS)]
    together = encode([*media, media[0]])
    assert np.array_equal(together.pop(), together[0])
    for medium, found in zip(media, together, strict=True):
        (alone,) = encode([medium])
        assert np.array_equal(alone, found)
    broken = encode.random((1, 6, 6))
    broken.patches[5, 7] = np.nan
    *found, wrong = encode([*media, broken])
    assert all(map(np.array_equal, found, together)) and np.isnan(wrong).any()
    assert encode([]) == []


def test_after_warming_their_shapes_no_size_compiles_the_encoder(encode):
    with use_mesh(encode.runtime.mesh):
        for shape in vision_shapes(encode.config, (4, 64), frames=3):
            run_wave(encode.runtime.visual, encode.config, Wave(shape, []))
    before = encode_wave._cache_size()
    encode([encode.random(grid) for grid in (*GRIDS, (1, 2, 2), (2, 4, 8), (3, 2, 10), (1, 4, 16))])
    assert encode_wave._cache_size() == before
