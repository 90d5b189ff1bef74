"""Placeholders in a prompt to as many image tokens as the model will see.

An image of grid (t, h, w) becomes t * h * w / merge_size**2 image tokens. A video becomes, for each of its t temporal
patches, one image of h * w / merge_size**2 image tokens between `<|begin_of_image|>` and `<|end_of_image|>`, followed
by its time: `12` of GLM-4.1V, `12.0 seconds` of GLM-4.6V. Both as `Glm4vProcessor` of transformers 4.57.1 and
`Glm46VProcessor` of 5.24 do, save that a prompt is gone through once, from left to right: 4.57.1 expands images and
then videos, and garbles a prompt with an image before a video.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from glm4v_jax.errors import MessageError, counted
from glm4v_jax.inputs.media.load import VideoMetadata

Row = str | list[str]

DEFAULT_FPS = 24

# Around the image tokens of an image and of every frame; a video has its own around all of it.
IMAGE_TAGS = ("<|begin_of_image|>", "<|end_of_image|>")
VIDEO_TAGS = ("<|begin_of_video|>", "<|end_of_video|>")

# What `mm_token_type_ids` calls a token, as in transformers 5.x.
TEXT, IMAGE, VIDEO = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Expansion:
    """The text that replaces a placeholder, the image tokens in it, and what it says after each frame of a video."""

    text: str
    num_tokens: int
    times: tuple[str, ...] = ()


def expand_image(grid: np.ndarray, merge_size: int, image_token: str) -> Expansion:
    """The expansion of an image of grid [3] (t, h, w), in patches."""
    count = int(np.prod(grid)) // merge_size**2
    return Expansion(image_token * count, count)


def expand_video(
    grid: np.ndarray, metadata: VideoMetadata, merge_size: int, image_token: str, time_text: str = "{whole}"
) -> Expansion:
    """The expansion of a video of grid [3] (t, h, w), in patches, of which `merge_size` a side make one token.

    `fps` and `frames_indices` of the metadata give the times; without `fps` they are those of 24 frames a second, with
    a warning. `time_text` stands after each frame: `{seconds}`, or `{whole}` ones. MediaError without `frames_indices`.
    """
    if metadata.fps is None:
        warnings.warn(
            "the frames per second of a video are unknown (no video_metadata, or one without fps): the times in the "
            f"prompt assume fps={DEFAULT_FPS}. Pass video_metadata for the right ones.",
            stacklevel=2,
        )
        metadata = dataclasses.replace(metadata, fps=DEFAULT_FPS)
    num_frames, height, width = (int(n) for n in grid)
    # One temporal patch is two frames, and carries the time of the first.
    times = metadata.timestamps[::2][:num_frames]
    times += [times[-1] if times else 0] * (num_frames - len(times))
    tokens_a_frame = height * width // merge_size**2
    frame = IMAGE_TAGS[0] + image_token * tokens_a_frame + IMAGE_TAGS[1]
    texts = tuple(time_text.format(seconds=time, whole=int(time)) for time in times)
    return Expansion("".join(frame + text for text in texts), num_frames * tokens_a_frame, texts)


class Expander:
    """Puts images and videos, in their order, in the place of the placeholders of a batch of prompts.

    Args (of the constructor):
      image_token, video_token: the placeholders.
      images, videos: their expansions, in the order of the batch.
      images_per_row, videos_per_row: how many belong to each prompt, where that is known.
    """

    def __init__(
        self,
        image_token: str,
        video_token: str,
        images: Sequence[Expansion],
        videos: Sequence[Expansion],
        images_per_row: Sequence[int] | None = None,
        videos_per_row: Sequence[int] | None = None,
    ) -> None:
        self._placeholder = re.compile(f"{re.escape(image_token)}|{re.escape(video_token)}")
        self._kinds = {
            image_token: ("image", IMAGE, images, images_per_row),
            video_token: ("video", VIDEO, videos, videos_per_row),
        }

    def __call__(self, rows: Sequence[Row]) -> tuple[list[Row], list[np.ndarray]]:
        """Expand B prompts, each a text or a list of words.

        Also returns for each the type (1 image, 2 video) of its image tokens in their order, [n] int64. MessageError,
        with both counts, for more or fewer images or videos than placeholders.
        """
        self._check_counts(rows)
        pending: dict[str, Iterator[Expansion]] = {token: iter(kind[2]) for token, kind in self._kinds.items()}
        expanded: list[Row] = []
        types: list[np.ndarray] = []
        for row in rows:
            row_types: list[int] = []

            def put(match: re.Match[str], row_types: list[int] = row_types) -> str:
                expansion = next(pending[match[0]])
                row_types += [self._kinds[match[0]][1]] * expansion.num_tokens
                return expansion.text

            if isinstance(row, str):
                expanded.append(self._placeholder.sub(put, row))
            else:
                expanded.append([self._placeholder.sub(put, word) for word in row])
            types.append(np.array(row_types, np.int64))
        return expanded, types

    def _check_counts(self, rows: Sequence[Row]) -> None:
        for token, (name, _, media, per_row) in self._kinds.items():
            found = [count_token(row, token) for row in rows]
            if per_row is not None and len(per_row) == len(rows):
                for index, (placeholders, given) in enumerate(zip(found, per_row, strict=True)):
                    _check_count(f"text[{index}]", token, placeholders, name, given)
            _check_count("text", token, sum(found), name, len(media))


def count_token(row: Row, token: str) -> int:
    """How often a token is in a prompt."""
    return row.count(token) if isinstance(row, str) else sum(word.count(token) for word in row)


def _check_count(where: str, token: str, placeholders: int, name: str, given: int) -> None:
    if placeholders != given:
        raise MessageError(
            f"{where}: found {counted(placeholders, f'{token} placeholder')} and {counted(given, name)}; "
            f"expected as many placeholders as {name}s"
        )
