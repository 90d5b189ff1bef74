"""Pictures and video frames -> static-shape rows (`VisionRows`), with little padding and few distinct shapes.

The shape (R, L) comes from a small set: L in {2^k, 3 * 2^(k-1)}, R in the same set scaled by `row_multiple` (the
number of shards of the data axes). Padding to the next member wastes 16% on average and a third at worst.
"""

import functools
from collections.abc import Sequence

import numpy as np

from glm4v_jax.batch import VisionRows

MIN_ROW_LENGTH = 128
MAX_ROW_LENGTH = 8192
"""Rows are no longer than this unless one frame is: attention kernels that cannot skip blocks cost L^2 a row."""

CUBIC_A = -0.75  # torch's coefficient (`get_cubic_upsample_coefficients`); others use -0.5


def bucket(n: int, minimum: int = 1) -> int:
    """The smallest member of {2^k, 3 * 2^(k-1)} that is >= n and >= minimum (a member itself)."""
    n = max(n, minimum)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def frames_of(grid_thw: np.ndarray) -> np.ndarray:
    """int [N, 3] grids of pictures or videos -> int [F, 2], height and width in patches of every frame."""
    grid_thw = np.asarray(grid_thw, np.int64).reshape(-1, 3)
    return np.repeat(grid_thw[:, 1:], grid_thw[:, 0], axis=0)


