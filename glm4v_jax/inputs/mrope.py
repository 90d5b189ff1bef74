"""M-RoPE positions and rope deltas, and which token stands for which picture or video frame.

`Glm4vModel.get_rope_index` of transformers 4.57.1, in NumPy, with pictures and videos mixing freely.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from glm4v_jax.errors import MessageError


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """The ids that mark vision in a prompt (`Glm4vConfig` has fields of the same names)."""

    image_token_id: int
    video_start_token_id: int
    video_end_token_id: int


@dataclasses.dataclass(frozen=True)
class VisionRun:
    """A run of image tokens in a prompt: `start` and `stop` index the row with its padding taken out."""

    start: int
    stop: int
    is_video: bool


def vision_runs(tokens: np.ndarray, ids: TokenIds) -> list[VisionRun]:
    """The runs of image tokens in an unpadded prompt int [T]; those inside video markers are video frames."""
    tokens = np.asarray(tokens)
    is_image = tokens == ids.image_token_id
    # A marker decides from its own position on, and the last one counts: not a nesting level, a switch.
    switch = np.where(tokens == ids.video_start_token_id, 1, np.where(tokens == ids.video_end_token_id, -1, 0))
    last = np.maximum.accumulate(np.where(switch != 0, np.arange(len(tokens)), -1)) if len(tokens) else switch
    in_video = (last >= 0) & (switch[last] == 1)
    kind = np.where(is_image, np.where(in_video, 2, 1), 0)
    edges = np.flatnonzero(np.diff(kind)) + 1
    bounds = [0, *edges.tolist(), len(tokens)]
    return [VisionRun(a, b, kind[a] == 2) for a, b in itertools.pairwise(bounds) if b > a and kind[a]]


def rope_index(
    input_ids: np.ndarray,
    ids: TokenIds,
    image_grid_thw: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    attention_mask: np.ndarray | None = None,
    merge_size: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """M-RoPE positions.

    Text advances one position a token on all three axes. A picture or frame starts at the next position p: its tokens
    have temporal position p, and p + row, p + column; the text after it goes on after the largest of them.

    Args:
      input_ids: int [B, T].
      ids: the tokens that mark vision.
      image_grid_thw, video_grid_thw: int [N, 3], grids in patches, over the batch in order.
      attention_mask: int [B, T], 0 for padding on either side.
      merge_size: patches a merged token spans on each side.

    Returns:
      position_ids: int32 [3, B, T], 1 on padding, and
      rope_deltas: int32 [B, 1], largest position + 1 - T; a cached decoding step at slot s has position s + delta.

    Raises:
      MessageError: the runs of image tokens do not match the grids, in number or in length.
    """
    input_ids = np.asarray(input_ids)
    batch, length = input_ids.shape
    mask = np.ones((batch, length), bool) if attention_mask is None else np.asarray(attention_mask) != 0
    grids = {False: _grids(image_grid_thw), True: [(1, h, w) for t, h, w in _grids(video_grid_thw) for _ in range(t)]}
    queues = {kind: iter(frames) for kind, frames in grids.items()}
    position_ids = np.ones((3, batch, length), np.int32)
    rope_deltas = np.zeros((batch, 1), np.int32)
    for b in range(batch):
        positions = _row_positions(input_ids[b, mask[b]], ids, queues, merge_size)
        position_ids[:, b, mask[b]] = positions
        rope_deltas[b] = positions.max(initial=-1) + 1 - length
    for kind, queue in queues.items():
        if left := sum(1 for _ in queue):
            name = "video frames" if kind else "pictures"
            raise MessageError(
                f"{len(grids[kind])} {name} given, the prompts have places for {len(grids[kind]) - left}"
            )
    return position_ids, rope_deltas


def _grids(grid_thw: np.ndarray | None) -> list[tuple[int, int, int]]:
    if grid_thw is None:
        return []
    return [(t, h, w) for t, h, w in np.asarray(grid_thw, np.int64).reshape(-1, 3).tolist()]


def _row_positions(
    tokens: np.ndarray, ids: TokenIds, queues: dict[bool, Iterator[tuple[int, int, int]]], merge_size: int
) -> np.ndarray:
    """int [3, T] positions of one unpadded prompt; takes its grids off the queues."""
    parts, position, done = [], 0, 0
    for run in vision_runs(tokens, ids):
        text = run.start - done
        parts.append(np.broadcast_to(position + np.arange(text), (3, text)))
        position += text
        start = run.start
        while start < run.stop:  # more than one if nothing stands between two pictures
            grid = next(queues[run.is_video], None)
            name = "video frame" if run.is_video else "picture"
            if grid is None:
                raise MessageError(f"the prompts have places for more {name}s than were given")
            t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
            if t * h * w > run.stop - start:
                raise MessageError(
                    f"the prompt has {run.stop - start} image tokens at token {start}, where a {name} of grid "
                    f"{list(grid)} needs {t * h * w}"
                )
            parts.append(position + np.indices((t, h, w)).reshape(3, -1))
            position += max(t, h, w)
            start += t * h * w
        done = run.stop
    text = len(tokens) - done
    parts.append(np.broadcast_to(position + np.arange(text), (3, text)))
    return np.concatenate(parts, axis=1)
