"""Images and videos of a step of vLLM's engine: its tensors to our media, and media to vision features.

An exception here would end the engine and with it every request, so nothing that an image contains raises one. Shapes
are those of vLLM's processor, which has checked them before a request is accepted.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from glm4v_jax.batch import VisionRows
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.generate.feature_pool import MIN_IMAGE_PATCHES, Shape, medium_shape, wave_size
from glm4v_jax.inputs.medium import Medium, media_of
from glm4v_jax.inputs.vision_rows import bucket, empty_rows, fill
from glm4v_jax.model.runtime import Flat
from glm4v_jax.model.vision import VisionEncoder

log = logging.getLogger("vllm.glm4v_jax")


def media_in(kwargs: Mapping[str, Any], config: Glm4vConfig) -> list[Medium]:
    """The images or videos that vLLM hands to `embed_multimodal`, in order, with pixels that are finite.

    >>> grids = np.array([[1, 2, 2], [1, 2, 4]])
    >>> pixels = np.zeros((12, Glm4vConfig.tiny().vision_config.patch_dim))
    >>> [len(medium.patches) for medium in media_in({"pixel_values": pixels, "image_grid_thw": grids}, Glm4vConfig.tiny())]
    [4, 8]

    Args:
      kwargs: `pixel_values` [patches, P] and `image_grid_thw` [N, 3], or those of videos: tensors on the CPU, or lists
        of them.
      config: of the model.
    """  # noqa: E501
    images, videos = media_of({name: _array(values) for name, values in kwargs.items()}, config)
    return [_finite(medium) for medium in images + videos]


def _array(values: Any) -> np.ndarray | None:
    if isinstance(values, list | tuple):
        return np.concatenate([np.atleast_2d(_array(value)) for value in values])
    if hasattr(values, "detach"):  # of PyTorch; NumPy has no bfloat16 of its own
        values = values.detach()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return values


def _finite(medium: Medium) -> Medium:
    valid = np.isfinite(medium.patches)
    if valid.all():
        return medium
    log.warning("an image or video has %d pixel values that are not finite; zeros replace them", np.sum(~valid))
    return Medium(np.where(valid, medium.patches, 0), medium.grid)


class VisionPrograms:
    """The ViT on its own mesh: the devices of the engine's, heads and MLPs sharded over them.

    Images and videos of a call are encoded in waves of one shape. The shapes come from a small set (`shapes`), which
    `warm` compiles.
    """

    def __init__(self, visual: VisionEncoder, config: Glm4vConfig, mesh: Mesh, context: Callable[[], Any]):
        self._visual, self._config, self._mesh, self._context = Flat.of(visual), config.vision_config, mesh, context

    def encode(self, media: Sequence[Medium], mesh: Mesh) -> list[Float[Array, "M D"]]:
        """Encode images and videos; the merged tokens of each are replicated over `mesh`."""
        found: dict[Medium, Array] = {}
        for shape, wave in _waves(media):
            rows, order = self._rows(shape, wave)
            features = self._run(rows, order)
            found |= {medium: feature for medium, feature in zip(wave, features, strict=False)}
        merge = self._config.spatial_merge_size**2
        replicated = NamedSharding(mesh, PartitionSpec())
        return [jax.device_put(found[medium], replicated)[: len(medium.patches) // merge] for medium in media]

    def warm(self, shape: Shape) -> list[Array]:
        """Compile the program of a shape, and run it."""
        return self._run(*self._rows(shape, []))

    def shapes(self, tokens: int) -> list[Shape]:
        """The shapes of all images of up to `tokens` merged tokens."""
        merge = self._config.spatial_merge_size**2
        lengths = [MIN_IMAGE_PATCHES]
        while lengths[-1] < tokens * merge:
            lengths.append(bucket(lengths[-1] + 1))
        return [(1, length) for length in lengths]

    def _rows(self, shape: Shape, wave: Sequence[Medium]) -> tuple[VisionRows, np.ndarray]:
        (num_rows, length), config = shape, self._config
        merge, count = config.spatial_merge_size, wave_size(shape, 1)
        room = num_rows * length // merge**2
        rows = empty_rows(count * num_rows, length, config.patch_dim, config.position_grid)
        order = np.zeros((count, room), np.int32)
        for i, medium in enumerate(wave):
            own = VisionRows(*(x[i * num_rows : (i + 1) * num_rows] for x in rows))
            index = fill(own, [medium], merge_size=merge)[medium]
            order[i, : len(index)] = index + i * room
        return rows, order

    def _run(self, rows: VisionRows, order: np.ndarray) -> list[Array]:
        with use_mesh(self._mesh), self._context():
            return _encode(self._visual, rows, order)


@functools.partial(jax.jit)
def _encode(visual: Flat[VisionEncoder], rows: VisionRows, order: Array) -> list[Array]:
    features = jax.sharding.reshard(visual.module(rows), PartitionSpec(None, None, None))
    flat = features.reshape(-1, features.shape[-1])
    return [jnp.take(flat, index, axis=0) for index in order]


def _waves(media: Sequence[Medium]) -> Iterator[tuple[Shape, list[Medium]]]:
    by_shape: dict[Shape, list[Medium]] = {}
    for medium in media:
        by_shape.setdefault(medium_shape(medium.grid, 1), []).append(medium)
    for shape, same in by_shape.items():
        size = wave_size(shape, 1)
        yield from ((shape, same[i : i + size]) for i in range(0, len(same), size))
