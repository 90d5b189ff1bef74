"""Compile ahead of the first request: every program that requests of given lengths and image sizes will run.

Prefill chunks, KV caches, vision rows and feature pools have shapes from small bucket sets (`inputs.vision_waves`,
`prefill_chunks`, `slots` and `feature_pool`). These functions list the buckets that a range of requests can reach, and
run each program once, on zeros.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import rich.console
from msgspec import Meta

from glm4v_jax.config.checks import CacheDtype, Positive, checked, expectation, fault
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import data_shards, platform
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.device_steps import Variant
from glm4v_jax.generate.feature_pool import GROWTH, FeaturePool
from glm4v_jax.generate.prefill_chunks import MAX_CHUNK, MIN_LIVE_CHUNK, Start, chunk_length, longest_live_chunk
from glm4v_jax.generate.scheduler import STREAM_PERIOD
from glm4v_jax.generate.slots import MIN_CAPACITY, Slots, check_cache_dtype
from glm4v_jax.generate.token_masks import Turn
from glm4v_jax.inputs.make_batch import MIN_LENGTH
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.vision_rows import bucket, buckets
from glm4v_jax.inputs.vision_waves import wave_size
from glm4v_jax.model.runtime import HasRuntime, Runtime, runtime_of

_Pair = Annotated[tuple[Positive, Positive], Meta(description="(low, high) with 1 <= low <= high, or one number")]
_Sizes = Annotated[tuple[Positive, ...], Meta(min_length=1)]
# Decode steps that are timed, of which the fastest counts.
_TIMED = 3


def programs(has_media: bool = True) -> dict[str, str]:
    """Return the jitted functions that a request runs, in their order, and what a person calls them."""
    vision = {"encode_wave": "vision encoder", "store_features": "vision features"} if has_media else {}
    return {"init_state": "cache", **vision, "prefill": "prefill", "choose_first": "first token", "decode": "decode"}


class Warmed(NamedTuple):
    """One program that `warmup` ran: name, the shape it is for, and seconds until it had run, compilation included."""

    program: str
    shape: str
    seconds: float


def prompt_shapes(shortest: int, longest: int, max_new_tokens: int) -> list[tuple[int, int, int]]:
    """Each (chunk length, cache capacity) that prompts of such lengths need, and the length of one such prompt.

    Both only change where one of their buckets does.
    """
    edges = {shortest}
    for count in range(1, -(-longest // MAX_CHUNK) + 1):
        edges |= {count * b + 1 for b in buckets(MIN_LENGTH, MAX_CHUNK, MIN_LENGTH)}
    edges |= {b - max_new_tokens + 1 for b in buckets(MIN_CAPACITY, longest + max_new_tokens, MIN_CAPACITY)}
    shapes: dict[tuple[int, int], int] = {}
    for length in sorted(edge for edge in edges if shortest <= edge <= longest):
        shapes.setdefault((chunk_length(length), bucket(length + max_new_tokens, MIN_CAPACITY)), length)
    return [(*shape, length) for shape, length in shapes.items()]


def warmup(
    model: Runtime | HasRuntime,
    *,
    prompt_lengths: tuple[int, int] | int,
    vision_patches: tuple[int, int] | int | None = None,
    max_new_tokens: int = 128,
    batch_sizes: Sequence[int] | int = (1,),
    progress: Callable[[Warmed], None] | None = None,
    cache_dtype: CacheDtype = "auto",
    **options: Any,
) -> list[Warmed]:
    """Compile and run once what `model.generate` will need, so that no request in these ranges compiles anything.

    >>> from glm4v_jax import Glm4vConfig, Glm4vForConditionalGeneration, warmup
    >>> model = Glm4vForConditionalGeneration(Glm4vConfig.tiny(), dtype="float32")
    >>> [warmed.program for warmed in warmup(model, prompt_lengths=(1, 8), max_new_tokens=4)]
    ['prefill', 'decode']

    Args:
      model: a `Glm4vForConditionalGeneration`, or its runtime.
      prompt_lengths: tokens of the shortest and of the longest prompt, image tokens included; one number for both.
      vision_patches: patches (before merging) of the smallest image, and of all images and frames of the largest
        request together; None for text alone.
      max_new_tokens: of the requests; it decides the size of the caches.
      batch_sizes: numbers of prompts in a request.
      progress: called with each program as it has run.
      cache_dtype, **options: of the requests, as `model.generate` takes them; see `Engine.warmup`.

    Returns:
      The programs, in the order in which they ran.

    Raises:
      GenerationError: a range is empty or negative, the longest prompt leaves no room for the new tokens, or an option
        is unknown or asks for beam search.
    """
    runtime = runtime_of(model)
    check_cache_dtype(cache_dtype)
    lengths, patches, sizes = checked_ranges(
        runtime.config, prompt_lengths, vision_patches, max_new_tokens, batch_sizes
    )
    with runtime.on_mesh():
        shards = data_shards()
    config = runtime.generation_config.replace(**options)
    if config.num_beams > 1:
        raise GenerationError(fault("num_beams", config.num_beams, "1: a warm-up does not know beam search"))
    variant = Variant.of(config)
    pools = [FeaturePool(runtime)]
    while patches is not None and pools[-1].capacity < pools[0].needed(patches):
        pools.append(FeaturePool(runtime, pools[-1].capacity * GROWTH))

    def all_programs() -> Iterator[Warmed]:
        for pool in pools:
            if patches is not None:
                yield from warm_vision(pool, patches)
            for rows in sorted({shards * bucket(-(-size * config.num_return_sequences // shards)) for size in sizes}):
                # Drafts are written after the last token.
                for _, cache, length in prompt_shapes(*lengths, max_new_tokens + (variant.draft or 0)):
                    slots = Slots(runtime, rows, cache, pool=pool, variant=variant, cache_dtype=cache_dtype)
                    yield from warm_slots(slots, [length], max_new_tokens, config, together=True)

    return run_all(all_programs(), progress)


def show(warmed: Warmed) -> None:
    """Print a line on standard error."""
    rich.console.Console(stderr=True).print(
        f"{warmed.seconds:7.2f} s  {warmed.program:8} {warmed.shape}", highlight=False, markup=False
    )


def warm_vision(pool: FeaturePool, vision_patches: tuple[int, int]) -> Iterator[Warmed]:
    """Run the ViT for images and videos of `vision_patches` (fewest, most), as far as the pool can hold them."""
    shapes = [shape for shape in pool.shapes(vision_patches) if pool.holds(shape)]
    pool.prepare_shapes(shapes)
    for shape in shapes:
        start = time.perf_counter()
        pool.warm(shape)
        count = wave_size(shape, pool.shards)
        yield Warmed("encode", f"{count} x {list(shape)}, pool {pool.capacity}", time.perf_counter() - start)


def warm_slots(
    slots: Slots, lengths: Sequence[int], max_new_tokens: int, config: GenerationConfig, *, together: bool = False
) -> Iterator[Warmed]:
    """Run prefill for prompts of each length, and decoding, in the slots as they are.

    If `config` has constraints or a grammar, also what follows a prompt of a request with them.
    """
    plain = GenerationConfig()
    asking = [plain, config] if config.is_constrained else [plain]
    if slots.variant.processors:
        asking = [config]  # no request is without the functions
    ways = [(asked, turn) for asked in asking for turn in ((None,) if config.grammar is None else (None, Turn()))]
    rows = range(slots.num_rows if together else 1)
    if not together:
        slots.prepare({0: Start(Prompt.of_text([0] * lengths[-1]), asking[0], max_new_tokens)}, lengths)
    for length in lengths:
        start = time.perf_counter()
        slots.forget()
        chosen = slots.start(dict.fromkeys(rows, Start(Prompt.of_text([0] * length), asking[0], 1)), together=together)
        jax.block_until_ready(chosen)
        shape = f"B {slots.num_rows}, T {chunk_length(length)}, cache {slots.capacity}"
        yield Warmed("prefill", shape, time.perf_counter() - start)
    # The second takes what the first holds.
    pair = {row: Start(Prompt.of_text([0] * lengths[0]), asking[0], 1) for row in range(min(2, slots.num_rows))}
    if slots.reuses and not together:
        start = time.perf_counter()
        for _ in range(2):
            jax.block_until_ready(slots.start(pair))
        yield Warmed("copy", f"B {slots.num_rows}, cache {slots.capacity}", time.perf_counter() - start)
    if max_new_tokens == 1 and len(ways) == 1:
        return
    prompt = Prompt.of_text([0] * lengths[-1])
    for asked, turn in ways:
        start = time.perf_counter()
        turns = {} if turn is None else {0: turn}
        # Twice: the state that decoding returns may have another layout than the one that prefill returns.
        for _ in range(2):
            slots.forget()
            slots.start({0: Start(prompt, asked, min(3, max_new_tokens), turn=turn)}, together=together)
            for _ in range(min(2, max_new_tokens - 1)):
                slots.read(slots.decode(1, turns=turns))
        if slots.reuses and not together:
            slots.start({0: Start(prompt, asked, 1, turn=turn)})
        slots.stop(list(rows))
        shape = f"B {slots.num_rows}, cache {slots.capacity}"
        shape += (", constraints" if asked.is_constrained else "") + (", grammar" if turns else "")
        yield Warmed("decode", shape, time.perf_counter() - start)
    slots.forget()


def time_chunks(slots: Slots, lengths: Sequence[int], config: GenerationConfig) -> int:
    """Find the longest prefill chunk that takes no longer than a stream's period, or than a decode step.

    The slots are warm for prompts of these lengths, and free.
    """

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(work())
        return time.perf_counter() - start

    def prefill(length: int, limit: int = 1) -> Any:
        slots.forget()
        return slots.start({0: Start(Prompt.of_text([0] * length), plain, limit)})

    plain = config.replace(eos_token_id=-1) if slots.variant.processors else GenerationConfig()
    prefill(lengths[0], _TIMED + 1)  # a row that is done would be decoded in no time
    most = max(STREAM_PERIOD, min(seconds(lambda: slots.read(slots.decode(1))) for _ in range(_TIMED)))
    with slots.runtime.on_mesh():
        longest = longest_live_chunk(platform())
    sizes = [MIN_LENGTH << i for i in range((longest // MIN_LENGTH).bit_length())]
    chunks = [t for t in sizes if t <= lengths[-1]]
    fitting = [t for t in chunks if min(seconds(functools.partial(prefill, t)) for _ in range(2)) <= most]
    if len(fitting) == len(chunks):
        fitting = [longest]
    elif not fitting:  # a program of its own
        slots.use_chunks(MIN_LIVE_CHUNK)
        jax.block_until_ready(prefill(MIN_LIVE_CHUNK))
        fitting = [MIN_LIVE_CHUNK]
    slots.forget()
    return max(fitting)


def run_all(programs: Iterator[Warmed], progress: Callable[[Warmed], None] | None) -> list[Warmed]:
    """Run programs one by one, reporting each."""
    done = []
    for warmed in programs:
        done.append(warmed)
        if progress is not None:
            progress(warmed)
    return done


class Ranges(NamedTuple):
    """Ranges of requests: tokens of a prompt, patches of its images and videos, numbers of prompts."""

    prompt_lengths: tuple[int, int]
    vision_patches: tuple[int, int] | None
    batch_sizes: tuple[int, ...]


def checked_ranges(
    config: Glm4vConfig,
    prompt_lengths: tuple[int, int] | int,
    vision_patches: tuple[int, int] | int | None,
    max_new_tokens: int,
    batch_sizes: Sequence[int] | int = 1,
) -> Ranges:
    """Check ranges of requests; one number may stand for both ends of a range, and for one batch size.

    Raises:
      GenerationError: a range is empty or negative, or the longest prompt leaves no room for the new tokens.
    """
    checked("max_new_tokens", max_new_tokens, Positive, GenerationError)
    sizes = checked("batch_sizes", _several(batch_sizes, 1), _Sizes, GenerationError)
    lengths = _range("prompt_lengths", prompt_lengths)
    patches = None if vision_patches is None else _range("vision_patches", vision_patches)
    if (found := lengths[1] + max_new_tokens) > (limit := config.text_config.max_position_embeddings):
        raise GenerationError(f"prompt_lengths and max_new_tokens: found {found} in all; expected at most {limit}")
    return Ranges(lengths, patches, sizes)


def _range(name: str, value: Any) -> tuple[int, int]:
    low, high = checked(name, _several(value, 2), _Pair, GenerationError)
    if low > high:
        raise GenerationError(fault(name, (low, high), expectation(_Pair)))
    return low, high


def _several(value: Any, count: int) -> Any:
    """Integers of Python in the place of NumPy's; of one number as many as asked for."""
    value = np.asarray(value).tolist()
    return [value] * count if isinstance(value, int) else value
