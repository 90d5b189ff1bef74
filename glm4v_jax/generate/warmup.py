"""Compile ahead of the first request: every program that requests of given lengths and picture sizes will run.

Prompts, caches and vision rows have the shapes of small bucket sets (`inputs.packing`, `inputs.prepare`,
`generate.engine`). These functions list the buckets that a range of requests can reach, and `warmup` runs each once, on
zeros.
"""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from glm4v_jax import programs
from glm4v_jax.batch import VisionRows
from glm4v_jax.config import Glm4vConfig
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate import programs as generation
from glm4v_jax.generate.config import GenerationConfig
from glm4v_jax.generate.engine import MIN_CAPACITY, STEPS_PER_DISPATCH, sampling_of
from glm4v_jax.inputs.packing import MAX_ROW_LENGTH, MIN_ROW_LENGTH, bucket
from glm4v_jax.inputs.prepare import MIN_LENGTH
from glm4v_jax.mesh import data_shards, use_mesh

if TYPE_CHECKING:
    from glm4v_jax.modeling import Glm4vForConditionalGeneration


class Warmed(NamedTuple):
    """One program that `warmup` ran: name, the shape it is for, and seconds until it had run, compilation included."""

    program: str
    shape: str
    seconds: float


def buckets(low: int, high: int, minimum: int = 1) -> list[int]:
    """The buckets of all numbers from `low` to `high`, ascending."""
    found = [bucket(low, minimum)]
    while found[-1] < high:
        found.append(bucket(found[-1] + 1, minimum))
    return found


def row_shapes(low: int, high: int, row_multiple: int = 1) -> list[tuple[int, int]]:
    """The (R, L) that `inputs.packing.choose_shape` gives frames of `low` to `high` patches in all, ascending by area.

    One row as long as the bucket of the total always fits, up to `MAX_ROW_LENGTH` patches, and more rows win only where
    they are smaller together. Beyond that, and with several shards, this is a superset: it depends on the frames.
    """
    longest = bucket(high, MIN_ROW_LENGTH)
    one_row_fits = row_multiple == 1 and longest <= MAX_ROW_LENGTH
    largest = longest if one_row_fits else longest * max(2, row_multiple)
    shapes = set()
    for length in buckets(MIN_ROW_LENGTH, longest):
        for rows in buckets(1, max(1, largest // (length * row_multiple))):
            area = rows * length * row_multiple
            if not low <= area <= largest:
                continue
            as_one_row = bucket(area, MIN_ROW_LENGTH)
            if row_multiple == 1 and rows > 1 and as_one_row <= MAX_ROW_LENGTH and area >= as_one_row:
                continue
            shapes.add((rows * row_multiple, length))
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))


def cache_capacities(length: int, shortest: int, longest: int, max_new_tokens: int) -> list[int]:
    """The capacities of caches for prompts of `shortest` to `longest` tokens in the bucket `length`."""
    return buckets(max(length, shortest + max_new_tokens), max(length, longest + max_new_tokens), MIN_CAPACITY)


