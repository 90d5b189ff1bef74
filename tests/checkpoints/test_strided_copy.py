"""Copies into another order of axes are NumPy's."""

import ml_dtypes
import numpy as np
import pytest

from glm4v_jax.checkpoints.strided_copy import copy_in_squares, in_order

ORDERS = [(1, 0), (2, 0, 1), (0, 2, 1), (3, 1, 2, 0), (0, 1)]


@pytest.mark.parametrize("axes", ORDERS)
def test_copies_in_squares_hold_the_same_numbers(axes):
    source = np.random.default_rng(0).integers(0, 9, (300, 7, 513, 5)[: len(axes)]).transpose(axes)
    target = np.zeros(source.shape, source.dtype)
    copy_in_squares(target, source)
    np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_arrays_in_order_are_cast(axes, dtype):
    source = np.random.default_rng(0).standard_normal((30, 7, 51, 5)[: len(axes)]).astype(dtype).transpose(axes)
    found = in_order(source, np.dtype(ml_dtypes.bfloat16))
    assert found.flags.c_contiguous and found.tobytes() == source.astype(ml_dtypes.bfloat16).tobytes()
