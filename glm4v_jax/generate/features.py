"""Vision tokens of pictures and videos, encoded once and kept on the device while there is room."""

import functools
import math
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from glm4v_jax.batch import VisionRows
from glm4v_jax.generate import programs
from glm4v_jax.generate.pieces import ENOUGH
from glm4v_jax.generate.prompt import Medium
from glm4v_jax.inputs.packing import bucket, choose_shape, empty_rows, fill, frames_of
from glm4v_jax.mesh import data_shards, reshard, use_mesh

if TYPE_CHECKING:
    from glm4v_jax.modeling_parts import Glm4vVisionModel

MIN_POOL = 2048
"""Merged tokens of the smallest pool. A pool grows fourfold until it holds what one prompt needs."""
KEPT = 8192
"""Those of a pool that outlives a prompt: 64 MiB of the 9B's in bfloat16."""
GROWTH = 4
MIN_PICTURE = 32
"""Patches of the smallest picture that the released processor makes."""
Shape = tuple[int, int]


def pool_capacity(num_tokens: int) -> int:
    """The pool for prompts whose vision tokens take so much room."""
    capacity = MIN_POOL
    while capacity < num_tokens:
        capacity *= GROWTH
    return capacity


def medium_shape(grid: np.ndarray, shards: int) -> Shape:
    """(R, L) of the rows of a picture or video, of which `grid` is int [3]: its own, whatever it is encoded with.

    A picture has a row; the frames of a video are packed, and spread over the shards if there are enough of them.
    """
    return _grid_shape(*map(int, grid), shards)


@functools.lru_cache(maxsize=256)
def _grid_shape(t: int, h: int, w: int, shards: int) -> Shape:
    if t == 1:
        return 1, bucket(h * w, MIN_PICTURE)
    return choose_shape([h * w] * t, shards if t >= shards else 1)


