"""Vision tokens of pictures and videos, encoded once and kept on the device while there is room."""

import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from glm4v_jax.generate import programs
from glm4v_jax.generate.prompt import Medium, frames
from glm4v_jax.inputs.packing import pack
from glm4v_jax.mesh import data_shards, reshard, use_mesh

if TYPE_CHECKING:
    from glm4v_jax.modeling_parts import Glm4vVisionModel

MIN_POOL = 2048
"""Merged tokens of the smallest pool. A pool grows fourfold until it holds what one prompt needs."""
KEPT = 8192
"""Those of a pool that outlives a prompt: 64 MiB of the 9B's in bfloat16."""
GROWTH = 4


def pool_capacity(num_tokens: int) -> int:
    """The pool for prompts whose vision tokens, padded as the encoder returns them, are this many."""
    capacity = MIN_POOL
    while capacity < num_tokens:
        capacity *= GROWTH
    return capacity


class FeaturePool:
    """One array [P, D] on the device that prompts take their vision tokens from, by content.

    Its size is part of the programs' shapes, and nothing else about pictures is: prompt lengths and picture sizes do
    not multiply into programs. It is written from its start to its end and then over again, so that what is forgotten
    is the oldest; what is in a cache needs it no more. Between asking for places and reading `array`, hold `lock`.
    """

    def __init__(self, visual: "Glm4vVisionModel", capacity: int = MIN_POOL):
        """An empty pool of `capacity` merged tokens for what `visual` encodes."""
        self.visual = visual
        self.lock = threading.RLock()
        self._places: dict[bytes, np.ndarray] = {}
        self._spans: dict[bytes, tuple[int, int]] = {}  # of all that was encoded together
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

    def __call__(self, media: Sequence[Medium]) -> list[np.ndarray]:
        """Where the merged tokens of each medium are in `array`, int32 [n]; encodes those that are not there yet."""
        distinct = {medium.key: medium for medium in media}
        with self.lock:
            missing = {key: medium for key, medium in distinct.items() if key not in self._places}
            try:
                if missing and not self._encode(missing, keep=distinct):
                    self.forget()
                    missing = distinct
                    while not self._encode(missing, keep=()):
                        self.forget(GROWTH * self.capacity)
            except BaseException:
                self.forget()  # the array may have been given away already
                raise
            self.encoded += len(missing)
            self.reused += len(media) - len(missing)
            return [self._places[medium.key] for medium in media]

    def reserve(self, capacity: int) -> None:
        """Have room for at least `capacity` merged tokens; what is there is forgotten if it takes a new array."""
        if capacity > self.capacity:
            self.forget(capacity)

    def forget(self, capacity: int | None = None) -> None:
        """Begin anew, with an empty array, of another capacity if one is given."""
        with self.lock:
            self._places, self._spans, self._next = {}, {}, 0
            self.array = self._empty(capacity if capacity is not None else self.capacity)

    def _encode(self, missing: dict[bytes, Medium], keep: Collection[bytes]) -> bool:
        """Encode media and keep them, unless there is no room or it is that of media in `keep`."""
        config, media = self.visual.config, list(missing.values())
        rows, merged_index = pack(
            np.concatenate([medium.patches for medium in media]) if len(media) > 1 else media[0].patches,
            frames(media),
            merge_size=config.spatial_merge_size,
            position_grid=config.position_grid,
            row_multiple=data_shards(),
        )
        size = self.visual.tokens_of(rows.segment_ids.size)
        start = self._next if self._next + size <= self.capacity else 0
        stop = start + size
        replaced = [key for key, (low, high) in self._spans.items() if low < stop and start < high]
        if stop > self.capacity or any(key in keep for key in replaced):
            return False
        for key in replaced:
            del self._places[key], self._spans[key]
        self.array = programs.store(self.array, self.visual.encode(rows), np.int32(start))
        sizes = [int(np.prod(medium.grid)) // config.spatial_merge_size**2 for medium in media]
        places = np.split((merged_index + start).astype(np.int32), np.cumsum(sizes)[:-1])
        self._next = stop
        self._spans |= dict.fromkeys(missing, (start, stop))
        self._places |= zip(missing, places, strict=True)
        return True

    def _empty(self, capacity: int) -> Array:
        with use_mesh(self.visual.mesh):
            zeros = jnp.zeros((capacity, self.visual.config.out_hidden_size), self.visual.dtype)
            return reshard(zeros, None, None)
