"""A processor's output -> a `Batch`: rows aligned and padded to a bucket, positions, packed vision, merge indices."""

from typing import Any

import numpy as np

from glm4v_jax.batch import Batch, VisionRows
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.mrope import TokenIds, rope_index, vision_runs
from glm4v_jax.inputs.vision_rows import bucket, frames_of, pack

MIN_LENGTH = 32
"""The shortest prompt bucket."""


def token_ids(config: Glm4vConfig) -> TokenIds:
    """The ids of `config` that mark vision in a prompt."""
    return TokenIds(config.image_token_id, config.video_start_token_id, config.video_end_token_id)


def token_array(input_ids: Any, name: str = "input_ids") -> np.ndarray:
    """Tokens as an array of integers [B, T].

    Raises:
      MessageError: they are something else, such as prompts of unequal length without padding.
    """
    try:
        array = np.asarray(input_ids)
    except ValueError as error:
        raise MessageError(f"{name}: found rows of unequal length; expected [B, T]: pass padding=True") from error
    if array.ndim != 2 or array.dtype.kind not in "iu" or 0 in array.shape:
        raise MessageError(f"{name}: found {array.dtype} {list(array.shape)}; expected integers [B, T]")
    return array


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

    Args:
      input_ids: int [B, T].
      config: of the model.
      attention_mask: int [B, T], 0 for padding on either side.
      pixel_values, pixel_values_videos: float [patches, P], flattened patches of all pictures, of all videos.
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
        pictures or video frames than were given.
    """
    input_ids, mask = checked_ids(input_ids, attention_mask, config)
    batch, t = input_ids.shape
    ids = token_ids(config)
    merge = config.vision_config.spatial_merge_size
    vision, merged_index = _pack_all(
        config, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, batch_multiple, vision_shape
    )
    positions, deltas = rope_index(input_ids, ids, image_grid_thw, video_grid_thw, mask, merge)
    next_position = deltas[:, 0].astype(np.int64) + t
    if position_ids is not None:
        positions = checked_positions(position_ids, batch, t)
        next_position = np.where(mask, positions.max(axis=0), -1).max(axis=1).astype(np.int64) + 1

    vision_index = None
    if vision is not None:
        num_image_tokens = _num_tokens(image_grid_thw, merge)
        vision_index = _place_vision(input_ids, mask, ids, merged_index, num_image_tokens)

    rows = batch + -batch % batch_multiple
    new_t = length if length is not None else bucket(int(mask.sum(1).max()) if left_align else t, MIN_LENGTH)
    # Where each column of the result comes from; a stable sort moves padding to the right and keeps the order.
    order = np.argsort(~mask, axis=1, kind="stable") if left_align else np.broadcast_to(np.arange(t), (batch, t))
    if new_t < (int(mask.sum(1).max()) if left_align else t):
        raise MessageError(
            f"length: found {new_t}; expected at least the longest prompt, {int(mask.sum(1).max())} tokens"
        )

    def arrange(x: np.ndarray, fill: int) -> np.ndarray:
        x = np.take_along_axis(x, order, axis=1)[:, :new_t]
        return np.pad(x, ((0, rows - batch), (0, new_t - x.shape[1])), constant_values=fill).astype(np.int32)

    return (
        Batch(
            input_ids=arrange(input_ids, 0),
            segment_ids=arrange(mask.astype(np.int32), 0),
            position_ids=np.stack([arrange(axis, 1) for axis in positions]),
            vision_index=None if vision_index is None else arrange(vision_index, -1),
            vision=vision,
        ),
        next_position,
    )


def checked_ids(
    input_ids: np.ndarray, attention_mask: np.ndarray | None, config: Glm4vConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int [B, T] and bool [B, T], where they are not padding.

    Raises:
      MessageError: a shape is wrong, a row is all padding, or a token is not in the vocabulary.
    """
    input_ids = token_array(input_ids)
    mask = np.ones(input_ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if mask.shape != input_ids.shape:
        raise MessageError(f"attention_mask: found shape {list(mask.shape)}; expected {list(input_ids.shape)}")
    if not mask.any(axis=1).all():
        raise MessageError("attention_mask: found a row of padding alone; expected at least one token in every prompt")
    return in_vocabulary(input_ids, config.text_config.vocab_size), mask


def in_vocabulary(input_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Tokens, all of them in the vocabulary.

    Raises:
      MessageError: one is not.
    """
    if (low := int(input_ids.min())) < 0 or (high := int(input_ids.max())) >= vocab_size:
        found = low if low < 0 else high
        raise MessageError(f"input_ids: found token {found}; expected tokens from 0 to {vocab_size - 1}")
    return input_ids


def checked_positions(position_ids: np.ndarray, batch: int, t: int) -> np.ndarray:
    """Positions [3, B, T] or [B, T], of every row or of one for all, as int32 [3, B, T].

    Raises:
      MessageError: they have another shape, or are no integers.
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


def checked_grids(grid_thw: Any, merge_size: int, name: str = "grid_thw") -> np.ndarray:
    """Grids of pictures or videos, int64 [N, 3].

    Raises:
      MessageError: they have another shape, or sides that are no multiples of `merge_size`.
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


def checked_patches(pixel_values: Any, grids: np.ndarray, patch_dim: int, name: str, grid_name: str) -> np.ndarray:
    """Flattened patches [patches, P], as many as checked grids count.

    Raises:
      MessageError: they have another shape.
    """
    values, expected = np.asarray(pixel_values), [int(grids.prod(axis=1).sum()), patch_dim]
    if list(values.shape) != expected:
        raise MessageError(f"{name}: found shape {list(values.shape)}; expected {expected}, as {grid_name} counts")
    return values


def _num_tokens(grid_thw: np.ndarray | None, merge: int) -> int:
    return 0 if grid_thw is None else int(np.prod(np.asarray(grid_thw).reshape(-1, 3), axis=1).sum()) // merge**2


def _pack_all(
    config: Glm4vConfig,
    pixel_values: np.ndarray | None,
    image_grid_thw: np.ndarray | None,
    pixel_values_videos: np.ndarray | None,
    video_grid_thw: np.ndarray | None,
    row_multiple: int,
    shape: tuple[int, int] | None,
) -> tuple[VisionRows | None, np.ndarray]:
    """All pictures, then all video frames, in one set of rows."""
    pixels, frames = [], []
    for name, values, grid_name, grid in (
        ("pixel_values", pixel_values, "image_grid_thw", image_grid_thw),
        ("pixel_values_videos", pixel_values_videos, "video_grid_thw", video_grid_thw),
    ):
        if (values is None) != (grid is None):
            missing, given = (name, grid_name) if values is None else (grid_name, name)
            raise MessageError(f"{missing}: found nothing; expected it beside {given}")
        if values is None or grid is None or np.asarray(grid).size == 0:
            continue
        grids = checked_grids(grid, config.vision_config.spatial_merge_size, grid_name)
        pixels.append(checked_patches(values, grids, config.vision_config.patch_dim, name, grid_name))
        frames.append(frames_of(grids))
    if not pixels:
        return None, np.zeros(0, np.int32)
    return pack(
        pixels[0] if len(pixels) == 1 else np.concatenate(pixels),
        np.concatenate(frames),
        merge_size=config.vision_config.spatial_merge_size,
        position_grid=config.vision_config.position_grid,
        row_multiple=row_multiple,
        shape=shape,
    )


def _place_vision(
    input_ids: np.ndarray, mask: np.ndarray, ids: TokenIds, merged_index: np.ndarray, num_image_tokens: int
) -> np.ndarray:
    """int32 [B, T]: the merged token that belongs at each place, -1 for text; `rope_index` has checked the numbers."""
    index = np.full(input_ids.shape, -1, np.int32)
    taken = {False: 0, True: num_image_tokens}
    for b in range(len(input_ids)):
        columns = np.flatnonzero(mask[b])
        for run in vision_runs(input_ids[b, columns], ids):
            n = run.stop - run.start
            start = taken[run.is_video]
            index[b, columns[run.start : run.stop]] = merged_index[start : start + n]
            taken[run.is_video] = start + n
    return index
