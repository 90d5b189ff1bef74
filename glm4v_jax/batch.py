"""The static-shape arrays a model takes: what every request, whatever its images, is turned into on the host.

Named tuples, so that they are JAX pytrees without this module importing JAX: NumPy arrays on the host, where `inputs`
makes them, JAX arrays inside a program. `inputs.make_batch` makes a `Batch`, `inputs.vision_rows.pack` a `VisionRows`.
"""

from typing import NamedTuple

import numpy as np


class VisionRows(NamedTuple):
    """Patches of images and video frames packed into R rows of L patches; a frame never spans two rows.

    Patches keep the processor's order (blocks of merge_size x merge_size), and every frame starts at a multiple of
    merge_size^2, so that merged tokens are runs of merge_size^2 patches.

    >>> from glm4v_jax.inputs.medium import Medium
    >>> from glm4v_jax.inputs.vision_rows import pack
    >>> image = Medium(np.ones((24, 1176), np.float32), np.array([1, 4, 6]))
    >>> rows, _ = pack([image], merge_size=2, position_grid=24)
    >>> rows.patches.shape, rows.coords.shape, rows.weights_h.shape
    ((1, 128, 1176), (1, 128, 2), (1, 128, 24))
    """

    patches: np.ndarray
    """float32 [R, L, C * temporal_patch_size * patch_size^2]; zeros are padding"""
    segment_ids: np.ndarray
    """int32 [R, L]: 0 padding, otherwise the number of the frame in the batch; attention stays inside a frame"""
    coords: np.ndarray
    """int32 [R, L, 2]: row and column of the patch in its frame, for the 2-D rope"""
    weights_h: np.ndarray
    """float32 [R, L, S]: bicubic weights of the rows of the S x S position table; S is 0 where there is none"""
    weights_w: np.ndarray
    """float32 [R, L, S]: bicubic weights of its columns"""


class Batch(NamedTuple):
    """One batch of prompts: right- or left-padded tokens, M-RoPE positions, and the vision rows they refer to.

    >>> positions = np.broadcast_to(np.arange(4), (3, 1, 4))
    >>> Batch(np.array([[5, 6, 7, 8]]), np.ones((1, 4)), positions).vision is None
    True
    """

    input_ids: np.ndarray
    """int32 [B, T]"""
    segment_ids: np.ndarray
    """int32 [B, T]: 0 padding, 1 (or, in packed rows, 1, 2, ...) the prompt that a token belongs to"""
    position_ids: np.ndarray
    """int32 [3, B, T]: temporal, height and width position"""
    vision_index: np.ndarray | None = None
    """int32 [B, T]: -1 for text, otherwise the merged vision token (row * L / merge_size^2 + offset) that goes there"""
    vision: VisionRows | None = None
    """None in a batch of text alone"""