def wave_size(shape: Shape, shards: int) -> int:
    """How many media of this shape go through the encoder at a time.

    As many as make rows for all shards; of small ones, a power of two times as many: up to `pieces.ENOUGH` patches a
    shard.
    """
    rows, length = shape
    least = shards // math.gcd(rows, shards)
    times = max(1, ENOUGH * shards // (least * rows * length))
    return least << (times.bit_length() - 1)


class FeaturePool:
    """One array [P, D] on the device that prompts take their vision tokens from, by content.

    Its size is part of the programs' shapes, and nothing else about pictures is: prompt lengths and picture sizes do
    not multiply into programs. It is written from its start to its end and then over again, so that what is forgotten
    is the oldest; what is in a cache needs it no more. Between asking for places and reading `array`, hold `lock`.

    Media are encoded in waves of one shape, each in rows of its own, and a wave is padded if there are too few: what a
    picture's tokens are does not depend, not even by rounding, on what else there is to encode.
    """

    def __init__(self, visual: "Glm4vVisionModel", capacity: int = MIN_POOL):
        """An empty pool of `capacity` merged tokens for what `visual` encodes."""
        self.visual = visual
        self.lock = threading.RLock()
        with use_mesh(visual.mesh):
            self.shards = data_shards()
        self._spans: dict[bytes, tuple[int, int]] = {}
        self._unused: set[bytes] = set()  # of these, what nobody has asked for yet
        self._next = 0
        self.array = self._empty(capacity)
        self.encoded = 0
        """media that went through the encoder"""
        self.reused = 0
        """media that did not have to"""

    @property
    def capacity(self) -> int:
        """P, in merged tokens."""
        return self.array.shape[0]

    def __call__(self, media: Sequence[Medium], upcoming: Iterable[Medium] = ()) -> list[int]:
        """Where the merged tokens of each medium begin in `array`; encodes those that are not there yet.

        Args:
          media: what is needed.
          upcoming: what will be needed soon; it is encoded where a wave would be padded otherwise.
        """
        distinct = {medium.key: medium for medium in media}
        with self.lock:
            new = sum(key not in self._spans or key in self._unused for key in distinct)
            if not self._encode_all(self._waves(distinct.values(), upcoming), keep=distinct):
                self.forget()
                while not self._encode_all(self._waves(distinct.values()), keep=distinct):
                    self.forget(GROWTH * self.capacity)
            self._unused.difference_update(distinct)
            self.reused += len(media) - new
            return [self._spans[medium.key][0] for medium in media]

    def prefetch(self, upcoming: Sequence[Medium]) -> None:
        """Encode what will be needed soon, as far as it makes whole waves and leaves the rest of it in the pool."""
        with self.lock:
            whole = (wave for wave in self._waves(upcoming) if len(wave) == self._wave_size(wave[0]))
            self._encode_all(whole, keep={medium.key for medium in upcoming})

    def warm(self, shape: Shape) -> None:
        """Run the programs that media of this shape need, and begin anew."""
        rows, (order, starts) = self._empty_wave(shape), self._empty_order(shape)
        with self.lock, use_mesh(self.visual.mesh):
            features = self.visual.encode(rows)
            jax.block_until_ready(programs.store(self.array, features, order, starts))
            self.forget()

    def room_for(self, patches: int, shapes: Iterable[Shape]) -> int:
        """The capacity that holds media of so many patches in all, in rows of these shapes."""
        return pool_capacity(self._tokens(patches) + max(self._tokens(rows * length) for rows, length in shapes))

    def reserve(self, capacity: int) -> None:
        """Have room for at least `capacity` merged tokens; what is there is forgotten if it takes a new array."""
        if capacity > self.capacity:
            self.forget(capacity)

    def forget(self, capacity: int | None = None) -> None:
        """Begin anew, with an empty array, of another capacity if one is given."""
        with self.lock:
            self._spans, self._unused, self._next = {}, set(), 0
            self.array = self._empty(capacity if capacity is not None else self.capacity)

    def _tokens(self, patches: int) -> int:
        return patches // self.visual.config.spatial_merge_size**2

    def _shape(self, medium: Medium) -> Shape:
        return medium_shape(medium.grid, self.shards)

    def _wave_size(self, medium: Medium) -> int:
        return wave_size(self._shape(medium), self.shards)

    def _waves(self, media: Iterable[Medium], upcoming: Iterable[Medium] = ()) -> list[list[Medium]]:
        """What is not there of `media`, shape by shape; the last wave of a shape is filled up from `upcoming`."""
        by_shape: dict[Shape, dict[bytes, Medium]] = {}
        for medium in media:
            if medium.key not in self._spans:
                by_shape.setdefault(self._shape(medium), {})[medium.key] = medium
        for medium in upcoming:
            same = by_shape.get(self._shape(medium), {})
            if len(same) % self._wave_size(medium) and medium.key not in self._spans:
                same[medium.key] = medium
        waves = []
        for shape, same in by_shape.items():
            size, queue = wave_size(shape, self.shards), list(same.values())
            waves += [queue[i : i + size] for i in range(0, len(queue), size)]
        return waves

    def _encode_all(self, waves: Iterable[Sequence[Medium]], keep: Collection[bytes]) -> bool:
        try:
            return all(self._encode(wave, keep) for wave in waves)
        except BaseException:
            self.forget()  # the array may have been given away already
            raise

    def _encode(self, wave: Sequence[Medium], keep: Collection[bytes]) -> bool:
        """Encode media of one shape and keep them, unless there is no room or it is that of media in `keep`."""
        config, shape = self.visual.config, self._shape(wave[0])
        sizes = [self._tokens(len(medium.patches)) for medium in wave]
        room = self._tokens(shape[0] * shape[1])
        start = self._next if self._next + sum(sizes) + room <= self.capacity else 0
        end = start + sum(sizes)
        replaced = [key for key, (low, high) in self._spans.items() if low < end + room and start < high]
        if end + room > self.capacity or any(key in keep for key in replaced):
            return False
        for key in replaced:
            del self._spans[key]
            self._unused.discard(key)

        rows, (order, starts) = self._empty_wave(shape), self._empty_order(shape)
        starts[:] = end  # of the rows that stay empty
        for i, (medium, size) in enumerate(zip(wave, sizes, strict=True)):
            own = VisionRows(*(x[i * shape[0] : (i + 1) * shape[0]] for x in rows))
            index = fill(own, medium.patches, frames_of(medium.grid), merge_size=config.spatial_merge_size)
            order[i, :size], starts[i] = index + i * room, start
            self._spans[medium.key] = start, start + size
            start += size
        with use_mesh(self.visual.mesh):
            self.array = programs.store(self.array, self.visual.encode(rows), order, starts)
        self._next = end
        self._unused.update(medium.key for medium in wave)
        self.encoded += len(wave)
        return True

    def _empty_wave(self, shape: Shape) -> VisionRows:
        rows, length = shape
        count, config = wave_size(shape, self.shards), self.visual.config
        return empty_rows(count * rows, length, config.patch_dim, config.position_grid)

    def _empty_order(self, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """`order` and `starts` of `programs.store`."""
        count = wave_size(shape, self.shards)
        return np.zeros((count, self._tokens(shape[0] * shape[1])), np.int32), np.zeros(count, np.int32)

    def _empty(self, capacity: int) -> Array:
        with use_mesh(self.visual.mesh):
            zeros = jnp.zeros((capacity, self.visual.config.out_hidden_size), self.visual.dtype)
            return reshard(zeros, None, None)
