"""Vision features of images and videos, encoded once and kept on the device while there is room."""

import collections
import contextlib
import itertools
import math
import threading
from collections.abc import Collection, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from glm4v_jax.devices import stored_programs
from glm4v_jax.devices.mesh import data_shards, reshard
from glm4v_jax.generate import device_steps
from glm4v_jax.generate.encode_media import encode_wave, run_wave
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.vision_waves import Shape, Wave, medium_shape, vision_shapes, wave_rows, wave_size, waves_of
from glm4v_jax.model.runtime import Runtime, compute_dtype

MIN_POOL = 2048
"""Merged tokens of the smallest pool. A pool grows fourfold until it holds what one prompt needs."""
KEPT = 8192
"""Merged tokens of an engine's pool: 64 MiB of the 9B's in bfloat16."""
GROWTH = 4


def pool_capacity(num_tokens: int) -> int:
    """The size of the pool that holds this many vision tokens."""
    capacity = MIN_POOL
    while capacity < num_tokens:
        capacity *= GROWTH
    return capacity


class FeaturePool:
    """One array [P, D] on the device that prompts take their vision tokens from, by content.

    Its size is part of the programs' shapes, and nothing else about images is: prompt lengths and image sizes do not
    multiply into programs. It is a ring buffer: the oldest features are overwritten first; a KV cache does not need
    them any more. Hold `lock` from the call that returns indices until the programs that read `array` are dispatched.

    Images and videos are encoded in waves of one shape, each in rows of its own, and a wave is padded if there are too
    few: the features of an image do not depend, not even by rounding, on what else is encoded.

    Attributes:
      array: [P, D], in the compute dtype, replicated.
      encoded, reused: images and videos that were encoded, and that were found in the pool.
    """

    def __init__(self, runtime: Runtime, capacity: int = MIN_POOL):
        """Make an empty pool of `capacity` merged tokens for what a model's ViT encodes."""
        self._runtime, self._config = runtime, runtime.config.vision_config
        self.lock = threading.RLock()
        with runtime.on_mesh():
            self.shards = data_shards()
        self._spans: dict[bytes, tuple[int, int]] = {}
        self._unused: set[bytes] = set()  # those of them that no prompt has used yet
        self._next = 0
        self.array = self._empty(capacity)
        self.encoded = self.reused = 0

    @property
    def capacity(self) -> int:
        """P, in merged tokens."""
        return self.array.shape[0]

    def encode(self, media: Sequence[Medium], upcoming: Iterable[Medium] = ()) -> list[int]:
        """Encode what is not in the pool yet; returns where the merged tokens of each image or video begin in `array`.

        Args:
          media: needed now.
          upcoming: needed soon; encoded where a wave would be padded otherwise.
        """
        distinct = {medium.key: medium for medium in media}
        needed = list(distinct.values())
        with self.lock:
            new = sum(key not in self._spans or key in self._unused for key in distinct)
            try:
                is_done = self._encode_waves(self._waves(needed, upcoming), distinct)
            except Exception:  # perhaps because of what is only upcoming
                is_done = False
            if not is_done and not self._encode_waves(self._waves(needed), distinct):
                self._encode_anew(needed)
            self._unused.difference_update(distinct)
            self.reused += len(media) - new
            return [self._spans[medium.key][0] for medium in media]

    def prepare(self, media: Sequence[Medium]) -> None:
        """Read or compile the ViT's programs for these concurrently, and grow to what each of them needs.

        Its capacity is part of the shapes of the programs that are prepared next.
        """
        if not stored_programs.is_used():
            return
        with self.lock:
            for medium in media:
                self.reserve(self._capacity_for(self._waves([medium])))
            self.prepare_shapes({wave.shape: None for wave in self._waves(media)})

    def prepare_shapes(self, shapes: Iterable[Shape]) -> None:
        """Read or compile the ViT's programs for images and videos of these shapes concurrently."""
        if not stored_programs.is_used():
            return
        with self._runtime.on_mesh():
            for shape in shapes:
                encode_wave.prepare(self._runtime.visual, *wave_rows(Wave(shape, []), self._config, self.shards))

    def prefetch(self, upcoming: Sequence[Medium]) -> None:
        """Encode what will be needed soon, as far as it fills whole waves.

        It takes half of the pool at most: what is needed before then would overwrite it otherwise, and it would be
        encoded twice. What cannot be encoded raises nothing here, but when it is needed.
        """
        sizes = itertools.accumulate(map(self._size, upcoming))
        early = [medium for medium, size in zip(upcoming, sizes, strict=True) if size <= self.capacity // 2]
        with self.lock, contextlib.suppress(Exception):
            keys = {medium.key for medium in early}
            for wave in self._waves(early):
                if len(wave.media) == self._most(wave.shape) and not self._encode_waves([wave], keys):
                    return

    def warm(self, shape: Shape) -> None:
        """Run the programs that images or videos of this shape need, and empty the pool."""
        with self.lock:
            try:
                self._store(Wave(shape, []), [])
                jax.block_until_ready(self.array)
            finally:
                self.forget()

    def shapes(self, patches: tuple[int, int]) -> list[Shape]:
        """The shapes of images and videos of `patches` (fewest, most); see `vision_shapes`."""
        return vision_shapes(self._config, patches, shards=self.shards)

    def needed(self, patches: tuple[int, int], requests: int = 1) -> int:
        """The capacity for requests of `patches` (fewest, most) each, `requests` of them at a time."""
        largest = max(map(math.prod, self.shapes(patches)))
        return pool_capacity(self._tokens(requests * patches[1]) + self._tokens(largest))

    def holds(self, shape: Shape) -> bool:
        """Whether an image or video of this shape fits."""
        return self._tokens(math.prod(shape)) <= self.capacity

    def reserve(self, capacity: int) -> None:
        """Grow to at least `capacity` merged tokens; growing empties the pool."""
        if capacity > self.capacity:
            self.forget(capacity)

    def forget(self, capacity: int | None = None) -> None:
        """Empty the pool, and give it another capacity if one is given."""
        with self.lock:
            self._spans, self._unused, self._next = {}, set(), 0
            self.array = self._empty(capacity if capacity is not None else self.capacity)

    def use(self, runtime: Runtime) -> None:
        """Encode with another model of the same structure from now on, and forget what was encoded so far."""
        with self.lock:
            self._runtime = runtime
            self.forget()

    def _tokens(self, patches: int) -> int:
        return patches // self._config.spatial_merge_size**2

    def _most(self, shape: Shape) -> int:
        """The most images or videos of this shape in a wave: large ones leave half of the pool to others."""
        size = wave_size(shape, self.shards)
        return max(1, min(size, self.capacity // 2 // self._tokens(shape[0] * shape[1])))

    def _waves(self, media: Iterable[Medium], upcoming: Iterable[Medium] = ()) -> list[Wave]:
        """Waves of those of `media` that are not there yet, in order; the last of a shape is filled from `upcoming`."""
        new = {medium.key: medium for medium in media if medium.key not in self._spans}
        counts = collections.Counter(medium_shape(medium.grid, self.shards) for medium in new.values())
        for medium in upcoming:
            shape = medium_shape(medium.grid, self.shards)
            if counts[shape] % self._most(shape) and medium.key not in self._spans and medium.key not in new:
                new[medium.key] = medium
                counts[shape] += 1
        return waves_of(new.values(), self.shards, self._most)

    def _encode_waves(self, waves: Sequence[Wave], keep: Collection[bytes]) -> bool:
        """Encode waves; False, and nothing is done, where that would need the room of media in `keep`, or more."""
        begins = self._plan(waves, self.capacity, self._next, [self._spans[key] for key in keep if key in self._spans])
        if begins is None:
            return False
        try:
            for wave, own in zip(waves, begins, strict=True):
                self._store(wave, own)
                self.encoded += len(wave.media)
        except BaseException:
            self.forget()  # the array may have been donated already
            raise
        return True

    def _plan(
        self, waves: Iterable[Wave], capacity: int, begin: int, taken: list[tuple[int, int]]
    ) -> list[list[int]] | None:
        """Where each image or video of each wave goes, one after the other from `begin`; None if there is no room."""
        plan, taken = [], list(taken)
        for wave in waves:
            *starts, end = itertools.accumulate((self._size(medium) for medium in wave.media), initial=0)
            # The last one is written with the padding of its row.
            room = starts[-1] + self._tokens(wave.shape[0] * wave.shape[1])
            begin = begin if begin + room <= capacity else 0
            if begin + room > capacity or any(low < begin + room and begin < high for low, high in taken):
                return None
            plan.append([begin + start for start in starts])
            taken.append((begin, begin + end))
            begin += end
        return plan

    def _encode_anew(self, media: Sequence[Medium]) -> None:
        """Empty the pool, grow it if needed, and encode."""
        self.forget()
        waves = self._waves(media)
        self.reserve(self._capacity_for(waves))
        self._encode_waves(waves, ())

    def _capacity_for(self, waves: Sequence[Wave]) -> int:
        """The capacity that holds these waves if nothing else is there; at least what it is now."""
        capacity = self.capacity
        while self._plan(waves, capacity, 0, []) is None:
            capacity *= GROWTH
        return capacity

    def _store(self, wave: Wave, begins: Sequence[int]) -> None:
        """Encode a wave, and write its features where its images or videos begin."""
        with self._runtime.on_mesh():
            features = run_wave(self._runtime.visual, self._config, wave)
            starts = np.zeros(len(features), np.int32)
            starts[: len(begins)] = begins
            self.array = device_steps.store_features(self.array, features, starts, np.int32(len(begins)))
        if not begins:
            return
        low, high = begins[0], begins[-1] + features.shape[1]
        for key in [key for key, span in self._spans.items() if span[0] < high and low < span[1]]:
            del self._spans[key]
            self._unused.discard(key)
        for medium, begin in zip(wave.media, begins, strict=True):
            self._next = begin + self._size(medium)
            self._spans[medium.key] = begin, self._next
            self._unused.add(medium.key)

    def _size(self, medium: Medium) -> int:
        return self._tokens(len(medium.patches))

    def _empty(self, capacity: int) -> Array:
        with self._runtime.on_mesh():
            zeros = jnp.zeros((capacity, self._config.out_hidden_size), compute_dtype(self._runtime.visual))
            return reshard(zeros, None, None)
