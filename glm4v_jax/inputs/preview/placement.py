"""Where images and videos stand in a prompt, how many of its tokens they take, and at which positions.

T is the number of tokens of a prompt.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm4v_jax.inputs.mrope import TokenIds, place_rows
from glm4v_jax.inputs.prepared_media import PreparedMedia
from glm4v_jax.inputs.preview.preview import Seen, warning, why_scaled
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.text.placeholders import IMAGE_TAGS, VIDEO_TAGS

_TAGS = {"picture": IMAGE_TAGS, "video": VIDEO_TAGS}


@dataclasses.dataclass(frozen=True)
class MediaPlacement:
    """Where an image or video stands in a prompt.

    Attributes:
      tokens: image tokens with the tags and times that belong to them.
      positions: first and last M-RoPE position of its image tokens, for each of t, h and w.
      time_texts: what stands after each temporal patch of a video, such as `12` or `12.0 seconds`.
    """

    tokens: int
    positions: dict[str, tuple[int, int]]
    time_texts: tuple[str, ...] = ()

    @property
    def timestamps(self) -> list[float]:
        """The seconds that `time_texts` say."""
        return [json.loads(text.partition(" ")[0]) for text in self.time_texts]


@dataclasses.dataclass(frozen=True)
class PlacedPrompt:
    """A prompt of one turn: images and videos in their order, then text.

    Attributes:
      input_ids: int [T].
      position_ids: int [3, T].
      places: of the images and videos, in their order.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    places: tuple[MediaPlacement, ...]

    @property
    def next_position(self) -> int:
        """The position of the first token of the answer."""
        return int(self.position_ids.max()) + 1


def place_in_prompt(seen: Sequence[Seen], processor: Glm4vProcessor, text: str | None = None) -> PlacedPrompt:
    """The prompt that asks about images and videos in their order, as the engine makes it, with a question or none.

    MessageError if the text is not valid Unicode; CheckpointError if there is no chat template.
    """
    content: list[dict[str, Any]] = [
        # The template asks for the type alone; the place is for its checks.
        {"type": "image" if item.kind == "picture" else "video", "path": item.name}
        for item in seen
    ]
    if text is not None:
        content.append({"type": "text", "text": text})
    media = PreparedMedia.joined([item.media for item in seen])
    inputs = processor.prepare_turn([{"role": "user", "content": content}], media)
    input_ids = inputs["input_ids"][0]

    tags = {kind: tuple(processor.tokenizer.convert_tokens_to_ids(tag) for tag in pair) for kind, pair in _TAGS.items()}
    (placed,) = place_rows(
        [input_ids],
        TokenIds(processor.image_token_id, *tags["video"]),
        inputs.get("image_grid_thw", ()),
        inputs.get("video_grid_thw", ()),
        processor.image_processor.merge_size,
    )
    places = []
    for number, item in enumerate(seen):
        own = np.flatnonzero(placed.medium_of == number)
        (expansion,) = (*item.media.images, *item.media.videos)
        first, last = _with_tags(input_ids, own, *tags[item.kind])
        positions = placed.position_ids[:, own]
        lows, highs = positions.min(axis=1), positions.max(axis=1)
        places.append(
            MediaPlacement(
                tokens=last + 1 - first,
                positions={axis: (int(low), int(high)) for axis, low, high in zip("thw", lows, highs, strict=True)},
                time_texts=expansion.times,
            )
        )
    return PlacedPrompt(input_ids, placed.position_ids, tuple(places))


def _with_tags(input_ids: np.ndarray, own: np.ndarray, start: int | None, end: int | None) -> tuple[int, int]:
    """First and last column of the image tokens in the columns `own`, with the tags around them where there are any."""
    first, last = int(own[0]), int(own[-1])
    before = np.flatnonzero(input_ids[:first] == start)
    after = np.flatnonzero(input_ids[last:] == end)
    return (int(before[-1]) if len(before) else first), (last + int(after[0]) if len(after) else last)


def facts(seen: Seen, place: MediaPlacement) -> dict[str, Any]:
    """Everything there is to say of an image or video, as JSON has it: lengths in pixels, times in seconds."""
    found: dict[str, Any] = {
        "file": seen.name,
        "kind": seen.kind,
        "height": seen.height,
        "width": seen.width,
        "seen_height": seen.seen_height,
        "seen_width": seen.seen_width,
        "scale_height": round(seen.scale[0], 4),
        "scale_width": round(seen.scale[1], 4),
        "why": why_scaled(seen),
        "warning": warning(seen),
        "grid_thw": list(seen.grid_thw),
        "patches": seen.patches,
        "image_tokens": seen.tokens,
        "prompt_tokens": place.tokens,
        "budget_tokens": seen.budget,
        "share_of_budget": round(seen.tokens / seen.budget, 4),
        "positions": {axis: list(ends) for axis, ends in place.positions.items()},
    }
    if seen.metadata is not None:
        found |= {
            "frames": seen.metadata.total_num_frames,
            "fps": seen.metadata.fps,
            "duration": seen.metadata.duration,
            "video_backend": seen.metadata.video_backend,
            "frames_indices": [int(index) for index in seen.metadata.frames_indices or ()],
            "frames_seconds": [round(time, 3) for time in seen.metadata.timestamps],
            "timestamps": place.timestamps,
            "time_texts": list(place.time_texts),
        }
    return found
