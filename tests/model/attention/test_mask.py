"""Which blocks of queries and keys can see each other."""

import numpy as np
import pytest

from glm4v_jax.model.attention.mask import Mask, covered, reachable, visible


def test_packed_rows_reach_their_own_blocks_alone():
    """What makes long rows of many images linear."""
    segments = np.repeat([[1, 2, 3, 4]], 8, axis=1).astype(np.int32)
    assert np.array_equal(reachable(Mask(segments, segments), (8, 8), causal=False)[0], np.eye(4, dtype=bool))


@pytest.mark.parametrize(("start", "diagonal"), [(None, 0), (8, 1)])
def test_causal_blocks_reach_no_later_ones_and_cover_earlier_ones(start, diagonal):
    ones = np.ones((1, 32), np.int32)
    mask = Mask(ones, ones, None if start is None else np.full(1, start, np.int32))
    expected = np.tril(np.ones((4, 4), bool), diagonal)
    assert np.array_equal(reachable(mask, (8, 8), causal=True)[0], expected)
    assert np.array_equal(covered(mask, (8, 8), causal=True)[0], np.tril(expected, diagonal - 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", [0, -1])
def test_blocks_are_reachable_where_a_pair_is_visible_and_covered_where_all_are(causal, padding):
    """Against all pairs of queries and keys; segments come in order, as packing makes them."""
    q = np.repeat([[1, 2, 3]], (16, 24, 24), axis=1)
    kv = np.repeat([[1, 2, 3, padding]], (16, 24, 50, 6), axis=1)
    mask = Mask(q, kv, np.array([8]))
    seen = np.asarray(visible(mask, np.arange(64), np.arange(96), causal))
    expected = seen.reshape(4, 16, 6, 16).any(axis=(1, 3))
    np.testing.assert_array_equal(reachable(mask, (16, 16), causal)[0], expected)
    assert not expected.all() and expected.any()
    whole = seen.reshape(4, 16, 6, 16).all(axis=(1, 3))
    np.testing.assert_array_equal(covered(mask, (16, 16), causal)[0], whole)
    assert causal or whole.any()
