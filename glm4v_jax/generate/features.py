"""Vision tokens of pictures and videos, encoded once and kept on the device while there is room."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from glm4v_jax.generate import programs
from glm4v_jax.generate.prompt import Medium, frames
from glm4v_jax.inputs.packing import pack
from glm4v_jax.mesh import data_shards, reshard

if TYPE_CHECKING:
    from glm4v_jax.modeling_parts import Glm4vVisionModel

MIN_POOL = 2048
"""Merged tokens of the smallest pool. A pool grows fourfold until it holds what one prompt needs."""
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
    not multiply into programs. When it is full everything in it is forgotten; what is in a cache needs it no more.
    """

    def __init__(self, visual: "Glm4vVisionModel", capacity: int = MIN_POOL):
        """An empty pool of `capacity` merged tokens for what `visual` encodes."""
        self.visual = visual
        self._places: dict[bytes, np.ndarray] = {}
        self._used = 0
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
        missing = {key: medium for key, medium in distinct.items() if key not in self._places}
        if missing and not self._encode(missing):
            self._forget(self.capacity)
            while not self._encode(missing := distinct):
                self._forget(GROWTH * self.capacity)
        self.encoded += len(missing)
        self.reused += len(media) - len(missing)
        return [self._places[medium.key] for medium in media]

    def reserve(self, capacity: int) -> None:
        """Have room for at least `capacity` merged tokens; what is there is forgotten if it takes a new array."""
        if capacity > self.capacity:
            self._forget(capacity)

    def _encode(self, missing: dict[bytes, Medium]) -> bool:
        """Encode media and keep them, if there is room."""
        config, media = self.visual.config, list(missing.values())
        rows, merged_index = pack(
            np.concatenate([medium.patches for medium in media]) if len(media) > 1 else media[0].patches,
            frames(media),
            merge_size=config.spatial_merge_size,
            position_grid=config.position_grid,
            row_multiple=data_shards(),
        )
        if self._used + self.visual.tokens_of(rows.segment_ids.size) > self.capacity:
            return False
        features = self.visual.encode(rows)
        self.array = programs.store(self.array, features, np.int32(self._used))
        sizes = [int(np.prod(medium.grid)) // config.spatial_merge_size**2 for medium in media]
        places = np.split((merged_index + self._used).astype(np.int32), np.cumsum(sizes)[:-1])
        self._places |= zip(missing, places, strict=True)
        self._used += features.shape[0]
        return True

    def _forget(self, capacity: int) -> None:
        self._places, self._used = {}, 0
        if capacity != self.capacity:
            self.array = self._empty(capacity)

    def _empty(self, capacity: int) -> Array:
        return reshard(jnp.zeros((capacity, self.visual.config.out_hidden_size), self.visual.dtype), None, None)
