"""Images and videos of a step of vLLM's engine: its tensors to our media, and media to vision features.

An exception here would end the engine and with it every request, so nothing that an image contains raises one. Shapes
are those of vLLM's processor, which has made them before a request is accepted.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from glm4v_jax.config.model import Glm4vConfig, Glm4vVisionConfig
from glm4v_jax.devices.mesh import Rules, explicit, placed_on, platform, use_mesh
from glm4v_jax.generate.encode_media import encode_media, run_wave
from glm4v_jax.inputs.medium import Medium, media_of, without_invalid
from glm4v_jax.inputs.mrope import rope_index
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.vision.smart_resize import patch_range
from glm4v_jax.inputs.vision_waves import Shape, Wave, vision_shapes
from glm4v_jax.model.layers import stack
from glm4v_jax.model.runtime import Flat
from glm4v_jax.model.vision import VisionEncoder

_log = logging.getLogger("vllm.glm4v_jax")


def media_in(kwargs: Mapping[str, Any], config: Glm4vConfig) -> list[Medium]:
    """Return the images or videos of a call of `embed_multimodal`, in order; zeros replace pixels that are not finite.

    >>> config = Glm4vConfig.tiny()
    >>> grids = np.array([[1, 2, 2], [1, 2, 4]])
    >>> pixels = np.zeros((12, config.vision_config.patch_dim))
    >>> [len(medium.patches) for medium in media_in({"pixel_values": pixels, "image_grid_thw": grids}, config)]
    [4, 8]

    Args:
      kwargs: `pixel_values` [patches, P] and `image_grid_thw` [N, 3], or those of videos: tensors on the CPU, or lists
        of them.
      config: of the model.
    """
    images, videos = media_of({name: _array(kwargs[name]) for name in _FIELDS if name in kwargs}, config)
    media, invalid = without_invalid(images + videos)
    if invalid:
        _log.warning("%d of %d images or videos have pixel values that are not finite; zeros replace them",
                    len(invalid), len(media))  # fmt: skip
    return media


_FIELDS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def _array(values: Any) -> np.ndarray:
    if isinstance(values, list | tuple):
        return np.concatenate([np.atleast_2d(_array(value)) for value in values])
    if hasattr(values, "detach"):  # of PyTorch; NumPy has no bfloat16 of its own
        values = values.detach()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def positions_of(tokens: Sequence[int], features: Sequence[Any], config: Glm4vConfig) -> tuple[np.ndarray, int]:
    """Compute M-RoPE positions of a prompt where vLLM has put images and videos.

    Any other token counts as text, as a user may write any: an error here would end the engine too. So does an image or
    video that has another number of tokens in the prompt than its grid says, which is logged: vLLM 0.32 gives a video
    of less than half a second a grid of one frame, and a prompt of none.

    Args:
      tokens: of the prompt.
      features: vLLM's `MultiModalFeatureSpec` of each image and video.
      config: of the model.

    Returns:
      int32 [3, T], and how far the positions of tokens after the prompt are from their place.
    """
    grids: dict[str, list[np.ndarray]] = {"image": [], "video": []}
    found, kept = np.asarray(tokens), np.full(len(tokens), -1)
    merge_size = config.vision_config.spatial_merge_size
    for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
        place = slice(feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length)
        grid = np.asarray(feature.data[f"{feature.modality}_grid_thw"].data, np.int64).reshape(3)
        held, expected = np.sum(found[place] == config.image_token_id), grid.prod() // merge_size**2
        if held == expected:
            kept[place] = found[place]
            grids[feature.modality].append(grid)
        else:
            _log.warning("%s: found %d tokens in its prompt; expected %d, as its grid says: they count as text",
                         feature.modality, held, expected)  # fmt: skip
    images, videos = (np.array(of_kind, np.int64).reshape(-1, 3) for of_kind in grids.values())
    positions, deltas = rope_index(kept[None], config, images, videos, merge_size=merge_size)
    return positions[:, 0], int(deltas[0, 0])


def shapes_of(directory: Path, config: Glm4vVisionConfig, vllm_config: Any) -> list[Shape]:
    """List the shapes of all images and videos that vLLM's processor makes and its scheduler accepts."""
    processor, media = Glm4vProcessor.from_pretrained(directory), vllm_config.model_config.multimodal_config
    sizes = (media.mm_processor_kwargs or {}).get("size") or {}
    most = vllm_config.scheduler_config.max_num_batched_tokens * config.spatial_merge_size**2
    shapes: set[Shape] = set()
    for kind, part in (("image", processor.image_processor), ("video", processor.video_processor)):
        limit = media.limit_per_prompt.get(kind)
        low, high = patch_range({**part.size, **sizes}, part.patch_size, part.temporal_patch_size)
        if limit is None or limit.count:
            frames = 1 if kind == "image" else None
            shapes |= set(vision_shapes(config, (min(low, most), min(high, most)), frames=frames))
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))


class VllmVision:
    """The ViT on a mesh of explicit axes, with heads and MLPs sharded, and its features on the engine's mesh.

    Its blocks are stacked but on a CPU: every shape then compiles in the time of one block.

    Attributes:
      visual, config: the ViT.
      mesh, rules: what it runs on.
      engine_mesh: where features go.
    """

    def __init__(self, visual: VisionEncoder, config: Glm4vVisionConfig, engine_mesh: Mesh, rules: Rules):
        """Take the ViT as it lies on the engine's devices."""
        self.config, self.mesh, self.rules, self.engine_mesh = config, explicit(engine_mesh), rules, engine_mesh
        visual = placed_on(visual, self.mesh)
        with use_mesh(self.mesh, rules):
            if platform() != "cpu":
                visual.blocks = stack(visual.blocks)
            self.visual = Flat.of(visual)

    def encode(self, media: Sequence[Medium]) -> list[Float[Array, "M D"]]:
        """Encode images and videos, those of one shape together; returns the merged tokens of each, replicated."""
        with use_mesh(self.mesh, self.rules):
            features = encode_media(self.visual, self.config, media)
        return jax.device_put(features, NamedSharding(self.engine_mesh, PartitionSpec()))

    def warm(self, shape: Shape) -> Array:
        """Compile the program of a shape, and run it on padding."""
        with use_mesh(self.mesh, self.rules):
            return run_wave(self.visual, self.config, Wave(shape, []))
