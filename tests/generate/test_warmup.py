"""Warm-up knows every shape that a request can have, and leaves nothing to compile."""

import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_jax import Glm4vConfig, Glm4vForConditionalGeneration
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.devices.program_limit import COMPILED
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.device_steps import Variant
from glm4v_jax.generate.prefill_chunks import chunk_length
from glm4v_jax.generate.slots import MIN_CAPACITY
from glm4v_jax.generate.warmup import prompt_shapes, time_chunks, warmup
from glm4v_jax.inputs.vision_rows import bucket


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 600))
def test_prompt_shapes_are_those_of_all_lengths(shortest, extra, new_tokens):
    found = prompt_shapes(shortest, shortest + extra, new_tokens)
    expected = {(chunk_length(n), bucket(n + new_tokens, MIN_CAPACITY)) for n in range(shortest, shortest + extra + 1)}
    assert {shape[:2] for shape in found} == expected and len(found) == len(expected)
    for piece, capacity, length in found:
        assert (piece, capacity) == (chunk_length(length), bucket(length + new_tokens, MIN_CAPACITY))


@pytest.fixture(scope="module")
def model():
    return Glm4vForConditionalGeneration(Glm4vConfig.tiny())


def request(model, seed, text, grids):
    """A prompt with pictures of these grids, as a processor would make it."""
    config, rng = model.config, np.random.default_rng(seed)
    ids = list(rng.integers(0, 300, text))
    for h, w in grids:
        ids += [config.image_start_token_id, *[config.image_token_id] * (h * w // 4), config.image_end_token_id]
    inputs = {"input_ids": np.array([ids])}
    if grids:
        patches = rng.standard_normal((sum(h * w for h, w in grids), config.vision_config.patch_dim), np.float32)
        inputs |= {"pixel_values": patches, "image_grid_thw": np.array([(1, h, w) for h, w in grids])}
    return inputs


@pytest.mark.slow
def test_requests_after_warmup_compile_nothing(model):
    compiled = []

    def hear(event, duration, **details):
        if event == COMPILED:
            compiled.append(details.get("fun_name"))

    done = warmup(model, prompt_lengths=(1, 32), vision_patches=(4, 128), max_new_tokens=20)
    assert [line.program for line in done] == [*["encode"] * 5, "prefill", "decode"]
    assert all(line.seconds > 0 for line in done)
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        for seed, (text, grids) in enumerate([(3, []), (32, []), (2, [(4, 4)]), (5, [(2, 6), (6, 4)]), (1, [(8, 8)])]):
            ids = model.generate(**request(model, seed, text, grids), max_new_tokens=20, eos_token_id=-1)
            assert ids.shape[1] >= 20
        assert compiled == []
        # The listener does hear.
        jax.jit(lambda x: 3 - x)(np.arange(3))
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


class TimedSlots:
    """Slots whose prefill and decode steps take a time of their own, in seconds."""

    variant = Variant()

    def __init__(self, runtime, token, step):
        self.runtime, self.token, self.step = runtime, token, step
        self.now, self.left, self.chunks = 0.0, 0, []

    def forget(self):
        self.left = 0

    def use_chunks(self, longest):
        self.chunks.append(longest)

    def start(self, starts):
        [start] = starts.values()
        self.left = start.limit - 1
        self.now += self.token * len(start.prompt)

    def decode(self, limit):
        steps = min(limit, self.left)
        self.left -= steps
        self.now += self.step * steps

    def read(self, decoded):
        return decoded


@pytest.mark.parametrize(
    ("token", "step", "chunk", "others"),
    [(1e-3, 0.01, 32, []), (1e-3, 0.07, 64, []), (1e-3, 0.2, 128, []), (4e-3, 0.07, 16, [16])],
)
def test_a_prefill_chunk_takes_no_longer_than_a_decode_step(model, monkeypatch, token, step, chunk, others):
    """Or than 50 ms; where 32 tokens do, there is one more program."""
    slots = TimedSlots(model.runtime, token, step)
    monkeypatch.setattr("glm4v_jax.generate.warmup.time", types.SimpleNamespace(perf_counter=lambda: slots.now))
    assert time_chunks(slots, [32, 48, 64, 96, 128], GenerationConfig()) == chunk
    assert slots.chunks == others


def test_options_that_need_more_rows_and_slots_get_them(model, monkeypatch):
    warmed = []
    monkeypatch.setattr(
        "glm4v_jax.generate.warmup.warm_slots",
        lambda slots, *_, **__: warmed.append((slots.num_rows, slots.capacity)) or iter(()),
    )
    lookup = dict(prompt_lookup_num_tokens=7)
    copies = dict(num_return_sequences=3, do_sample=True)
    for options in ({}, lookup, copies):
        warmup(model, prompt_lengths=np.int64(40), max_new_tokens=20, batch_sizes=2, **options)
    # 40 + 20 fit 64 slots, and 7 more do not; as in a request.
    assert warmed == [(2, 64), (2, 96), (6, 64)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt_lengths=(9, 8)), r"prompt_lengths: found \(9, 8\)"),
        (dict(prompt_lengths=(0, 8)), r"prompt_lengths: found \[0, 8\]"),
        (dict(prompt_lengths=(1, 8), vision_patches=(0, 4)), r"vision_patches: found \[0, 4\]"),
        # One number is both ends of a range.
        (dict(prompt_lengths=0), r"prompt_lengths: found \[0, 0\]"),
        (dict(prompt_lengths=8, vision_patches=0), r"vision_patches: found \[0, 0\]"),
        (dict(prompt_lengths=8, batch_sizes=0), r"batch_sizes: found \[0\]"),
        (dict(prompt_lengths="8"), r"prompt_lengths: found '8'; expected \(low, high\) with 1 <= low <= high, or one"),
        (dict(prompt_lengths=(1, 2, 3)), r"prompt_lengths: found \[1, 2, 3\]; expected \(low, high\)"),
        (dict(prompt_lengths=(1, 8), max_new_tokens=0), "max_new_tokens: found 0"),
        (dict(prompt_lengths=(1, 8), batch_sizes=()), r"batch_sizes: found \[\]"),
        (dict(prompt_lengths=8, num_beams=2, do_sample=False), "num_beams: found 2; expected 1: a warm-up does not"),
        (dict(prompt_lengths=(1, 32700), max_new_tokens=69), "found 32769 in all; expected at most 32768"),
    ],
)
def test_impossible_ranges_are_refused(model, options, message):
    with pytest.raises(GenerationError, match=message):
        warmup(model, **options)
