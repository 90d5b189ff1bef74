"""Vision as a function: patches and grids of images and videos -> the merged tokens of each.

It runs in the current mesh and under its rules, in waves (`inputs.vision_waves`): one program for each shape, which
`vision_waves.vision_shapes` lists for a range of sizes.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from glm4v_jax.batch import VisionRows
from glm4v_jax.config.model import Glm4vVisionConfig
from glm4v_jax.devices import mesh
from glm4v_jax.devices.stored_programs import stored
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.vision_waves import Wave, wave_rows, waves_of
from glm4v_jax.model.runtime import Flat
from glm4v_jax.model.vision import VisionEncoder


def encode_media(
    visual: Flat[VisionEncoder], config: Glm4vVisionConfig, media: Sequence[Medium]
) -> list[Float[Array, "N D"]]:
    """Encode images and videos, in the current mesh; returns the merged tokens of each.

    >>> from glm4v_jax import Glm4vConfig, Glm4vForConditionalGeneration
    >>> runtime = Glm4vForConditionalGeneration(Glm4vConfig.tiny(), dtype="float32").runtime
    >>> config = runtime.config.vision_config
    >>> image, video = (Medium(np.ones((t * 24, config.patch_dim)), np.array([t, 4, 6])) for t in (1, 3))
    >>> with runtime.on_mesh():
    ...     [features.shape for features in encode_media(runtime.visual, config, [image, video])]
    [(6, 64), (18, 64)]

    The features of an image do not depend, not even by rounding, on what else is encoded. Besides the program of each
    shape, a small one is compiled for each number of tokens: it cuts them out.
    """
    found = {}
    for wave in waves_of(dict.fromkeys(media), mesh.data_shards()):
        features = run_wave(visual, config, wave)
        for i, medium in enumerate(wave.media):
            found[medium] = _tokens(features, np.int32(i), len(medium.patches) // config.spatial_merge_size**2)
    return [found[medium] for medium in media]


def run_wave(visual: Flat[VisionEncoder], config: Glm4vVisionConfig, wave: Wave) -> Float[Array, "M U D"]:
    """Encode a wave, in the current mesh; its images and videos, and the tokens of each, come first among M and U.

    One without images and videos, `Wave(shape, [])`, compiles the program of its shape.
    """
    return encode_wave(visual, *wave_rows(wave, config, mesh.data_shards()))


@stored()
@jax.jit
def encode_wave(visual: Flat[VisionEncoder], rows: VisionRows, order: Int[Array, "M U"]) -> Float[Array, "M U D"]:
    """Rows of a wave -> merged tokens, replicated; arguments as `vision_waves.wave_rows` returns them."""
    features = mesh.reshard(visual.module(rows), None, None, None)
    flat = features.reshape(-1, features.shape[-1])
    return flat.at[order].get(out_sharding=mesh.spec(None, None, None))


@functools.partial(jax.jit, static_argnames="count")
def _tokens(features: Float[Array, "M U D"], i: Int[Array, ""], count: int) -> Float[Array, "count D"]:
    return jax.lax.dynamic_index_in_dim(features, i, keepdims=False)[:count]
