"""A processor's output -> a `Batch`: rows aligned and padded to a bucket, positions, packed vision, merge indices."""

import numpy as np

from glm4v_jax.batch import Batch, VisionRows
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import MessageError, counted
from glm4v_jax.inputs.medium import Medium, media_of
from glm4v_jax.inputs.prompt import checked_ids, prompts_of
from glm4v_jax.inputs.vision_rows import bucket, pack

MIN_LENGTH = 32
"""The shortest prompt bucket."""


def make_batch(
    input_ids: np.ndarray,
    config: Glm4vConfig,
    *,
    attention_mask: np.ndarray | None = None,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
    pixel_values_videos: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    left_align: bool = True,
    batch_multiple: int = 1,
    length: int | None = None,
    vision_shape: tuple[int, int] | None = None,
) -> tuple[Batch, np.ndarray]:
    """Turn a processor's output into static-shape arrays.

    >>> import numpy as np
    >>> from glm4v_jax import Glm4vConfig, Glm4vProcessor, make_batch
    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> config, processor = (cls.from_pretrained(TINY_CHECKPOINT) for cls in (Glm4vConfig, Glm4vProcessor))
    >>> inputs = processor(text="<|image|>What is this?", images=np.zeros((56, 56, 3), np.uint8))
    >>> batch, next_position = make_batch(config=config, **inputs)
    >>> batch.input_ids.shape, batch.position_ids.shape, batch.vision.patches.shape
    ((1, 32), (3, 1, 32), (1, 128, 1176))

    Args:
      input_ids: int [B, T].
      config: of the model.
      attention_mask: int [B, T], 0 for padding on either side.
      pixel_values, pixel_values_videos: float [patches, P], flattened patches of all images, of all videos.
      image_grid_thw, video_grid_thw: int [N, 3].
      position_ids: int [3, B, T] or [B, T], instead of those that follow from the tokens.
      left_align: move each row's padding to its right end, so that its tokens fill a cache's slots from 0 on.
      batch_multiple: rows of padding are added until the batch is a multiple of it.
      length: T' to pad to, instead of the bucket of the longest row.
      vision_shape: (R, L) of the vision rows, instead of the best fitting bucket.

    Returns:
      The batch, [B', T'], and int64 [B]: the position after each row's last token.

    Raises:
      MessageError: a shape is wrong, pixel values and grids do not match, or the prompts have places for more or fewer
        images or video frames than were given.
    """
    input_ids, mask = checked_ids(input_ids, attention_mask, config)
    inputs = {
        "input_ids": input_ids, "attention_mask": mask, "pixel_values": pixel_values, "image_grid_thw": image_grid_thw,
        "pixel_values_videos": pixel_values_videos, "video_grid_thw": video_grid_thw,
    }  # fmt: skip
    images, videos = media_of(inputs, config)
    prompts = prompts_of(inputs, config, (images, videos))
    given_positions = None if position_ids is None else checked_positions(position_ids, *input_ids.shape)
    vision: VisionRows | None = None
    features: dict[Medium, np.ndarray] = {}
    if images or videos:
        vision, features = pack(
            [*images, *videos],
            merge_size=config.vision_config.spatial_merge_size,
            position_grid=config.vision_config.position_grid,
            row_multiple=batch_multiple,
            shape=vision_shape,
        )
    longest = max(map(len, prompts)) if left_align else input_ids.shape[1]
    rows = len(prompts) + -len(prompts) % batch_multiple
    columns = bucket(longest, MIN_LENGTH) if length is None else length
    if columns < longest:
        raise MessageError(
            f"length: found {columns}; expected at least the longest prompt, {counted(longest, 'token')}"
        )

    batch = Batch(
        input_ids=np.zeros((rows, columns), np.int32),
        segment_ids=np.zeros((rows, columns), np.int32),
        position_ids=np.ones((3, rows, columns), np.int32),
        vision_index=None if vision is None else np.full((rows, columns), -1, np.int32),
        vision=vision,
    )
    if not left_align:  # the reference runs padding too: what comes of it is returned, though nothing attends to it
        here = slice(len(prompts)), slice(input_ids.shape[1])
        batch.input_ids[here] = input_ids
        if given_positions is not None:
            batch.position_ids[:, *here] = given_positions
    next_position = np.zeros(len(prompts), np.int64)
    for b, (prompt, kept) in enumerate(zip(prompts, mask, strict=True)):
        positions = prompt.position_ids if given_positions is None else given_positions[:, b, kept]
        next_position[b] = positions.max() + 1
        columns_of = np.arange(len(prompt)) if left_align else np.flatnonzero(kept)
        batch.input_ids[b, columns_of], batch.segment_ids[b, columns_of] = prompt.input_ids, 1
        batch.position_ids[:, b, columns_of] = positions
        if batch.vision_index is not None:
            batch.vision_index[b, columns_of] = prompt.vision_index(features)
    return batch, next_position


def checked_positions(position_ids: np.ndarray, batch: int, t: int) -> np.ndarray:
    """Return positions [3, B, T] or [B, T], of every row or of one for all, as int32 [3, B, T].

    Raises:
      MessageError: they have another shape, or are not integers.
    """
    positions = np.asarray(position_ids)
    if positions.ndim == 2:
        positions = positions[None]
    fits = positions.ndim == 3 and positions.shape[0] in (1, 3) and positions.shape[1] in (1, batch)
    if not fits or positions.shape[2] != t or (np.ndim(position_ids) == 3 and len(positions) != 3):
        raise MessageError(f"position_ids: found shape {list(np.shape(position_ids))}; expected [3, {batch}, {t}]")
    if positions.dtype.kind not in "iu":
        raise MessageError(f"position_ids: found {positions.dtype}; expected integers")
    return np.broadcast_to(positions, (3, batch, t)).astype(np.int32)