def choose_shape(lengths: Sequence[int], row_multiple: int = 1) -> tuple[int, int]:
    """The (R, L) of the bucket set that holds frames of these lengths with the least padding.

    Among equals the one of fewest rows. Frames are placed first-fit, longest first.
    """
    longest, total = max(lengths), sum(lengths)
    lower = bucket(longest, MIN_ROW_LENGTH)
    upper = max(lower, min(bucket(-(-total // row_multiple), MIN_ROW_LENGTH), MAX_ROW_LENGTH))
    shapes = []
    length = upper
    while length >= lower:
        rows = max(place(lengths, length)[0]) + 1
        shapes.append((row_multiple * bucket(-(-rows // row_multiple)), length))
        length = length * 2 // 3 if length & (length - 1) else length * 3 // 4
    return min(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))


def pack(
    pixel_values: np.ndarray,
    frames: np.ndarray,
    *,
    merge_size: int,
    position_grid: int,
    row_multiple: int = 1,
    shape: tuple[int, int] | None = None,
) -> tuple[VisionRows, np.ndarray]:
    """Pack frames into rows.

    Args:
      pixel_values: float [sum of h * w, P], flattened patches, frame after frame, in the processor's order.
      frames: int [F, 2], height and width of each frame in patches.
      merge_size: merged tokens are merge_size x merge_size patches.
      position_grid: side S of the learned position table.
      row_multiple: the number of rows is a multiple of it.
      shape: (R, L) to use instead of the best fitting one, for a caller that wants one shape for many batches.

    Returns:
      The rows, and int32 [merged tokens]: where each merged token, frame after frame, lands in the flattened
      [R * L / merge_size^2] output of the encoder.

    Raises:
      ValueError: patches and frames do not match, a side is no multiple of merge_size, or `shape` is too small.
    """
    frames = np.asarray(frames, np.int64).reshape(-1, 2)
    lengths = frames.prod(axis=1).tolist()
    if sum(lengths) != len(pixel_values):
        raise ValueError(f"grids count {sum(lengths)} patches, pixel values have {len(pixel_values)}")
    if np.any(frames % merge_size):
        raise ValueError(f"grid sides {frames.tolist()} are not all multiples of merge_size, {merge_size}")
    rows = empty_rows(*(shape or choose_shape(lengths, row_multiple)), pixel_values.shape[1], position_grid)
    return rows, fill(rows, pixel_values, frames, merge_size=merge_size)


def empty_rows(num_rows: int, length: int, patch_dim: int, position_grid: int) -> VisionRows:
    """Rows of padding alone."""
    shape = num_rows, length
    return VisionRows(
        np.zeros((*shape, patch_dim), np.float32),
        np.zeros(shape, np.int32),
        np.zeros((*shape, 2), np.int32),
        *(np.zeros((*shape, position_grid), np.float32) for _ in range(2)),
    )


def fill(rows: VisionRows, pixel_values: np.ndarray, frames: np.ndarray, *, merge_size: int) -> np.ndarray:
    """Write frames into empty rows; arguments and result as `pack` has them.

    Raises:
      ValueError: the rows are too few, or too short.
    """
    num_rows, length = rows.segment_ids.shape
    lengths = frames.prod(axis=1).tolist()
    row_of, offset_of = place(lengths, length)
    if max(row_of, default=0) >= num_rows or max(lengths, default=0) > length:
        raise ValueError(f"{len(lengths)} frames of up to {max(lengths)} patches do not fit {num_rows} x {length}")
    patches, segments, coords, weights_h, weights_w = (x.reshape(num_rows * length, *x.shape[2:]) for x in rows)
    merged_index, start = [], 0
    for number, ((h, w), n) in enumerate(zip(frames.tolist(), lengths, strict=True), start=1):
        to = row_of[number - 1] * length + offset_of[number - 1]
        here = slice(to, to + n)
        patches[here] = pixel_values[start : start + n]
        segments[here] = number
        coords[here], weights_h[here], weights_w[here] = _frame_tables(h, w, merge_size, weights_h.shape[1])
        merged_index.append(np.arange(to, to + n, merge_size**2, dtype=np.int32) // merge_size**2)
        start += n
    return np.concatenate(merged_index)


def padded_share(rows: VisionRows) -> float:
    """The share of the rows' patches that are padding."""
    return float(np.mean(rows.segment_ids == 0))


def merge_order(h: int, w: int, merge_size: int) -> np.ndarray:
    """int32 [h * w, 2]: row and column of each patch, in blocks of merge_size x merge_size (`rot_pos_emb`; trap T8)."""
    grid = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
    blocks = grid.reshape(h // merge_size, merge_size, w // merge_size, merge_size, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2).astype(np.int32)


def bicubic_weights(target: int, source: int) -> np.ndarray:
    """float32 [target, source]: row i are the weights by which sample i of `target` mixes a table of `source` entries.

    `torch.nn.functional.grid_sample(mode="bicubic", padding_mode="border", align_corners=False)` at the coordinates of
    `Glm4vVisionEmbeddings.forward`, in its float32 arithmetic: taps beyond the border count for the border's entry.
    """
    one = np.float32(1)
    normalised = (np.arange(target, dtype=np.float32) + np.float32(0.5)) / np.float32(target) * np.float32(2) - one
    position = ((normalised + one) * np.float32(source) - one) / np.float32(2)
    base = np.floor(position)
    t = position - base
    weights = np.zeros((target, source), np.float32)
    for tap, coefficient in enumerate((_outer(t + one), _inner(t), _inner(one - t), _outer(np.float32(2) - t))):
        index = np.clip(base.astype(np.int64) + tap - 1, 0, source - 1)
        np.add.at(weights, (np.arange(target), index), coefficient)
    return weights


def _inner(x: np.ndarray) -> np.ndarray:
    a = np.float32(CUBIC_A)
    return ((a + 2) * x - (a + 3)) * x * x + 1


def _outer(x: np.ndarray) -> np.ndarray:
    a = np.float32(CUBIC_A)
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a


@functools.lru_cache(maxsize=16)
def _frame_tables(h: int, w: int, merge_size: int, position_grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    coords = merge_order(h, w, merge_size)
    weights_h, weights_w = bicubic_weights(h, position_grid), bicubic_weights(w, position_grid)
    return coords, weights_h[coords[:, 0]], weights_w[coords[:, 1]]


def place(lengths: Sequence[int], row_length: int) -> tuple[list[int], list[int]]:
    """Row and offset of each frame, in rows of this length: first fit, longest first; ties keep their order."""
    free: list[int] = []
    row_of, offset_of = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, space in enumerate(free) if space >= lengths[i]), len(free))
        if row == len(free):
            free.append(row_length)
        row_of[i], offset_of[i] = row, row_length - free[row]
        free[row] -= lengths[i]
    return row_of, offset_of
