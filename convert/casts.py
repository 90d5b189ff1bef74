"""Cast weights, and refuse to lose any: a finite number must stay finite."""

from collections.abc import Iterator

import numpy as np

from glm4v_jax.checkpoints.safetensors import in_chunks
from glm4v_jax.errors import CheckpointError, counted


def cast_chunks(array: np.ndarray, dtype: np.dtype, name: str) -> Iterator[np.ndarray]:
    """Return the chunks of `in_chunks`, rounded to nearest even.

    Raises:
      CheckpointError: numbers become infinite; the message has the tensor's name and how many they are.
    """
    if array.dtype == dtype:
        yield from in_chunks(array, dtype)
        return
    array, start, lost = np.atleast_1d(array), 0, 0
    chunks = in_chunks(array, dtype)
    while True:
        with np.errstate(over="ignore"):  # not around the yield, where the caller's code runs
            chunk = next(chunks, None)
        if chunk is None:
            break
        lost += _lost(array[start : start + len(chunk)], chunk)
        start += len(chunk)
        if not lost:  # else only the count matters
            yield chunk
    if lost:
        raise CheckpointError(
            f"{name}: found {counted(lost, 'number')} too large for {dtype.name}; expected none: use a dtype "
            "that holds them"
        )


def check_cast(array: np.ndarray, dtype: np.dtype, name: str) -> None:
    """Check that a cast loses no number, in chunks none of which is kept.

    Raises:
      CheckpointError: see `cast_chunks`.
    """
    for _ in cast_chunks(array, dtype, name):
        pass


def _lost(before: np.ndarray, after: np.ndarray) -> int:
    """Count the numbers that became infinite; those that were infinite or NaN before do not count."""
    infinite = ~np.isfinite(after)
    return int(np.count_nonzero(infinite & np.isfinite(before))) if infinite.any() else 0
