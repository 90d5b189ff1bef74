"""Copy arrays into another order of axes and another dtype, on all cores.

NumPy's own copy takes several times as long: it goes element by element, each read or write misses the cache, and where
rows are a power of two apart the elements of a column share a few places of it. Here tiles that fit into the cache are
copied to rows of another length first: 0.6 ns a byte of int8, on one core, against 6.
"""

from collections.abc import Callable

import numpy as np

from glm4v_jax.checkpoints.mapped_file import PART_BYTES
from glm4v_jax.inputs.media.threads import map_threads, num_workers

# A tile: rows of the source, and bytes of each. It stays in the cache, and is read and written in whole lines.
_ROWS, _ROW_BYTES = 512, 512
# Elements between the rows of its copy at most.
_GAP = 64
# No more than this is copied in one thread: a part of a file, as what is of twice its width.
_SMALL_BYTES = 2 * PART_BYTES

Write = Callable[[np.ndarray, np.ndarray], None]
"""Writes what becomes of the second array into the first, element by element."""


def convert(target: np.ndarray, source: np.ndarray) -> None:
    """Compute `target[...] = source`, rounding and overflowing as `astype` does."""
    np.copyto(target, source, casting="unsafe")


def copy(target: np.ndarray, source: np.ndarray, write: Write = convert) -> None:
    """Compute `target[...] = source`, of one shape, fast also for arrays in different orders of axes.

    `write` writes a part of `source` into one of `target`; by default it converts to the dtype.
    """
    if source.dtype == target.dtype and source.dtype.kind == "V" and write is convert:
        # The bits of bfloat16 as integers: NumPy vectorises copies of its own dtypes only.
        words = np.dtype(f"u{source.dtype.itemsize}")
        target, source = target.view(words), source.view(words)
    if source.ndim == 0 or source.size == 0:
        write(target, source)
        return
    # The two axes that run fastest, one in either array.
    ours, theirs = (min(range(x.ndim), key=lambda axis: (x.strides[axis], -axis)) for x in (target, source))
    if ours == theirs or source.ndim < 2:
        work, axis, step = write, 0, -(-len(source) // num_workers())
    else:
        work, axis, step = _Tiles(ours, theirs, write), ours, _ROWS
    pieces = [(slice(None),) * axis + (slice(first, first + step),) for first in range(0, source.shape[axis], step)]
    errors = np.geterr()

    def one(piece: tuple[slice, ...]) -> None:
        with np.errstate(**errors):  # type: ignore[arg-type]  # a thread does not inherit it
            work(target[piece], source[piece])

    if target.nbytes <= _SMALL_BYTES:
        for piece in pieces:
            one(piece)
    else:
        map_threads(one, pieces)


class _Tiles:
    """Writes tile by tile, along the axis that is fastest in the source."""

    def __init__(self, ours: int, theirs: int, write: Write):
        self._ours, self._theirs, self._write = ours, theirs, write

    def __call__(self, target: np.ndarray, source: np.ndarray) -> None:
        others = [axis for axis in range(source.ndim) if axis not in (self._ours, self._theirs)]
        order = [*others, self._ours, self._theirs]
        shape = [source.shape[axis] for axis in order]
        length = shape[-1] = min(shape[-1], max(1, _ROW_BYTES // target.itemsize))
        buffer = np.empty((*shape[:-1], length + min(_GAP, length)), target.dtype)[..., :length]
        buffer = buffer.transpose(np.argsort(order))
        for first in range(0, source.shape[self._theirs], length):
            place = (slice(None),) * self._theirs + (slice(first, first + length),)
            part = source[place]
            tile = buffer[tuple(map(slice, part.shape))]
            self._write(tile, part)
            target[place] = tile


def in_order(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the array as `dtype` in C order: itself if possible, else a copy."""
    if array.flags.c_contiguous:
        return array.astype(dtype, copy=False)
    out = np.empty(array.shape, dtype)
    copy(out, array)
    return out
