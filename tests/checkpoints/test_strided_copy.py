"""Copies into another order of axes are NumPy's."""

import ml_dtypes
import numpy as np
import pytest

from glm4v_jax.checkpoints.strided_copy import copy, in_order

ORDERS = [(1, 0), (2, 0, 1), (0, 2, 1), (3, 1, 2, 0), (0, 1)]


@pytest.mark.parametrize("axes", ORDERS)
def test_copies_in_tiles_hold_the_same_numbers(axes):
    source = np.random.default_rng(0).integers(0, 9, (300, 7, 513, 5)[: len(axes)]).transpose(axes)
    target = np.zeros(source.shape, source.dtype)
    copy(target, source)
    np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("to", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_copies_round_as_numpy_does(dtype, to):
    source = np.random.default_rng(0).standard_normal((300, 70)).astype(dtype).T
    target = np.zeros(source.shape, to)
    copy(target, source)
    assert target.tobytes() == source.astype(to).tobytes()


@pytest.mark.filterwarnings("error")
def test_threads_ignore_the_overflows_that_the_caller_ignores():
    source = np.full((1 << 12, 1 << 10), 1e9, np.float32).T
    with np.errstate(over="ignore"):
        copy(target := np.zeros(source.shape, np.float16), source)
    assert np.isinf(target).all()
    with pytest.raises(RuntimeWarning, match="overflow"):
        copy(target, source)


@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_arrays_in_order_are_cast(axes, dtype):
    source = np.random.default_rng(0).standard_normal((30, 7, 51, 5)[: len(axes)]).astype(dtype).transpose(axes)
    found = in_order(source, np.dtype(ml_dtypes.bfloat16))
    assert found.flags.c_contiguous and found.tobytes() == source.astype(ml_dtypes.bfloat16).tobytes()
