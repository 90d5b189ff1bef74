"""How prompts are cut into pieces for the cache."""

import dataclasses
import itertools

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.generate import device_steps
from glm4v_jax.generate.prefill_chunks import (
    MAX_CHUNK,
    MIN_SHARED,
    ChunkBounds,
    Start,
    chunk_arrays,
    chunk_bounds,
    chunk_ends,
)
from glm4v_jax.generate.slots import MIN_CAPACITY, Slots
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.vision_rows import bucket
from glm4v_jax.model.runtime import Runtime, random_module

CAPACITY = 4096


def make_prompt(length):
    return Prompt.of_text(np.arange(length))


@given(st.lists(st.tuples(st.integers(1, 4 * MAX_CHUNK), st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=4))
def test_pieces_fill_every_row_and_stay_within_the_cache(rows):
    starts = {
        row: Start(make_prompt(length), GenerationConfig(), limit, keep=int(share * (length - 1)))
        for row, (length, share, limit) in enumerate(rows)
    }
    capacity = bucket(max(start.capacity for start in starts.values()), MIN_CAPACITY)
    slots = np.full((len(rows), capacity), -1)
    for row, start in starts.items():
        slots[row, : start.keep] = np.arange(start.keep)
    vision = {row: np.arange(len(start.prompt)) for row, start in starts.items()}
    cuts = chunk_bounds(starts, capacity)
    for cut in cuts:
        piece = chunk_arrays(cut, starts, vision, len(rows))
        assert cut.t <= MAX_CHUNK and piece.input_ids.shape == (len(rows), cut.t)
        for row in starts:
            keep, count = piece.keep[row], int(piece.segment_ids[row].sum())
            assert keep + cut.t <= capacity and count >= 1
            # What is behind `keep` is forgotten; what is before it must be there.
            assert (slots[row, :keep] == np.arange(keep)).all()
            slots[row, keep:] = -1
            slots[row, keep : keep + count] = piece.input_ids[row, :count]
            assert (piece.vision_index[row, :count] == piece.input_ids[row, :count]).all()
            assert (piece.position_ids[:, row, :count] == piece.input_ids[row, :count]).all()
    for row, start in starts.items():
        length = len(start.prompt)
        assert (slots[row, :length] == np.arange(length)).all() and (slots[row, length:] == -1).all()
        assert cuts[-1].bounds[row][1] == length  # whose hidden state the first token comes from
    longest = max(len(start.prompt) - start.keep for start in starts.values())
    assert len(cuts) == -(-longest // MAX_CHUNK)


@given(st.integers(1, 3000), st.integers(0, 3000), st.lists(st.integers(0, 1500), max_size=4))
def test_chunks_end_where_what_follows_does_not_matter(length, more, spans):
    """After so many tokens, or where an image ends that is not far from there."""
    kinds = np.concatenate([np.full(length, -1), *(np.full(span, i) for i, span in enumerate(spans))]).astype(np.int32)
    whole = dataclasses.replace(make_prompt(len(kinds)), media=(None,) * len(spans), medium_of=kinds)
    longer = whole.extended(range(more))
    for longest in (64, 512):
        ends = chunk_ends(whole, longest)
        assert chunk_ends(longer, longest)[: len(ends)] == ends
        begins = [0, *ends]
        image_ends = set(length + np.cumsum(spans))
        for begin, end in itertools.pairwise(begins):
            assert end == begin + longest or (end in image_ends and MIN_SHARED <= end - begin < longest)
            assert not any(begin + MIN_SHARED <= other < end for other in image_ends if other > length)
        assert len(whole) - begins[-1] < longest
        assert chunk_ends(whole, longest, 160) == ([] if len(whole) <= 160 else ends)


def test_a_chunk_is_read_and_written_where_its_row_is(monkeypatch):
    """Bit for bit what it gives in a copy of its row, without the memory of one; no row changes nothing."""
    config = Glm4vConfig.tiny()
    with use_mesh():
        runtime = Runtime.of(random_module(config, seed=0, dtype="float32").unstacked())
    config = config.text_config
    row_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * CAPACITY * 4
    step, found, needed = device_steps.prefill.__wrapped__.__wrapped__, [], []
    for in_place in (False, True):
        monkeypatch.setattr(device_steps, "can_stay", lambda cache, in_place=in_place: in_place)
        jitted = jax.jit(lambda *args: step(*args), donate_argnums=1)
        programs = []

        def prefill(*args, jitted=jitted, programs=programs):
            programs[:] = programs or [jitted.lower(*args).compile()]
            return programs[0](*args)

        monkeypatch.setattr(device_steps, "prefill", prefill)
        slots = Slots(runtime, 3, CAPACITY, reuse_prefixes=False)
        slots.use_chunks(32)
        for row, prompt in {2: make_prompt(32 * 9), 0: make_prompt(64)}.items():
            slots.start({row: Start(prompt, GenerationConfig(), 2)})
        needed.append(programs[0].memory_analysis().temp_size_in_bytes)
        found.append(jax.tree.map(np.asarray, slots._state))
        with runtime.on_mesh():
            arrays = chunk_arrays(ChunkBounds(32, {}), {}, {}, 1)
            state = prefill(
                runtime.text, slots._state, np.array([-1], np.int32), arrays, slots._seen({}, 1), slots.pool.array
            )
        jax.tree.map(np.testing.assert_array_equal, found[-1], state)
    assert found[1].cache.length.tolist() == [64, 0, 32 * 9]
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert needed[1] < row_bytes < needed[0]
