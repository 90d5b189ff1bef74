"""The size an image or video is resized to before it is cut into patches."""

import math
from collections.abc import Mapping

from glm4v_jax.errors import MediaError

MAX_ASPECT_RATIO = 200


def smart_resize(
    num_frames: int,
    height: int,
    width: int,
    temporal_factor: int = 2,
    factor: int = 28,
    min_pixels: float = 112 * 112,
    max_pixels: float = 14 * 14 * 2 * 2 * 2 * 6144,
) -> tuple[int, int]:
    """Find the multiples of `factor` nearest to a size whose volume lies within the bounds.

    The volume is frames x height x width, in pixels; a still image counts as `temporal_factor` frames. The numbers
    are those of `smart_resize` in transformers 4.57.1, with two exceptions taken from 5.x: a side shorter than
    `factor` is first scaled up (4.57.1 refuses it), and sizes that are not positive get an error of their own.

    Args:
        num_frames: frames of the video, or `temporal_factor` for an image.
        height: rows of the original, in pixels.
        width: columns of the original, in pixels.
        temporal_factor: frames that make one patch.
        factor: pixels per merged patch, `patch_size * merge_size`.
        min_pixels: smallest volume; below it both sides are scaled up.
        max_pixels: largest volume; above it both sides are scaled down. A side never falls under `factor`, so a very
            long and thin image may stay above it.

    Returns:
        (height, width), both multiples of `factor`.

    Raises:
        MediaError: fewer frames than `temporal_factor`, a side that is not positive, or sides in a ratio over 200.
    """
    if num_frames < temporal_factor:
        raise MediaError(f"t:{num_frames} must be larger than temporal_factor:{temporal_factor}")
    if height <= 0 or width <= 0:
        raise MediaError(f"height:{height} and width:{width} must be positive")
    size = f"{width} x {height} pixels"
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise MediaError(f"absolute aspect ratio must be smaller than {MAX_ASPECT_RATIO}, got {ratio}: {size}")

    # Python's round() goes to the even neighbour at one half: 98 x 126 becomes 112 x 112.
    resized_height = round(height / factor) * factor
    resized_width = round(width / factor) * factor
    volume = round(num_frames / temporal_factor) * temporal_factor * resized_height * resized_width
    if volume > max_pixels:
        beta = math.sqrt(num_frames * height * width / max_pixels)
        resized_height = max(factor, math.floor(height / beta / factor) * factor)
        resized_width = max(factor, math.floor(width / beta / factor) * factor)
    elif volume < min_pixels:
        beta = math.sqrt(min_pixels / (num_frames * height * width))
        resized_height = math.ceil(height * beta / factor) * factor
        resized_width = math.ceil(width * beta / factor) * factor
    return resized_height, resized_width


def patch_range(size: Mapping[str, float], patch_size: int, temporal_patch_size: int) -> tuple[int, int]:
    """The fewest and the most patches of an image or video that a processor of this `size` makes.

    Only one that is very long and thin has more; `smart_resize` says why.

    >>> patch_range({"shortest_edge": 12_544, "longest_edge": 9_633_792}, 14, 2)
    (32, 24576)
    """
    pixels = patch_size**2 * temporal_patch_size
    return int(size["shortest_edge"]) // pixels, int(size["longest_edge"]) // pixels
