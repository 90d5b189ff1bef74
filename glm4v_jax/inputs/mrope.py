"""Which token of a prompt stands for which part of which image or video, and the M-RoPE positions that follow.

The positions are those of `Glm4vModel.get_rope_index` of transformers 4.57.1, in NumPy, with images and videos mixing
freely. This is the only place that matches vision tokens with media: `prompt.Prompt` keeps what `place_rows` finds, and
the model, the engine, training and the preview read it there.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.medium import checked_grids


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """The ids that mark vision in a prompt, where there is no `Glm4vConfig`, which has them under the same names."""

    image_token_id: int
    video_start_token_id: int
    video_end_token_id: int


class VisionRun(NamedTuple):
    """A run of image tokens in a prompt: `start` and `stop` index the row without its padding."""

    start: int
    stop: int
    is_video: bool


class Placement(NamedTuple):
    """What stands where in a prompt of T tokens, without padding.

    position_ids: int32 [3, T], temporal, height and width position.
    media: (is_video, number in the batch) of the images and videos in the prompt, in the order of their tokens.
    medium_of: int32 [T], the index into `media` of the medium that a vision token belongs to, -1 for text.
    offset_of: int32 [T], which of that medium's merged tokens it is, -1 for text.
    """

    position_ids: np.ndarray
    media: tuple[tuple[bool, int], ...]
    medium_of: np.ndarray
    offset_of: np.ndarray


_FIELDS = {False: "image_grid_thw", True: "video_grid_thw"}
_NAMES = {False: "image", True: "video frame"}


class _Block(NamedTuple):
    """Merged tokens that stand in a prompt without a break: an image, or one frame of a video."""

    medium: tuple[bool, int]
    offset: int
    grid: tuple[int, int, int]


def vision_runs(tokens: np.ndarray, ids: TokenIds | Glm4vConfig) -> list[VisionRun]:
    """Find the runs of image tokens in an unpadded prompt int [T]; those inside video markers are video frames."""
    tokens = np.asarray(tokens)
    is_image = tokens == ids.image_token_id
    # A marker decides from its own position on, and the last one counts: not a nesting level, a switch.
    switch = np.where(tokens == ids.video_start_token_id, 1, np.where(tokens == ids.video_end_token_id, -1, 0))
    last = np.maximum.accumulate(np.where(switch != 0, np.arange(len(tokens)), -1)) if len(tokens) else switch
    in_video = (last >= 0) & (switch[last] == 1)
    kind = np.where(is_image, np.where(in_video, 2, 1), 0)
    edges = np.flatnonzero(np.diff(kind)) + 1
    bounds = [0, *edges.tolist(), len(tokens)]
    return [VisionRun(a, b, bool(kind[a] == 2)) for a, b in itertools.pairwise(bounds) if b > a and kind[a]]


def rope_index(
    input_ids: np.ndarray,
    ids: TokenIds | Glm4vConfig,
    image_grid_thw: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    attention_mask: np.ndarray | None = None,
    merge_size: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute M-RoPE positions.

    Text advances one position a token on all three axes. An image or frame starts at the next position p: its tokens
    have temporal position p, and p + row, p + column; the text after it continues after the largest of them.

    >>> ids = TokenIds(image_token_id=9, video_start_token_id=7, video_end_token_id=8)
    >>> position_ids, deltas = rope_index(np.array([[1, 9, 9, 2]]), ids, np.array([[1, 2, 4]]))
    >>> position_ids[:, 0].tolist(), deltas.tolist()
    ([[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]], [[0]])

    Args:
      input_ids: int [B, T].
      ids: the tokens that mark vision.
      image_grid_thw, video_grid_thw: int [N, 3], grids in patches, over the batch in order.
      attention_mask: int [B, T], 0 for padding on either side.
      merge_size: patches that a merged token spans on each side.

    Returns:
      position_ids: int32 [3, B, T], 1 on padding, and
      rope_deltas: int32 [B, 1], largest position + 1 - T; a cached decoding step at slot s has position s + delta.

    Raises:
      MessageError: a grid is invalid, or the runs of image tokens do not match the grids, in number or in length.
    """
    input_ids = np.asarray(input_ids)
    batch, length = input_ids.shape
    mask = np.ones((batch, length), bool) if attention_mask is None else np.asarray(attention_mask) != 0
    images, videos = (
        np.zeros((0, 3), np.int64) if grid is None or np.size(grid) == 0 else checked_grids(grid, merge_size, name)
        for name, grid in (("image_grid_thw", image_grid_thw), ("video_grid_thw", video_grid_thw))
    )
    rows = place_rows([row[kept] for row, kept in zip(input_ids, mask, strict=True)], ids, images, videos, merge_size)
    position_ids = np.ones((3, batch, length), np.int32)
    for b, row in enumerate(rows):
        position_ids[:, b, mask[b]] = row.position_ids
    deltas = [row.position_ids.max(initial=-1) + 1 - length for row in rows]
    return position_ids, np.array(deltas, np.int32).reshape(batch, 1)


