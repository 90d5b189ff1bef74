"""One prompt as generation takes it: tokens, positions, and the pictures and videos that its vision tokens stand for.

On the host, in NumPy. From here on padding, batches and turns are the engine's business.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.make_batch import checked_ids, token_ids
from glm4v_jax.inputs.mrope import TokenIds, rope_index, vision_runs
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.text.chat_template import choose_template
from glm4v_jax.inputs.text.messages import extract_media

_MEDIA = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


@dataclasses.dataclass(frozen=True, eq=False)
class Medium:
    """A picture, or a whole video, ready for the vision encoder.

    patches: float32 [t * h * w, P]; grid: int [3], (t, h, w) in patches.
    """

    patches: np.ndarray
    grid: np.ndarray

    @functools.cached_property
    def key(self) -> bytes:
        """Equal for equal content."""
        digest = hashlib.blake2b(np.asarray(self.grid, np.int64).tobytes(), digest_size=16)
        digest.update(np.ascontiguousarray(self.patches, np.float32).data)
        return digest.digest()


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens [T] of one row without padding, with everything that does not depend on the batch.

    input_ids: int32 [T].
    position_ids: int32 [3, T].
    delta: what to add to the number of tokens so far for the position of the next.
    media: pictures and videos in the order of their tokens.
    medium_of: int32 [T], the number of the medium that a vision token belongs to, -1 for text.
    offset_of: int32 [T], which of its merged tokens.
    image_sizes: (width, height) of the pictures as given, in pixels, where that is known.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    delta: int
    media: tuple[Medium, ...]
    medium_of: np.ndarray
    offset_of: np.ndarray
    image_sizes: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def extended(self, tokens: list[int]) -> Self:
        """The same prompt with more text behind it."""
        n, length = len(tokens), len(self)
        none = np.full(n, -1, np.int32)
        return dataclasses.replace(
            self,
            input_ids=np.concatenate([self.input_ids, np.asarray(tokens, np.int32)]),
            position_ids=np.concatenate(
                [self.position_ids, np.broadcast_to(length + self.delta + np.arange(n, dtype=np.int32), (3, n))], axis=1
            ),
            medium_of=np.concatenate([self.medium_of, none]),
            offset_of=np.concatenate([self.offset_of, none]),
        )

    def truncated(self, length: int) -> Self:
        """The first `length` tokens."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[:length],
            position_ids=self.position_ids[:, :length],
            medium_of=self.medium_of[:length],
            offset_of=self.offset_of[:length],
        )

    def with_image_sizes(self, image_sizes: tuple[tuple[int, int], ...]) -> Self:
        """The same prompt, with its pictures' sizes known."""
        return dataclasses.replace(self, image_sizes=image_sizes)

    def common_prefix(self, other: "Prompt") -> int:
        """How many tokens from the start are the same in both, and stand for the same parts of the same media."""
        n = min(len(self), len(other))
        equal = self.input_ids[:n] == other.input_ids[:n]
        keys = [{-1: None} | {i: medium.key for i, medium in enumerate(prompt.media)} for prompt in (self, other)]
        same = {(i, j) for i, a in keys[0].items() for j, b in keys[1].items() if a == b}
        pairs = zip(self.medium_of[:n].tolist(), other.medium_of[:n].tolist(), strict=True)
        equal &= np.fromiter((pair in same for pair in pairs), np.bool_, n)
        equal &= self.offset_of[:n] == other.offset_of[:n]
        equal &= (self.position_ids[:, :n] == other.position_ids[:, :n]).all(axis=0)
        return n if equal.all() else int(np.argmin(equal))


