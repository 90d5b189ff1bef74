"""Copy arrays into another order of axes.

NumPy's own copy takes several times as long: it goes element by element, and each read or write misses the cache.
"""

import numpy as np

# Side of the squares to copy at a time: rows of both arrays stay in the cache.
_SQUARE = 256


def copy_in_squares(target: np.ndarray, source: np.ndarray) -> None:
    """Compute `target[...] = source`, fast also for arrays in different orders of axes."""
    if source.ndim < 2 or source.flags.c_contiguous:
        target[...] = source
        return
    # The two axes that run fastest, one in either array.
    ours = target.ndim - 1
    theirs = min(range(source.ndim), key=lambda axis: (source.strides[axis], -axis))
    if ours == theirs:
        target[...] = source
        return
    for i in range(0, source.shape[ours], _SQUARE):
        for j in range(0, source.shape[theirs], _SQUARE):
            place: list[slice] = [slice(None)] * source.ndim
            place[ours], place[theirs] = slice(i, i + _SQUARE), slice(j, j + _SQUARE)
            target[tuple(place)] = source[tuple(place)]


def in_order(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the array as `dtype` in C order: itself if possible, else a copy."""
    if array.flags.c_contiguous:
        return array.astype(dtype, copy=False)
    out = np.empty(array.shape, dtype)
    if array.dtype == dtype and dtype.kind == "V":
        # The bits of bfloat16 as integers: NumPy vectorises copies of its own dtypes only.
        words = np.dtype(f"u{dtype.itemsize}")
        copy_in_squares(out.view(words), array.view(words))
    else:
        copy_in_squares(out, array)
    return out
