"""`POST /v1/preview`: what the model will see of one image or video, with drawings for the chat page."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import PIL.Image

from glm4v_jax.inputs.preview.placement import MediaPlacement, facts, place_in_prompt
from glm4v_jax.inputs.preview.preview import Seen, look
from glm4v_jax.inputs.preview.sheet import draw_frames
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.vision.settings import AREA_OPTIONS
from glm4v_jax.serve.errors import ApiError

_LONGEST_IMAGE, _LONGEST_FRAME = 880, 260
"""Sides of drawings, in pixels."""
_MAX_DRAWINGS = 60


def preview(item: Mapping[str, Any], processor: Glm4vProcessor) -> dict[str, Any]:
    """Prepare an image or a video as a chat would, and describe and draw what comes of it.

    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    >>> file = io.BytesIO()
    >>> PIL.Image.new("RGB", (90, 60)).save(file, "PNG")
    >>> seen = preview({"type": "image", "image": file.getvalue()}, processor)
    >>> seen["seen_width"], seen["seen_height"], seen["grid_thw"], seen["image_tokens"]
    (112, 84, [1, 6, 8], 12)
    >>> seen["drawings"][0]["url"][:22]
    'data:image/png;base64,'

    Args:
      item: of a message, with the bytes of a file: what `media.resolve` returns.
      processor: of the checkpoint.

    Returns:
      The facts of `glm4v inspect --json`; `drawings`, of an image or of the frames of a video; and `legend`, what their
      lines are.

    Raises:
      ApiError: the item is a text, a list of frames, or has options.
      MediaError: it cannot be read or prepared.
    """
    kind = item.get("type", "text")
    content = item.get(kind)
    if kind not in ("image", "video") or not isinstance(content, bytes):
        found = "a list" if isinstance(content, list) else kind
        raise ApiError(400, f"type: found {found}; expected an image or a video, as one file", param="type")
    if option := next((name for name in (*AREA_OPTIONS, "fps") if name in item), None):
        raise ApiError(400, f"{option}: found some; expected none: a preview is of the server's settings", param=option)
    seen = look(content, processor, "picture" if kind == "image" else "video")
    (place,) = place_in_prompt([seen], processor).places
    longest = _LONGEST_IMAGE if kind == "image" else _LONGEST_FRAME
    drawings, legend = draw_frames(seen, longest, _MAX_DRAWINGS)
    told = facts(seen, place)
    del told["file"]
    drawn = [
        {**_times(seen, index, place), "url": _data_url(image), "width": image.width, "height": image.height}
        for index, image in drawings.items()
    ]
    return told | {"object": "preview", "kind": kind, "drawings": drawn, "legend": legend}


def _times(seen: Seen, index: int, place: MediaPlacement) -> dict[str, Any]:
    """Of a temporal patch of a video: what the prompt says of it, its frames in the file, and their seconds."""
    if seen.kind != "video":
        return {}
    frames = seen.frame_indices[index]
    seconds = [round(seen.time(frame), 3) for frame in frames]
    told = {"timestamp": place.timestamps[index], "time_text": place.time_texts[index]}
    return told | {"frames": list(frames), "seconds": seconds}


def _data_url(image: PIL.Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
