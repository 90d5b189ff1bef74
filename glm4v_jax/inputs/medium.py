"""One image or one whole video as the vision encoder takes it: patches and their grid, checked in one place."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from glm4v_jax.config.model import Glm4vConfig, Glm4vVisionConfig
from glm4v_jax.errors import MessageError


@dataclasses.dataclass(frozen=True, eq=False)
class Medium:
    """An image, or a whole video, ready for the vision encoder.

    Attributes:
      patches: float32 [t * h * w, P].
      grid: int64 [3], (t, h, w) in patches.
    """

    patches: np.ndarray
    grid: np.ndarray

    @property
    def frames(self) -> np.ndarray:
        """int64 [t, 2]: height and width of every frame, in patches."""
        return np.tile(self.grid[1:], (self.grid[0], 1))

    @functools.cached_property
    def key(self) -> bytes:
        """A hash of the content: equal for equal patches in equal grids."""
        digest = hashlib.blake2b(np.asarray(self.grid, np.int64).tobytes(), digest_size=16)
        digest.update(np.ascontiguousarray(self.patches, np.float32).data)
        return digest.digest()


def without_invalid(media: Iterable[Medium]) -> tuple[list[Medium], list[int]]:
    """Replace patch values that are NaN or infinite by zeros; also returns which of `media` had some, for a log.

    For servers where an error would end more than the request: nothing that an image contains raises while it is
    encoded, but invalid values would become invalid logits.

    >>> good, bad = (Medium(np.full((4, 3), value), np.array([1, 2, 2])) for value in (1.0, np.nan))
    >>> media, invalid = without_invalid([good, bad])
    >>> media[0] is good, media[1].patches.sum().item(), invalid
    (True, 0.0, [1])
    """
    found, invalid = [], []
    for i, medium in enumerate(media):
        patches = np.asarray(medium.patches, np.float32)
        if not np.isfinite(patches).all():
            medium = Medium(np.nan_to_num(patches, nan=0.0, posinf=0.0, neginf=0.0), medium.grid)
            invalid.append(i)
        found.append(medium)
    return found, invalid


def media_of(inputs: Mapping[str, Any], config: Glm4vConfig) -> tuple[list[Medium], list[Medium]]:
    """Return the images and the videos of a processor's output; it may lack pixel values and grids of either.

    MessageError if pixel values and grids do not match each other or the model.
    """
    found = []
    for name, grid_name in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        values, grids = inputs.get(name), inputs.get(grid_name)
        if (values is None) != (grids is None):
            missing, given = (name, grid_name) if values is None else (grid_name, name)
            raise MessageError(f"{missing}: found nothing; expected it beside {given}")
        is_absent = grids is None or np.size(grids) == 0
        found.append([] if is_absent else split_media(values, grids, config.vision_config, name, grid_name))
    return found[0], found[1]


def split_media(pixel_values: Any, grid_thw: Any, config: Glm4vVisionConfig, name: str, grid_name: str) -> list[Medium]:
    """Split flattened patches [patches, P] of several images or videos, by their grids int [N, 3].

    Raises:
      MessageError: the grids are not valid (see `checked_grids`), or count other patches; it says `name`, `grid_name`.
    """
    grids = checked_grids(grid_thw, config.spatial_merge_size, grid_name)
    values, sizes = np.asarray(pixel_values), grids.prod(axis=1)
    expected = [int(sizes.sum()), config.patch_dim]
    if list(values.shape) != expected:
        raise MessageError(f"{name}: found shape {list(values.shape)}; expected {expected}, as {grid_name} counts")
    ends = np.cumsum(sizes)
    return [Medium(values[end - size : end], grid) for end, size, grid in zip(ends, sizes, grids, strict=True)]


def checked_grids(grid_thw: Any, merge_size: int, name: str = "grid_thw") -> np.ndarray:
    """Check the grids of images or videos, and return them as int64 [N, 3].

    Raises:
      MessageError: they have another shape, or sides that are not multiples of `merge_size`.
    """
    if grid_thw is None:
        raise MessageError(f"{name}: found nothing; expected integers [N, 3]")
    grids = np.asarray(grid_thw)
    if grids.ndim != 2 or grids.shape[1] != 3 or grids.dtype.kind not in "iu":
        raise MessageError(f"{name}: found {grids.dtype} {list(grids.shape)}; expected integers [N, 3]")
    wrong = (grids < 1).any(axis=1) | (grids[:, 1:] % merge_size != 0).any(axis=1)
    if wrong.any():
        raise MessageError(
            f"{name}: found the grid {grids[wrong][0].tolist()}; expected one or more frames, their height and width "
            f"multiples of {merge_size} patches"
        )
    return grids.astype(np.int64)
