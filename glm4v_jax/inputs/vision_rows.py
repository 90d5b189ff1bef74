"""Images and video frames -> static-shape rows (`VisionRows`), with little padding and few distinct shapes.

The shape (R, L) comes from a small set: L in {2^k, 3 * 2^(k-1)}, R in the same set scaled by `row_multiple` (the
number of shards of the data axes). Padding to the next member wastes 16% on average and a third at worst.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glm4v_jax.batch import VisionRows
from glm4v_jax.inputs.medium import Medium

MIN_ROW_LENGTH = 128
MAX_ROW_LENGTH = 8192
"""Rows are no longer than this unless one frame is: attention kernels that cannot skip blocks cost L^2 a row."""

CUBIC_A = -0.75  # torch's coefficient (`get_cubic_upsample_coefficients`); others use -0.5


def bucket(n: int, minimum: int = 1) -> int:
    """The smallest member of {2^k, 3 * 2^(k-1)} that is >= n and >= minimum (a member itself)."""
    n = max(n, minimum)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def buckets(low: int, high: int, minimum: int = 1) -> list[int]:
    """The buckets of all numbers from `low` to `high`, ascending."""
    found = [bucket(low, minimum)]
    while found[-1] < high:
        found.append(bucket(found[-1] + 1, minimum))
    return found


def choose_shape(lengths: Sequence[int], row_multiple: int = 1) -> tuple[int, int]:
    """The (R, L) of the bucket set that holds frames of these lengths with the least padding.

    Among equals the one of fewest rows. Frames are placed first-fit, longest first.
    """
    longest, total = max(lengths), sum(lengths)
    lower = bucket(longest, MIN_ROW_LENGTH)
    upper = max(lower, min(bucket(-(-total // row_multiple), MIN_ROW_LENGTH), MAX_ROW_LENGTH))
    shapes = []
    for length in buckets(lower, upper):
        rows = _num_rows(lengths, length)
        shapes.append((row_multiple * bucket(-(-rows // row_multiple)), length))
    return min(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))


def fits(lengths: Sequence[int], shape: tuple[int, int]) -> bool:
    """Whether frames of these lengths, in patches, fit rows of shape (R, L)."""
    if not lengths:
        return True
    (rows, length), longest, total = shape, max(lengths), sum(lengths)
    if longest > length or total > rows * length:
        return False
    # A row is opened only where every one before it has less room than the longest needs.
    return total <= rows * (length - longest + 1) or _num_rows(lengths, length) <= rows


def pack(
    media: Sequence[Medium],
    *,
    merge_size: int,
    position_grid: int,
    row_multiple: int = 1,
    shape: tuple[int, int] | None = None,
) -> tuple[VisionRows, dict[Medium, np.ndarray]]:
    """Pack the frames of images and videos into rows.

    >>> image = Medium(np.ones((24, 3), np.float32), np.array([1, 4, 6]))
    >>> rows, features = pack([image], merge_size=2, position_grid=5)
    >>> rows.patches.shape, features[image].tolist()
    ((1, 128, 3), [0, 1, 2, 3, 4, 5])

    Args:
      media: at least one; grid sides are multiples of merge_size.
      merge_size: merged tokens are merge_size x merge_size patches.
      position_grid: side S of the learned position table; 0 where there is none.
      row_multiple: the number of rows is a multiple of it.
      shape: (R, L) to use instead of the best fitting one, for a caller that wants one shape for many batches.

    Returns:
      The rows, and for each medium int32 [M]: where each of its merged tokens, frame after frame, lands in the
      flattened [R * L / merge_size^2] output of the encoder.

    Raises:
      ValueError: `shape` is too small.
    """
    lengths = np.concatenate([medium.frames.prod(axis=1) for medium in media]).tolist()
    rows = empty_rows(*(shape or choose_shape(lengths, row_multiple)), media[0].patches.shape[1], position_grid)
    return rows, fill(rows, media, merge_size=merge_size)


def empty_rows(num_rows: int, length: int, patch_dim: int, position_grid: int) -> VisionRows:
    """Rows of padding alone."""
    shape = num_rows, length
    return VisionRows(
        np.zeros((*shape, patch_dim), np.float32),
        np.zeros(shape, np.int32),
        np.zeros((*shape, 2), np.int32),
        *(np.zeros((*shape, position_grid), np.float32) for _ in range(2)),
    )


def fill(rows: VisionRows, media: Sequence[Medium], *, merge_size: int) -> dict[Medium, np.ndarray]:
    """Write the frames of images and videos into empty rows; arguments, result and error as `pack` has them."""
    num_rows, length = rows.segment_ids.shape
    lengths = [h * w for medium in media for h, w in medium.frames.tolist()]
    if not fits(lengths, (num_rows, length)):
        raise ValueError(f"{len(lengths)} frames of up to {max(lengths)} patches do not fit {num_rows} x {length}")
    starts = iter(_starts(lengths, length))
    patches, segments, coords, weights_h, weights_w = (x.reshape(num_rows * length, *x.shape[2:]) for x in rows)
    features, number = {}, 0
    for medium in media:
        (t, h, w), index = medium.grid.tolist(), []
        for frame in medium.patches.reshape(t, h * w, -1):
            number, start = number + 1, next(starts)
            here = slice(start, start + h * w)
            patches[here], segments[here] = frame, number
            coords[here], weights_h[here], weights_w[here] = _frame_tables(h, w, merge_size, weights_h.shape[1])
            index.append(np.arange(start, start + h * w, merge_size**2, dtype=np.int32) // merge_size**2)
        features[medium] = np.concatenate(index)
    return features


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
    if not source:
        return weights  # of a model without a position table
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


class RowPlace(NamedTuple):
    """Where an item stands: its row, its start there, and its number in the row, from 1 on."""

    row: int
    start: int
    segment: int


class FirstFit:
    """Rows that take items in their order, each in the first one with room; more items do not move those with a place.

    >>> rows = FirstFit(2, row_length=8)
    >>> [rows.add(length) for length in (5, 4, 6)]
    [RowPlace(row=0, start=0, segment=1), RowPlace(row=1, start=0, segment=1), None]

    A tree over the rows has the most room below each of its nodes: an item takes log2(rows) steps, where looking at one
    row after the other took 2 s for 8,192 frames of 5,000 patches.
    """

    def __init__(self, rows: int, row_length: int, per_row: int | None = None):
        """Start with empty rows, at least one; `per_row` is the most items of a row, None is no limit."""
        self._length, self._per_row = row_length, per_row
        self._leaves = 1 << (rows - 1).bit_length()
        self._counts = [0] * rows
        self._room = [-1] * self._leaves + [row_length] * rows + [-1] * (self._leaves - rows)
        for node in range(self._leaves - 1, 0, -1):
            self._room[node] = max(self._room[2 * node], self._room[2 * node + 1])

    def has_room(self, length: int) -> bool:
        """Whether `add` has a place for an item."""
        return length <= self._room[1]

    def add(self, length: int) -> RowPlace | None:
        """Place the next item; None, and nothing changes, where no row has room."""
        room, node = self._room, 1
        if length > room[node]:
            return None
        while node < self._leaves:
            node = 2 * node + (room[2 * node] < length)
        row, start = node - self._leaves, self._length - room[node]
        self._counts[row] += 1
        room[node] = -1 if self._counts[row] == self._per_row else room[node] - length
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
        return RowPlace(row, start, self._counts[row])


def first_fit(lengths: Sequence[int], row_length: int) -> list[RowPlace]:
    """Place items, none longer than a row, in as many rows as they need; see `FirstFit`."""
    # Two rows after each other hold more than one row could: so there are at most this many.
    rows = FirstFit(2 * (sum(lengths) // (row_length + 1)) + 1, row_length)
    return [place for length in lengths if (place := rows.add(length)) is not None]


def _num_rows(lengths: Sequence[int], row_length: int) -> int:
    return max(place.row for place in first_fit(sorted(lengths, reverse=True), row_length)) + 1


def _starts(lengths: Sequence[int], row_length: int) -> list[int]:
    """Where each frame begins in the flattened rows: longest first; ties keep their order."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = [0] * len(lengths)
    for i, place in zip(order, first_fit([lengths[i] for i in order], row_length), strict=True):
        starts[i] = place.row * row_length + place.start
    return starts
