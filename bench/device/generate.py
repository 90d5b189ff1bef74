"""Decoding, prefill, the ViT, many requests, and the start of a process: what the engine runs on a device."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import turns
from bench.device.model import MAX_RUNS, UNSTACKED, Device, Figures, image, measured, noise, run_measured
from bench.device.work import Sizes
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.devices import mesh
from glm4v_jax.devices.compilation_cache import compile_times
from glm4v_jax.generate import device_steps
from glm4v_jax.generate.encode_media import encode_wave
from glm4v_jax.generate.engine import Engine
from glm4v_jax.generate.prefill_chunks import Start
from glm4v_jax.generate.slots import MIN_EOS, Slots
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.vision_waves import wave_rows, waves_of
from glm4v_jax.tiny import TINY_CHECKPOINT

WORDS = list("abcdefghklmnoprstuvwy")
"""Each a token, with the space before it."""
TEMPLATE = 8
"""Tokens of the template and of the image's tags."""
DRAIN = 15
"""Seconds before the end of their part in which no further request begins."""
GREEDY: dict[str, Any] = dict(do_sample=False, eos_token_id=-1)


def decode(device: Device, scheme: str = "none") -> Figures:
    """Decode steps of B rows whose caches are nearly full."""
    suffix = "" if scheme == "none" else f", {scheme}"
    for batch in device.sizes.batches:
        make = functools.partial(decoder, device, batch, scheme)
        yield run_measured(f"decode, B = {batch}{suffix}", make, device.sizes.steps)


def decoder(device: Device, batch: int, scheme: str = "none") -> Callable[[], Any]:
    """Return a dispatch of decode steps, each call with the state that the one before returned."""
    runtime, sizes = device.runtime(scheme), device.sizes
    text, head, steps = runtime.text, runtime.head, sizes.steps
    used = sizes.slots - steps * (MAX_RUNS + 3)

    @functools.partial(jax.jit, donate_argnums=0)
    def running(state: device_steps.SlotsState) -> device_steps.SlotsState:
        """The state as after a prompt of `used` tokens in every row."""

        def filled(x: Any) -> Any:
            axes = ("layers",) * (x.ndim - 4)  # none where each layer has an array of its own
            return mesh.reshard(noise(x.shape).astype(x.dtype), *axes, "batch", "kv_heads", "slots", None)

        segments = jnp.broadcast_to(jnp.arange(sizes.slots) < used, (batch, sizes.slots)).astype(jnp.int32)
        row = device_steps.RowState.free(batch, MIN_EOS)
        row = row._replace(done=~row.done, step=row.step + 1, limit=row.limit + 2**30, token=row.token + 5)
        cache = state.cache._replace(
            k=jax.tree.map(filled, state.cache.k),
            v=jax.tree.map(filled, state.cache.v),
            segments=mesh.reshard(segments, "batch", None),
            length=mesh.reshard(jnp.full(batch, used, jnp.int32), "batch"),
        )
        return state._replace(cache=cache, row=device_steps.place_row(row))

    with runtime.on_mesh():
        state = [running(device_steps.init_state(text, batch, sizes.slots, MIN_EOS, stacked=runtime.is_stacked))]

    def dispatch() -> Any:
        with runtime.on_mesh():
            bounds = np.int32(steps), np.int32(batch)
            decoded, state[0], _ = device_steps.decode(text, head, state[0], *bounds, num_steps=steps)
        return decoded.step

    return dispatch


def unstacked(device: Device) -> Figures:
    """Decode steps of a row where each layer is a module of its own, and no loop slices stacked weights."""
    make = functools.partial(decoder, device, 1, UNSTACKED)
    yield run_measured("decode, B = 1, layers one by one", make, device.sizes.steps)


def prefill(device: Device, scheme: str = "none") -> Figures:
    """Prompts of text alone, from tokens on the host to the first new token on the device."""
    suffix = "" if scheme == "none" else f", {scheme}"
    for tokens in device.sizes.prompts:
        yield run_measured(f"prefill, {tokens:,} tokens{suffix}", functools.partial(prefiller, device, tokens, scheme))
    if scheme == "none":
        tokens, chunk = device.sizes.chunked
        make = functools.partial(prefiller, device, tokens, chunk=chunk)
        yield run_measured(f"prefill, {tokens:,} tokens, chunks of {chunk:,}", make)


def prefiller(device: Device, tokens: int, scheme: str = "none", chunk: int | None = None) -> Callable[[], Any]:
    """Return the prefill of a prompt in a row alone, in chunks as the engine cuts it or of another length."""
    runtime = device.runtime(scheme)
    slots = Slots(runtime, 1, tokens, reuse_prefixes=False)
    if chunk is not None:
        slots.use_chunks(chunk)
    vocabulary = device.config.text_config.vocab_size
    ids = np.random.default_rng(0).integers(vocabulary, size=tokens - 1)  # and a slot for the new token
    start = Start(Prompt.of_text(ids), GenerationConfig(eos_token_id=(-1,)), 1)
    return lambda: slots.start({0: start})


def int8(device: Device) -> Figures:
    """Decode and prefill with all weights in int8."""
    yield from decode(device, "int8")
    yield from prefill(device, "int8")


