"""Waves: images and videos of one shape that are encoded together, and the list of those shapes.

The shape of an image or video depends on nothing but its own grid, and a wave of a shape always has the same number of
rows. So every shape is one program, and features do not depend, not even by rounding, on what else is encoded.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from glm4v_jax.batch import VisionRows
from glm4v_jax.config.model import Glm4vVisionConfig
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.vision_rows import (
    MAX_ROW_LENGTH,
    MIN_ROW_LENGTH,
    bucket,
    buckets,
    choose_shape,
    empty_rows,
    fill,
)

MIN_IMAGE_PATCHES = 32
"""Patches of the smallest image that the released processor makes."""
ENOUGH = 256
"""Patches that are worth a dispatch: with fewer, reading the weights takes longer than using them (a TPU v5e does 240
multiplications in the time in which it reads a bfloat16 from memory)."""

Shape = tuple[int, int]
"""(R, L): the rows of one image or video, and the patches of a row."""


class Wave(NamedTuple):
    """Images or videos of one shape that are encoded together, `wave_size` of them at most."""

    shape: Shape
    media: Sequence[Medium]


def medium_shape(grid: np.ndarray, shards: int) -> Shape:
    """(R, L) of the rows of an image or video with `grid`, int [3], whatever else is encoded with it.

    An image has one row; the frames of a video are packed into rows, and spread over the shards.
    """
    return _grid_shape(*map(int, grid), shards)


@functools.lru_cache(maxsize=256)
def _grid_shape(t: int, h: int, w: int, shards: int) -> Shape:
    if t == 1:
        return 1, bucket(h * w, MIN_IMAGE_PATCHES)
    return choose_shape([h * w] * t, shards)


def wave_size(shape: Shape, shards: int) -> int:
    """How many images or videos of this shape are encoded in one dispatch.

    Enough to give every shard a row; of small ones a power of two times as many, up to `ENOUGH` patches a shard.
    """
    rows, length = shape
    least = shards // math.gcd(rows, shards)
    times = max(1, ENOUGH * shards // (least * rows * length))
    return least << (times.bit_length() - 1)


def vision_shapes(
    config: Glm4vVisionConfig, patches: tuple[int, int], *, frames: int | None = None, shards: int = 1
) -> list[Shape]:
    """Return each shape that `medium_shape` gives images and videos of a range of sizes, ascending by area.

    >>> vision_shapes(Glm4vVisionConfig(), (64, 256), frames=1)
    [(1, 64), (1, 96), (1, 128), (1, 192), (1, 256)]

    Args:
      config: of the ViT.
      patches: the fewest and the most of an image, or of all frames of a video together; `smart_resize.patch_range` of
        a processor.
      frames: the most of a video, in patches along time; 1 for images alone, None for any number.
      shards: of the rows.
    """
    low, high = patches
    shapes = {(1, length) for length in buckets(low, high, MIN_IMAGE_PATCHES)}
    shapes |= _video_shapes(config.spatial_merge_size**2, low, high, frames, shards)
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))


def _video_shapes(cell: int, low: int, high: int, frames: int | None, shards: int) -> set[Shape]:
    """What `choose_shape` gives t frames of n patches, for all t and n at once; it would take minutes one by one."""
    most = min(frames or high, high // cell)
    pairs = [(t, np.arange(cell, high // t + 1, cell)) for t in range(2, most + 1)]
    if not pairs:
        return set()
    n = np.concatenate([sizes for _, sizes in pairs])
    t = np.repeat([t for t, _ in pairs], [len(sizes) for _, sizes in pairs])
    n, t = n[n * t >= low], t[n * t >= low]
    members = np.array(buckets(1, max(high, shards, MAX_ROW_LENGTH)))

    def of_bucket(x: np.ndarray) -> np.ndarray:
        return members[np.searchsorted(members, x)]

    lower = np.maximum(of_bucket(n), MIN_ROW_LENGTH)
    upper = np.maximum(lower, np.clip(of_bucket(-(-n * t // shards)), MIN_ROW_LENGTH, MAX_ROW_LENGTH))
    best, of_best = np.full(len(n), np.iinfo(np.int64).max), np.zeros((len(n), 2), np.int64)
    for length in buckets(MIN_ROW_LENGTH, int(upper.max(initial=MIN_ROW_LENGTH))):
        rows = -(-t // np.maximum(length // n, 1))
        rows = shards * of_bucket(-(-rows // shards))
        is_candidate = (lower <= length) & (length <= upper)
        # Ascending, so that rows become fewer: among equals the last one counts.
        is_best = is_candidate & (rows * length <= best)
        best = np.where(is_best, rows * length, best)
        of_best = np.where(is_best[:, None], np.stack([rows, np.full_like(rows, length)], axis=1), of_best)
    return {(rows, length) for rows, length in of_best.tolist()}


def waves_of(media: Iterable[Medium], shards: int, most: Callable[[Shape], int] | None = None) -> list[Wave]:
    """Group images and videos, none twice, into waves of one shape, in the order of the first of each.

    `shards` are those of the rows; `most` says how many of a shape a wave takes, where it is less than `wave_size`.
    """
    order: dict[Medium, int] = {}
    by_shape: dict[Shape, list[Medium]] = {}
    for medium in media:
        order[medium] = len(order)
        by_shape.setdefault(medium_shape(medium.grid, shards), []).append(medium)
    waves = []
    for shape, same in by_shape.items():
        size = wave_size(shape, shards) if most is None else most(shape)
        waves += [Wave(shape, same[i : i + size]) for i in range(0, len(same), size)]
    return sorted(waves, key=lambda wave: order[wave.media[0]])


def wave_rows(wave: Wave, config: Glm4vVisionConfig, shards: int) -> tuple[VisionRows, np.ndarray]:
    """Pack a wave; what it lacks to `wave_size` is padding.

    Returns:
      The rows, and int32 [M, U]: where the merged tokens of each image or video lie among those of all rows. Of M =
      `wave_size` images or videos the last may be padding, and of U tokens those after its own.
    """
    (num_rows, length), merge_size = wave.shape, config.spatial_merge_size
    count, room = wave_size(wave.shape, shards), num_rows * length // merge_size**2
    rows = empty_rows(count * num_rows, length, config.patch_dim, config.position_grid)
    order = np.zeros((count, room), np.int32)
    for i, medium in enumerate(wave.media):
        own = VisionRows(*(x[i * num_rows : (i + 1) * num_rows] for x in rows))
        index = fill(own, [medium], merge_size=merge_size)[medium]
        order[i, : len(index)] = index + i * room
    return rows, order
