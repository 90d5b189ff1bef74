"""What a processor knows of images and videos apart from prompts: what they cost, and what they are once prepared."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from glm4v_jax.inputs.batch_feature import BatchFeature
from glm4v_jax.inputs.text.placeholders import Expansion


@dataclasses.dataclass(frozen=True)
class MultiModalData:
    """What images and videos of given sizes will cost; None where no sizes were given.

    Attributes:
      num_image_tokens: of each image, in the prompt.
      num_image_patches: of each image, in the vision encoder.
      num_video_tokens: of each video, in the prompt; timestamps and the tags around frames are not counted.
    """

    num_image_tokens: list[int] | None = None
    num_image_patches: list[int] | None = None
    num_video_tokens: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class PreparedMedia:
    """Images and videos on their way into prompts.

    Attributes:
      features: what a call returns for them: pixel values and grids.
      images, videos: what stands for each in a prompt.
      image_sizes: (width, height) of the images as they were given, in pixels.
    """

    features: BatchFeature
    images: list[Expansion]
    videos: list[Expansion]
    image_sizes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def joined(cls, parts: Sequence["PreparedMedia"]) -> "PreparedMedia":
        """All images and all videos of several, in their order."""
        names = dict.fromkeys(name for part in parts for name in part.features)
        features = {name: np.concatenate([p.features[name] for p in parts if name in p.features]) for name in names}
        images = [expansion for part in parts for expansion in part.images]
        videos = [expansion for part in parts for expansion in part.videos]
        return cls(BatchFeature(features), images, videos, tuple(size for part in parts for size in part.image_sizes))
