"""What the model will see of images and videos: read back from what the processor prepared, and why it is so.

Letters: t temporal patches, F frames of one, H and W rows and columns in pixels, C channels.
"""

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image

from glm4v_jax.errors import MediaError, not_there
from glm4v_jax.inputs.batch_feature import BatchFeature
from glm4v_jax.inputs.media.container import kind_of_file
from glm4v_jax.inputs.media.decode import VideoMetadata
from glm4v_jax.inputs.media.fetch import describe, is_missing_path, open_source
from glm4v_jax.inputs.media.load import open_image
from glm4v_jax.inputs.prepared_media import PreparedMedia
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.vision.patches import normalization_of, patch_array
from glm4v_jax.inputs.vision.settings import area_of

Kind = Literal["picture", "video"]

# What Pillow opens and the video processor takes when it moves; MPEG it recognises without being able to decode it.
_ANIMATED_FORMATS = ("GIF", "PNG", "WEBP")
_VIDEO_FORMATS = ("MPEG",)
_FEATURES: Mapping[Kind, tuple[str, str]] = {
    "picture": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
# A side scaled below this loses details; above, a side was only rounded.
_LOSSLESS = 0.9
# Sides scaled this much alike are reported as one, which rounding to whole tokens keeps from being equal.
_ALIKE = 0.02


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image or video as the model sees it.

    Attributes:
      name: of the file.
      kind: image or video.
      height, width: of the original, in pixels.
      frames: [t, F, H, W, 3] uint8, read back from the patches; an image is one temporal patch of equal frames.
      grid_thw: temporal patches, rows and columns of patches.
      settings: of the processor that prepared it.
      media: the same on its way into a prompt, without pixels.
      metadata: of a video.
    """

    name: str
    kind: Kind
    height: int
    width: int
    frames: np.ndarray
    grid_thw: tuple[int, int, int]
    settings: Mapping[str, Any]
    media: PreparedMedia
    metadata: VideoMetadata | None = None

    @property
    def seen_height(self) -> int:
        """H, in pixels."""
        return self.frames.shape[2]

    @property
    def seen_width(self) -> int:
        """W, in pixels."""
        return self.frames.shape[3]

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """Temporal patches, rows and columns of tokens."""
        t, h, w = self.grid_thw
        merge = self.settings["merge_size"]
        return t, h // merge, w // merge

    @property
    def patches(self) -> int:
        """Patches, in the vision encoder."""
        return math.prod(self.grid_thw)

    @property
    def tokens(self) -> int:
        """Image tokens, in the prompt."""
        return math.prod(self.token_grid)

    @property
    def budget(self) -> int:
        """The most image tokens that the processor's `size` allows; one is always made."""
        volume = self.settings["patch_size"] ** 2 * self.settings["merge_size"] ** 2
        return max(1, int(self.settings["size"]["longest_edge"] // (volume * self.settings["temporal_patch_size"])))

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels seen for one of the original, in height and in width."""
        return self.seen_height / self.height, self.seen_width / self.width

    @property
    def frame_indices(self) -> list[tuple[int, ...]]:
        """The frames of the file in each temporal patch, t x F."""
        temporal = self.settings["temporal_patch_size"]
        if self.metadata is None or self.metadata.frames_indices is None:
            return [(0,) * temporal]
        taken = [int(index) for index in self.metadata.frames_indices]
        taken += [taken[-1]] * (self.grid_thw[0] * temporal - len(taken))
        return [tuple(taken[start : start + temporal]) for start in range(0, len(taken), temporal)]

    def time(self, index: int) -> float:
        """Seconds of a frame of the file; 0 where the frame rate is unknown."""
        return 0.0 if self.metadata is None else self.metadata.time_of(index) or 0.0


def look(source: str | Path | bytes, processor: Glm4vProcessor, kind: Kind | None = None) -> Seen:
    """Prepare an image or a video, of a path, an address or bytes, and read back what the model will see.

    By default it is taken for what the file is: an animated GIF, PNG or WebP is a video, as is a directory of images.
    MediaError, which names it, if it is neither, cannot be read, or cannot be prepared.
    """
    name = describe(source)
    if is_missing_path(source):
        raise MediaError(not_there(name, "an image or a video"))
    opened = open_source(source)
    try:
        if kind is None:
            kind = "video" if isinstance(opened, Path) and opened.is_dir() else _kind_of(opened)
    except PIL.Image.DecompressionBombError as error:
        raise MediaError(f"{name}: found too large an image ({error}); expected a smaller one") from error
    is_unreadable = kind is None and kind_of_file(opened) == "an image"
    try:
        if is_unreadable:
            open_image(opened)  # raises, with the reason
        return _see(opened, kind or "video", processor, name)
    except MediaError as error:
        # What was opened may have another name, "812 bytes" for an address, and is the only one of its batch.
        known = re.escape(describe(opened))
        problem = re.sub(rf"^((image|video) 0( \({known}\))?: )?({known}: )?", "", str(error))
        unknown = "found no readable image; as a video: " if kind is None and not is_unreadable else ""
        raise MediaError(f"{name}: {unknown}{problem}") from error


def _kind_of(opened: Path | bytes) -> Kind | None:
    """What a file is; None for what Pillow cannot read, which is left to the decoders of videos."""
    try:
        with PIL.Image.open(io.BytesIO(opened) if isinstance(opened, bytes) else opened) as image:
            if image.format in _VIDEO_FORMATS:
                return "video"
            return "video" if image.format in _ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1 else "picture"
    except PIL.Image.DecompressionBombError:
        raise
    except Exception:  # Pillow's format readers raise many kinds of errors on what is not an image.
        return None


def _see(opened: Path | bytes, kind: Kind, processor: Glm4vProcessor, name: str) -> Seen:
    metadata: VideoMetadata | None = None
    if kind == "picture":
        settings = processor.image_processor.resolve({})
        media = processor.prepare_media(images=opened)
        ((width, height),) = media.image_sizes
    else:
        settings = processor.video_processor.resolve({})
        media = processor.prepare_media(videos=opened, return_metadata=True)
        (metadata,) = media.features["video_metadata"]
        height, width = metadata["height"], metadata["width"]
    patches, grids = _FEATURES[kind]
    (grid,) = media.features[grids].tolist()
    return Seen(
        name=name,
        kind=kind,
        height=height,
        width=width,
        frames=read_back(media.features[patches], grid, settings),
        grid_thw=tuple(grid),
        settings=settings,
        media=dataclasses.replace(media, features=BatchFeature({grids: media.features[grids]})),
        metadata=metadata,
    )


def read_back(patches: np.ndarray, grid_thw: Sequence[int], settings: Mapping[str, Any]) -> np.ndarray:
    """The images that patches were cut from, of one image or video: `patches.write_frame` backwards.

    Patches are [t*h*w, C*F*p*p] float32, C being 1 or 3. Returns [t, F, H, W, 3] uint8, exact where the processor was
    given bytes, as it is when it reads files. MediaError if the patches have another number of channels.
    """
    t, h, w = grid_thw
    patch, merge, temporal = (settings[name] for name in ("patch_size", "merge_size", "temporal_patch_size"))
    channels = patches.shape[1] // (temporal * patch * patch)
    if channels not in (1, 3):
        raise MediaError(f"patches of {channels} channels; expected 1 or 3 to draw them")
    # The form of the arithmetic does not matter backwards: the result is rounded.
    normalization = normalization_of(settings, fused=False)
    mean, std = normalization.mean, normalization.std
    by_place = patch_array(patches, (t, h, w), channels, temporal, patch, merge)
    frames = np.empty((t, temporal, h * patch, w * patch, 3), np.uint8)
    for target, blocks in zip(frames, by_place, strict=True):
        # [h/m, w/m, m, m, C, F, p, p] -> [F, h/m, m, p, w/m, m, p, C]
        values = blocks.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(temporal, h * patch, w * patch, channels)
        if mean is not None and std is not None:
            values = values * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
        if normalization.scale is not None:
            values = values / np.float32(normalization.scale)
        target[:] = np.clip(np.rint(values), 0, 255)
    return frames


def why_scaled(seen: Seen) -> str:
    """Why an image or video has the size that it is seen in, in a few words."""
    settings = seen.settings
    if (seen.seen_height, seen.seen_width) == (seen.height, seen.width):
        return "as it is"
    factor = settings["resize_factor"]
    num_frames = seen.grid_thw[0] * settings["temporal_patch_size"]
    without_budget = {**settings, "size": {"shortest_edge": 0, "longest_edge": math.inf}}
    height, width = area_of(without_budget, num_frames, seen.height, seen.width)
    unbounded, found = height * width, seen.seen_height * seen.seen_width
    if found < unbounded:
        return f"scaled down to the budget of {seen.budget} tokens"
    if found > unbounded:
        return "scaled up to the smallest size"
    if min(seen.height, seen.width) < factor:
        return f"scaled up to sides of {factor} pixels at least"
    return f"sides rounded to multiples of {factor}"


def warning(seen: Seen) -> str | None:
    """One sentence where details get lost by scaling down, else None."""
    scale = min(seen.scale)
    if scale >= _LOSSLESS:
        return None
    height, width = seen.scale
    alike = abs(height - width) < _ALIKE
    sides = f"{scale:.2f} per side" if alike else f"{width:.2f} in width and {height:.2f} in height"
    return f"scaled down by {sides}: details smaller than {1 / scale:.1f} pixels of the original are lost"
