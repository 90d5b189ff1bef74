"""How prompts are cut into pieces for the cache."""

import dataclasses
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.generate.prefill_chunks import MAX_CHUNK, MIN_SHARED, Start, chunk_arrays, chunk_bounds, chunk_ends
from glm4v_jax.generate.slots import MIN_CAPACITY
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.vision_rows import bucket


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