def vision(device: Device) -> Figures:
    """The ViT, in the programs that the engine runs, of rows that are on the device."""
    runtime, config = device.runtime(), device.config.vision_config

    def encoder(count: int, height: int, width: int) -> Callable[[], Any]:
        media = [image(height, width, config.patch_dim, i) for i in range(count)]
        with runtime.on_mesh():
            place = jax.jit(lambda x: x)
            waves = [place(wave_rows(wave, config, mesh.data_shards())) for wave in waves_of(media, mesh.data_shards())]

        def run() -> Any:
            with runtime.on_mesh():
                return [encode_wave(runtime.visual, *wave) for wave in waves]

        return run

    for name, size in device.sizes.images.items():
        yield run_measured(f"ViT, {name}", functools.partial(encoder, *size))


class Questions(NamedTuple):
    """Requests of one size: random words, and an image of noise that no other request has."""

    processor: Glm4vProcessor
    sizes: Sizes

    def message(self, number: int) -> dict[str, Any]:
        """Return a message; its template and the image's tags belong to its tokens of text."""
        rng, side = np.random.default_rng(number), self.sizes.side * self.processor.image_processor.patch_size
        noise = rng.integers(0, 256, (side, side, 3), np.uint8)
        words = " ".join(rng.choice(WORDS, self.sizes.text - TEMPLATE))
        return {"role": "user", "content": [{"type": "image", "image": noise}, {"type": "text", "text": words}]}


def requests(device: Device) -> Figures:
    """`generate_many` over requests with an image each; as many as there is time for."""
    sizes = device.sizes
    asked = Questions(Glm4vProcessor.from_pretrained(TINY_CHECKPOINT), sizes)

    def measure() -> dict[str, Any]:
        engine = Engine(device.runtime(), asked.processor, num_slots=sizes.num_slots, capacity=sizes.prompt + sizes.new)
        found = engine.prompt([asked.message(0)])
        if len(found) != sizes.prompt:
            raise AssertionError(f"found a prompt of {len(found)} tokens; expected {sizes.prompt}")
        begin = time.perf_counter()
        warm = map(asked.message, range(sizes.requests, sizes.requests + 3))
        list(engine.generate_many([[one] for one in warm], max_new_tokens=min(sizes.new, 40), **GREEDY))
        first, stop, before = time.perf_counter() - begin, device.deadline - DRAIN, dataclasses.replace(engine.stats)

        def prompts() -> Iterator[Any]:
            for number in range(sizes.requests):
                if number >= sizes.num_slots and time.monotonic() > stop:
                    return
                yield [asked.message(number)]

        begin = time.perf_counter()
        with compile_times() as compiled:
            lengths = [len(one.tokens) for one in engine.generate_many(prompts(), max_new_tokens=sizes.new, **GREEDY)]
        seconds, count = time.perf_counter() - begin, len(lengths)
        if set(lengths) != {sizes.new}:
            raise AssertionError(f"found answers of {sorted(set(lengths))} tokens; expected {sizes.new}")
        busy = (engine.stats.busy_steps - before.busy_steps) / (engine.stats.slot_steps - before.slot_steps)
        note = f"{count:,} of {sizes.requests:,} requests, {sum(lengths) / seconds:,.0f} new tokens/s, busy {busy:.0%}"
        note += f", {len(compiled)} programs compiled meanwhile" if compiled else ""
        return {"seconds": seconds / count, "first": first, "runs": count, "note": note}

    yield measured("requests", measure)


def start(device: Device) -> Figures:
    """A process from its start to the first token about an image, but for making the weights.

    The parent runs it twice, in processes of their own: without compiled programs on disk, and with those of the first.
    """
    imported = time.time()

    def measure() -> dict[str, Any]:
        jax.block_until_ready(device.runtime().text.leaves)
        made = time.time()
        asked = Questions(Glm4vProcessor.from_pretrained(TINY_CHECKPOINT), device.sizes)
        engine = Engine(device.runtime(), asked.processor, num_slots=min(8, device.sizes.num_slots))
        with compile_times() as compiled:
            answer = engine.stream([asked.message(0)], max_new_tokens=device.sizes.steps, **GREEDY)
            next(answer)
            first = time.time()
            list(answer)
        weights, import_seconds = made - imported, imported - device.started
        note = f"imports {import_seconds:.1f} s, weights {weights:.1f} s (not counted), {len(compiled)} programs"
        return {"seconds": first - device.started - weights, "runs": 1, "note": note}

    yield measured("start", measure)


def profile(device: Device) -> Figures:
    """The operations that take the most time in decode steps of one row, and in a prefill."""
    tokens, _ = device.sizes.chunked
    for what, make in (
        ("decode, B = 1", lambda: decoder(device, 1)),
        (f"prefill, {tokens:,} tokens", lambda: prefiller(device, tokens)),
    ):

        def measure(make: Callable[[], Callable[[], Any]] = make) -> dict[str, Any]:
            run = make()
            for _ in range(2):
                jax.block_until_ready(run())
            return {"operations": turns.slowest(turns.xla_operations(lambda: jax.block_until_ready(run())))}

        yield measured(f"profile: {what}", measure)