def warmup(
    model: "Glm4vForConditionalGeneration",
    *,
    prompt_lengths: tuple[int, int],
    vision_patches: tuple[int, int] | None = None,
    max_new_tokens: int = 128,
    batch_sizes: Sequence[int] = (1,),
) -> list[Warmed]:
    """Compile and run once what `model.generate` will need, so that no request in these ranges compiles anything.

    Args:
      model: whose programs.
      prompt_lengths: tokens of the shortest and of the longest prompt, image tokens included.
      vision_patches: patches (before merging) of the smallest and of the largest request, all its pictures and frames
        together; None for text alone.
      max_new_tokens: as requests will ask for it; it decides the size of the caches.
      batch_sizes: numbers of prompts in a request.

    Returns:
      What was run, in order.

    Raises:
      GenerationError: a range is empty or negative, or the longest prompt leaves no room for the new tokens.
    """
    _check(model.config, prompt_lengths, vision_patches, max_new_tokens, batch_sizes)
    done = []
    with use_mesh(model.mesh):
        shards = data_shards()
        features: dict[int, Array] = {}
        for shape in row_shapes(*vision_patches, shards) if vision_patches is not None else ():
            start = time.perf_counter()
            encoded = jax.block_until_ready(model.visual.encode(_empty_rows(model.config, *shape)))
            features[encoded.shape[0]] = encoded
            done.append(Warmed("encode", f"rows {list(shape)}", time.perf_counter() - start))
        for rows in sorted({shards * bucket(-(-size // shards)) for size in batch_sizes}):
            done += _warm_text(model, rows, prompt_lengths, max_new_tokens, features)
    return done


def _check(
    config: Glm4vConfig,
    prompt_lengths: tuple[int, int],
    vision_patches: tuple[int, int] | None,
    max_new_tokens: int,
    batch_sizes: Sequence[int],
) -> None:
    for name, (low, high) in (("prompt_lengths", prompt_lengths), ("vision_patches", vision_patches or (1, 1))):
        if not 1 <= low <= high:
            raise GenerationError(f"{name}: found {(low, high)}; expected (low, high) with 1 <= low <= high")
    if max_new_tokens < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise GenerationError(
            f"found max_new_tokens {max_new_tokens}, batch_sizes {batch_sizes}; expected numbers >= 1"
        )
    if (found := prompt_lengths[1] + max_new_tokens) > (limit := config.text_config.max_position_embeddings):
        raise GenerationError(f"prompt_lengths and max_new_tokens: found {found} in all; expected at most {limit}")


def _warm_text(
    model: "Glm4vForConditionalGeneration",
    rows: int,
    prompt_lengths: tuple[int, int],
    max_new_tokens: int,
    features: dict[int, Array],
) -> Iterator[Warmed]:
    """Embedding for every (B, T) alone and with every number of vision tokens, prefill and decoding for every cache."""
    text, head = model.language_model.flat, model.lm_head
    shortest, decoded = prompt_lengths[0], set()
    for length in buckets(*prompt_lengths, MIN_LENGTH):
        ids = np.zeros((rows, length), np.int32)
        for num_tokens, encoded in [(0, None), *sorted(features.items())]:
            start = time.perf_counter()
            index = None if encoded is None else np.full_like(ids, -1)
            embeds = jax.block_until_ready(programs.embed(text, ids, encoded, index))
            yield Warmed("embed", f"B {rows}, T {length}, vision tokens {num_tokens}", time.perf_counter() - start)
        for capacity in cache_capacities(length, shortest, min(length, prompt_lengths[1]), max_new_tokens):
            start = time.perf_counter()
            sampling = sampling_of(GenerationConfig(eos_token_id=()), rows)
            state = generation.prefill(
                text, head, embeds, ids, np.ones((3, rows, length), np.int32), np.ones_like(ids),
                model.language_model.init_cache(rows, capacity), np.zeros(rows, np.int32), sampling,
            )  # fmt: skip
            jax.block_until_ready(state)
            yield Warmed("prefill", f"B {rows}, T {length}, cache {capacity}", time.perf_counter() - start)
            if max_new_tokens == 1 or capacity in decoded:
                continue
            decoded.add(capacity)
            start = time.perf_counter()
            # Twice: the state that decoding returns may be laid out otherwise than the one that prefill returns.
            for _ in range(2):
                _, _, state = generation.decode(text, head, state, sampling, STEPS_PER_DISPATCH, np.int32(1))
            jax.block_until_ready(state)
            yield Warmed("decode", f"B {rows}, cache {capacity}", time.perf_counter() - start)
        shortest = length + 1


def _empty_rows(config: Glm4vConfig, rows: int, length: int) -> VisionRows:
    """Vision rows of this shape with nothing in them."""
    vision, shape = config.vision_config, (rows, length)
    return VisionRows(
        np.zeros((*shape, vision.patch_dim), np.float32),
        np.zeros(shape, np.int32),
        np.zeros((*shape, 2), np.int32),
        *(np.zeros((*shape, vision.position_grid), np.float32) for _ in range(2)),
    )
