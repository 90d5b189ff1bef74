"""Arithmetic on pixels: channel order, resizing, normalisation, patches.

Letters: H, W rows and columns; C channels; p patch_size; m merge_size; F temporal_patch_size.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from glm4v_jax.errors import MediaError, counted
from glm4v_jax.inputs.media.threads import map_threads
from glm4v_jax.inputs.vision.antialias import FILTERS, resize_bytes


def is_scaled(array: np.ndarray) -> bool:
    """Whether the values seem to have been brought to [0, 1] already."""
    return array.dtype != np.uint8 and array.min() >= 0 and array.max() <= 1


def _fits_in_bytes(array: np.ndarray) -> bool:
    """Whether an image of another type holds [0, 255]; False for [0, 1]: as the reference's `resize` decides it.

    Raises:
        MediaError: it holds neither.
    """
    low, high = array.min(), array.max()
    if np.allclose(array, array.astype(int)):
        if low >= 0 and high <= 255:
            return True
        raise MediaError(f"The image contains values outside the range [0, 255], got [{low}, {high}]")
    if low >= 0 and high <= 1:
        return False
    raise MediaError(
        f"The image contains values outside the range [0, 1], got [{low}, {high}]; expected "
        "fractions in [0, 1], or whole numbers in [0, 255] (uint8)"
    )


def resize_as_image(image: np.ndarray | PIL.Image.Image, height: int, width: int, resample: int) -> np.ndarray:
    """Resize the way the reference's slow processor does: as one 8-bit Pillow image, whatever the type.

    Images in [0, 1] go through 8 bits too, and Pillow weighs the colours of a fourth channel by it as alpha.

    Takes [H, W, C] of 1 to 4 channels, uint8, or another type with values in [0, 255] or [0, 1]; or the Pillow image
    itself, which saves two copies. Returns [height, width, C], uint8, or float32 for an image in [0, 1]. MediaError for
    values outside these ranges, or more than 4 channels.
    """
    if isinstance(image, PIL.Image.Image):
        return np.asarray(image.resize((width, height), resample=resample)).reshape(height, width, -1)
    unit_range = image.dtype != np.uint8 and not _fits_in_bytes(image)
    if unit_range:
        image = (image.astype(np.float64) * 255).astype(np.float32)
    image = np.ascontiguousarray(image.astype(np.uint8, copy=False))
    try:
        pillow = PIL.Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    except (TypeError, ValueError) as error:
        raise MediaError(f"array of shape {image.shape} is not an image of 1 to 4 channels") from error
    resized = np.asarray(pillow.resize((width, height), resample=resample)).reshape(height, width, -1)
    return (resized.astype(np.float64) * (1 / 255)).astype(np.float32) if unit_range else resized


def resize_planes(image: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resize the way the reference's fast and video processors do: every channel by itself, in the image's own type.

    Bytes come out bit for bit as torchvision's (`antialias.resize_bytes`), floats to about 1e-6 of their range.

    Takes [H, W, C] of any number of channels; box and Hamming, which torchvision lacks, are Pillow's. Returns
    [height, width, C], uint8 for uint8, float32 otherwise, rounded for other whole numbers.
    """
    if image.shape[:2] == (height, width):
        return image
    if image.dtype == np.uint8 and resample in FILTERS:
        return resize_bytes(image, height, width, resample)
    plane_type = np.uint8 if image.dtype == np.uint8 else np.float32
    planes = [np.ascontiguousarray(plane, dtype=plane_type) for plane in np.moveaxis(image, -1, 0)]
    resized = np.stack([np.asarray(PIL.Image.fromarray(p).resize((width, height), resample)) for p in planes], axis=-1)
    return np.round(resized) if np.issubdtype(image.dtype, np.integer) else resized


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Rescaling and normalisation of blocks [..., C, p, p] to float32, in the reference's order of roundings.

    Attributes:
        scale: factor, or None not to rescale.
        mean: one value or one a channel, or None not to normalise.
        std: likewise.
        fused: the fast and the video processor's arithmetic, `(x - mean/scale) / (std/scale)` in float32. The slow
            one's is `(float32(float64(x) * scale) - mean) / std`.
    """

    scale: float | None
    mean: float | tuple[float, ...] | None
    std: float | tuple[float, ...] | None
    fused: bool

    def out_channels(self, channels: int) -> int:
        """Channels of the result.

        Raises:
            MediaError: the mean or std has another number of values than the image has channels. The fused form
                spreads a single channel over all values, as torch's broadcasting does.
        """
        for name, value in (("mean", self.mean), ("std", self.std)):
            if not isinstance(value, tuple) or len(value) == channels:
                continue
            if not (self.fused and 1 in (channels, len(value))):
                raise MediaError(
                    f"image_{name} must have {channels} elements if it is an iterable, got {len(value)}: it is "
                    f"{list(value)}, and the image has {counted(channels, 'channel')}; set "
                    f"image_{name} to one value or to {channels}"
                    + (", or convert the image to RGB" if channels != 3 and len(value) == 3 else "")
                )
        lengths = [len(value) for value in (self.mean, self.std) if isinstance(value, tuple)]
        return max([channels, *lengths])

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Normalise a block [..., C, p, p] of any type to float32."""
        if self.fused:
            return self._fused(block)
        if self.scale is not None:
            block = (block.astype(np.float64) * self.scale).astype(np.float32)
        if self.mean is not None and self.std is not None:
            dtype = block.dtype if np.issubdtype(block.dtype, np.floating) else np.dtype(np.float32)
            block = block.astype(dtype, copy=False) - _per_channel(self.mean, dtype)
            block /= _per_channel(self.std, dtype)
        return block.astype(np.float32, copy=False)

    def _fused(self, block: np.ndarray) -> np.ndarray:
        block = block.astype(np.float32)
        if self.mean is None or self.std is None:
            return block if self.scale is None else block * np.float32(self.scale)
        inverse = np.float32(1 if self.scale is None else 1.0 / self.scale)
        block = block - _per_channel(self.mean, np.dtype(np.float32)) * inverse
        block /= _per_channel(self.std, np.dtype(np.float32)) * inverse
        return block