def place_rows(
    rows: Sequence[np.ndarray],
    ids: TokenIds | Glm4vConfig,
    image_grids: Iterable[np.ndarray],
    video_grids: Iterable[np.ndarray],
    merge_size: int,
) -> list[Placement]:
    """Match the vision tokens of unpadded prompts, each int [T], with images and videos; see `rope_index`.

    Args:
      rows: the prompts of a batch.
      ids: the tokens that mark vision.
      image_grids, video_grids: checked grids int [3], over the batch in order.
      merge_size: patches that a merged token spans on each side.

    Raises:
      MessageError: the runs of image tokens do not match the grids, in number or in length.
    """
    images = [_Block((False, i), 0, (t, h, w)) for i, (t, h, w) in enumerate(_merged(image_grids, merge_size))]
    frames = [
        _Block((True, i), frame * h * w, (1, h, w))
        for i, (t, h, w) in enumerate(_merged(video_grids, merge_size))
        for frame in range(t)
    ]
    queues = {False: iter(images), True: iter(frames)}
    placed = [_place_row(tokens, ids, queues, merge_size) for tokens in rows]
    for is_video, blocks in ((False, images), (True, frames)):
        if left := sum(1 for _ in queues[is_video]):
            raise MessageError(
                f"{_FIELDS[is_video]}: found {len(blocks)} {_NAMES[is_video]}s; expected {len(blocks) - left}, as many "
                "as the prompts have places for"
            )
    return placed


def _merged(grids: Iterable[np.ndarray], merge_size: int) -> Iterator[tuple[int, int, int]]:
    """Grids in merged tokens."""
    for t, h, w in grids:
        yield int(t), int(h) // merge_size, int(w) // merge_size


def _place_row(
    tokens: np.ndarray, ids: TokenIds | Glm4vConfig, queues: dict[bool, Iterator[_Block]], merge_size: int
) -> Placement:
    """Place one unpadded prompt; takes its blocks off the queues."""
    positions = np.empty((3, len(tokens)), np.int32)
    medium_of, offset_of = (np.full(len(tokens), -1, np.int32) for _ in range(2))
    media: dict[tuple[bool, int], int] = {}
    position = start = 0  # of the next token
    for run in [*vision_runs(tokens, ids), VisionRun(len(tokens), len(tokens), False)]:
        text = run.start - start
        positions[:, start : run.start] = position + np.arange(text)
        position, start = position + text, run.start
        while start < run.stop:  # more than one block if nothing stands between two images
            block = next(queues[run.is_video], None)
            field, name = _FIELDS[run.is_video], _NAMES[run.is_video]
            if block is None:
                raise MessageError(f"{field}: found too few {name}s; expected as many as the prompts have places for")
            size = int(np.prod(block.grid))
            if size > run.stop - start:
                t, h, w = block.grid
                raise MessageError(
                    f"input_ids: found {run.stop - start} image tokens at token {start}; expected {size}, for the "
                    f"{name} of grid {[t, h * merge_size, w * merge_size]}"
                )
            here = slice(start, start + size)
            positions[:, here] = position + np.indices(block.grid).reshape(3, -1)
            medium_of[here] = media.setdefault(block.medium, len(media))
            offset_of[here] = block.offset + np.arange(size)
            position, start = position + max(block.grid), here.stop
    return Placement(positions, tuple(media), medium_of, offset_of)