def prompt_of(prompt: Any, processor: Glm4vProcessor, config: Glm4vConfig) -> Prompt:
    """Make one prompt ready.

    Args:
      prompt: the user's text; or messages with `role` and `content`; or a processor's output for one prompt; or what
        this returns.
      processor, config: of the model.

    Raises:
      MessageError, MediaError: what is wrong with it.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    sizes: tuple[tuple[int, int], ...] = ()
    if not isinstance(prompt, Mapping):
        text = processor.apply_chat_template(prompt, add_generation_prompt=True)
        if not isinstance(text, str):
            raise MessageError(f"found {len(text)} conversations; expected one")
        media = processor.prepare_media(*extract_media(prompt, choose_template(processor.chat_template)))
        prompt, sizes = processor.assemble([text], media), media.image_sizes
    prompts = prompts_of(prompt, config)
    if len(prompts) != 1:
        raise MessageError(f"input_ids: found {len(prompts)} prompts; expected one")
    return prompts[0].with_image_sizes(sizes)


def prompts_of(
    inputs: Mapping[str, Any], config: Glm4vConfig, media: tuple[list[Medium], list[Medium]] | None = None
) -> list[Prompt]:
    """The rows of a processor's output.

    Args:
      inputs: `input_ids` int [B, T], and if need be mask, pixel values and grids.
      config: of the model.
      media: all pictures and all videos, in place of those of `inputs`.

    Raises:
      MessageError: a shape is wrong, tokens are outside the vocabulary, or media do not match the tokens.
    """
    if "input_ids" not in inputs:
        raise MessageError(f"input_ids: found nothing, only {', '.join(map(str, inputs)) or 'an empty mapping'}")
    input_ids, mask = checked_ids(inputs["input_ids"], inputs.get("attention_mask"), config)
    media = media_of(inputs, config) if media is None else media
    ids, merge = token_ids(config), config.vision_config.spatial_merge_size
    grids = [np.array([medium.grid for medium in kind]).reshape(-1, 3) for kind in media]
    positions, deltas = rope_index(input_ids, ids, grids[0], grids[1], mask, merge)
    queues = {False: iter(media[0]), True: iter(media[1])}
    return [
        Prompt(
            row[kept].astype(np.int32),
            positions[:, b, kept],
            int(deltas[b, 0]) + len(row) - int(kept.sum()),
            *_places(row[kept], ids, queues, merge),
        )
        for b, (row, kept) in enumerate(zip(input_ids, mask, strict=True))
    ]


def _places(
    tokens: np.ndarray, ids: TokenIds, queues: Mapping[bool, Iterator[Medium]], merge: int
) -> tuple[tuple[Medium, ...], np.ndarray, np.ndarray]:
    """`media`, `medium_of` and `offset_of` of a row; takes its media off the queues."""
    media: list[Medium] = []
    medium_of, offset_of = (np.full(len(tokens), -1, np.int32) for _ in range(2))
    open_medium = {False: (-1, 0, 0), True: (-1, 0, 0)}  # its number, its merged tokens, how many have a place
    for run in vision_runs(tokens, ids):
        start = run.start
        while start < run.stop:
            number, size, taken = open_medium[run.is_video]
            if taken == size:
                media.append(next(queues[run.is_video]))
                number, size, taken = len(media) - 1, int(np.prod(media[-1].grid)) // merge**2, 0
            n = min(run.stop - start, size - taken)
            medium_of[start : start + n] = number
            offset_of[start : start + n] = taken + np.arange(n)
            open_medium[run.is_video] = number, size, taken + n
            start += n
    return tuple(media), medium_of, offset_of


def media_of(inputs: Mapping[str, Any], config: Glm4vConfig) -> tuple[list[Medium], list[Medium]]:
    """Pictures and videos of a processor's output.

    Raises:
      MessageError: pixel values and grids do not match.
    """
    found: list[list[Medium]] = []
    for name, grid_name in _MEDIA:
        values, grids = inputs.get(name), inputs.get(grid_name)
        if (values is None) != (grids is None):
            missing, given = (name, grid_name) if values is None else (grid_name, name)
            raise MessageError(f"{missing}: found nothing; expected it beside {given}")
        if values is None or grids is None:
            found.append([])
            continue
        values, grids = np.asarray(values), np.asarray(grids, np.int64).reshape(-1, 3)
        sizes = grids.prod(axis=1)
        expected = [int(sizes.sum()), config.vision_config.patch_dim]
        if list(values.shape) != expected:
            raise MessageError(f"{name}: found shape {list(values.shape)}; expected {expected}, as {grid_name} counts")
        parts = np.split(values, np.cumsum(sizes)[:-1])
        found.append([Medium(part, grid) for part, grid in zip(parts, grids, strict=True)])
    return found[0], found[1]
