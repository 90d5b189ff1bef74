"""Casting weights without losing any: a number that is finite stays so, or the conversion is refused."""

from collections.abc import Iterator

import numpy as np

from glm4v_jax.checkpoints.safetensors import in_pieces
from glm4v_jax.errors import CheckpointError


def cast_pieces(array: np.ndarray, dtype: np.dtype, name: str) -> Iterator[np.ndarray]:
    """`in_pieces`, rounded to nearest even, of a tensor whose numbers `dtype` can hold.

    Raises:
      CheckpointError: some of them become infinite; the message has the tensor's name and how many these are.
    """
    if array.dtype == dtype:
        yield from in_pieces(array, dtype)
        return
    array, start, lost = np.atleast_1d(array), 0, 0
    pieces = in_pieces(array, dtype)
    while True:
        with np.errstate(over="ignore"):
            piece = next(pieces, None)
        if piece is None:
            break
        lost += _lost(array[start : start + len(piece)], piece)
        start += len(piece)
        if lost:
            break
        yield piece
    if lost:
        with np.errstate(over="ignore"):
            lost += sum(_lost(rest, rest.astype(dtype)) for rest in in_pieces(array[start:]))
        raise CheckpointError(
            f"{name}: found {lost:,} number{'s' * (lost != 1)} too large for {dtype.name}; expected none: another "
            "dtype holds them"
        )


def check_cast(array: np.ndarray, dtype: np.dtype, name: str) -> None:
    """Refuse to cast a tensor that has numbers which `dtype` cannot hold; in pieces, none of which is kept.

    Raises:
      CheckpointError: as `cast_pieces` does.
    """
    for _ in cast_pieces(array, dtype, name):
        pass


def _lost(before: np.ndarray, after: np.ndarray) -> int:
    """How many numbers have become infinite; those that were infinite or NaN before do not count."""
    infinite = ~np.isfinite(after)
    return int(np.count_nonzero(infinite & np.isfinite(before))) if infinite.any() else 0