def normalization_of(settings: Mapping[str, Any], *, fused: bool) -> Normalization:
    """The arithmetic that resolved settings ask for."""
    normalize = settings["do_normalize"]
    return Normalization(
        scale=settings["rescale_factor"] if settings["do_rescale"] else None,
        mean=settings["image_mean"] if normalize else None,
        std=settings["image_std"] if normalize else None,
        fused=fused,
    )


@functools.lru_cache(maxsize=64)
def _per_channel(value: float | tuple[float, ...], dtype: np.dtype) -> np.ndarray:
    """One value, or [C, 1, 1], to combine with blocks [..., C, p, p]."""
    array = np.asarray(value, dtype=dtype)
    return array if array.ndim == 0 else array[:, None, None]


def patch_array(
    patches: np.ndarray, grid: Sequence[int], channels: int, temporal: int, patch_size: int, merge_size: int
) -> np.ndarray:
    """View patches [t*h*w, C*F*p*p] of a grid (t, h, w) by where they come from: [t, h/m, w/m, m, m, C, F, p, p].

    Patches are ordered by merge blocks: the m x m patches that the model will merge follow one another. They must be
    contiguous.
    """
    t, h, w = grid
    return patches.reshape(
        t, h // merge_size, w // merge_size, merge_size, merge_size, channels, temporal, patch_size, patch_size
    )


def write_frame(target: np.ndarray, frame: np.ndarray, normalization: Normalization, slots: Iterable[int]) -> None:
    """Normalise a frame [H, W, C] into the patches of its temporal group, [h/m, w/m, m, m, C, F, p, p] float32.

    `slots` are the positions in F that show this frame: all for a still image.
    """
    rows, columns, merge, _, _, _, patch, _ = target.shape
    blocks = frame.reshape(rows, merge, patch, columns, merge, patch, frame.shape[-1])
    slots = tuple(slots)
    # One row of merge blocks at a time: its temporaries stay in the processor's cache, whatever the size of the image.
    for row, block in zip(target, blocks, strict=True):
        values = normalization(np.ascontiguousarray(block.transpose(2, 0, 3, 5, 1, 4)))
        for slot in slots:
            row[..., slot, :, :] = values


def cut_patches(
    clips: Sequence[Sequence[np.ndarray]], settings: Mapping[str, Any], normalization: Normalization, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Normalise images or videos and cut them into patches, on all cores.

    Args:
        clips: for each its T frames [H, W, C], H and W multiples of a merged patch; an image is one frame.
        settings: of the processor, resolved.
        normalization: what to do to the values.
        kind: "image" or "video", for messages.

    Returns:
        [sum of patches, C * temporal_patch_size * patch_size**2] float32, and grids [N, 3] int64, in patches. The last
        frame of a clip fills its last temporal patch.

    Raises:
        MediaError: the clips have different numbers of channels.
    """
    patch_size, temporal = settings["patch_size"], settings["temporal_patch_size"]
    channels = {normalization.out_channels(frames[0].shape[2]) for frames in clips} or {3}
    if len(channels) > 1:
        raise MediaError(f"the {kind}s have {sorted(channels)} channels; expected one number for all")
    (num_channels,) = channels
    grids = np.array(
        [
            (-(-len(frames) // temporal), frames[0].shape[0] // patch_size, frames[0].shape[1] // patch_size)
            for frames in clips
        ],
        dtype=np.int64,
    ).reshape(-1, 3)
    sizes = grids.prod(axis=1)
    patches = np.empty((int(sizes.sum()), num_channels * temporal * patch_size**2), dtype=np.float32)
    work = []
    for frames, grid, end, size in zip(clips, grids.tolist(), np.cumsum(sizes), sizes, strict=True):
        target = patch_array(
            patches[end - size : end], grid, num_channels, temporal, patch_size, settings["merge_size"]
        )
        for index, frame in enumerate(frames):
            slots = range(index % temporal, temporal if index == len(frames) - 1 else index % temporal + 1)
            work.append((target[index // temporal], frame, normalization, slots))
    map_threads(lambda item: write_frame(*item), work)
    return patches, grids
