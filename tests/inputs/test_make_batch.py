"""A processor's output -> a `Batch`: alignment, buckets, and which vision token goes where."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CONFIGS, Prompts

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.make_batch import MIN_LENGTH, make_batch
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.mrope import rope_index
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.vision_rows import bucket

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
ROWS = [[3, ("image", (4, 6)), 2, ("video", (2, 4, 2)), 1], [40], [("image", (2, 2)), 1, ("image", (6, 4)), 2]]

side = st.integers(1, 4).map(lambda n: 2 * n)
part = st.one_of(
    st.integers(1, 30), st.tuples(st.just("image"), st.tuples(side, side)),
    st.tuples(st.just("video"), st.tuples(st.integers(1, 3), side, side)),
)  # fmt: skip
row_lists = st.lists(st.lists(part, min_size=1, max_size=4), min_size=1, max_size=4)


def first_values(prompts):
    """What each vision token must see, in the order of the prompt: the first value of its first patch."""
    queues = [[], []]
    for queue, pixels in zip(queues, (prompts.pixel_values, prompts.pixel_values_videos), strict=True):
        queue.extend([] if pixels is None else pixels[::4, 0].tolist())
    expected = []
    for ids, real in zip(prompts.input_ids, prompts.real, strict=True):
        level = 0
        for token in ids[real]:
            level = {312: 1, 313: 0}.get(int(token), level)
            if token == CONFIG.image_token_id:
                expected.append(queues[level].pop(0))
    assert queues == [[], []]
    return expected


@settings(max_examples=50, deadline=None)
@given(rows=row_lists, padding=st.sampled_from(["left", "right"]), left_align=st.booleans(), multiple=st.integers(1, 3))
def test_any_batch(rows, padding, left_align, multiple):
    prompts = Prompts(CONFIG, rows, padding=padding)
    batch, next_position = make_batch(config=CONFIG, **prompts.inputs, left_align=left_align, batch_multiple=multiple)
    b, t = prompts.input_ids.shape
    new_b, new_t = batch.input_ids.shape
    longest = int(prompts.attention_mask.sum(axis=1).max())
    assert new_b % multiple == 0 and new_b - b < multiple and new_t == bucket(longest, MIN_LENGTH)
    assert batch.segment_ids.shape == (new_b, new_t) and batch.position_ids.shape == (3, new_b, new_t)
    assert all(x.dtype == np.int32 for x in (batch.input_ids, batch.segment_ids, batch.position_ids))
    assert not batch.segment_ids[b:].any()
    positions, _ = rope_index(
        prompts.input_ids, CONFIG, prompts.image_grid_thw, prompts.video_grid_thw, prompts.attention_mask
    )
    for i in range(b):
        real = batch.segment_ids[i] == 1
        if left_align:
            assert np.array_equal(real, np.arange(new_t) < real.sum())
        else:
            assert np.array_equal(real[:t], prompts.real[i])
        assert np.array_equal(batch.input_ids[i, real], prompts.input_ids[i, prompts.real[i]])
        assert np.array_equal(batch.position_ids[:, i, real], positions[:, i, prompts.real[i]])
        assert next_position[i] == positions[:, i, prompts.real[i]].max() + 1
    if batch.vision is None:
        assert batch.vision_index is None
        return
    assert batch.vision.patches.shape[0] % multiple == 0
    is_vision = (batch.input_ids == CONFIG.image_token_id) & (batch.segment_ids > 0)
    assert np.array_equal(batch.vision_index >= 0, is_vision)
    # Through the index, each place finds its own patch.
    firsts = batch.vision.patches.reshape(-1, batch.vision.patches.shape[-1])[::4, 0]
    assert firsts[batch.vision_index[is_vision]].tolist() == first_values(prompts)


def test_lengths_and_vision_shapes_can_be_fixed():
    prompts = Prompts(CONFIG, ROWS)
    batch, _ = make_batch(config=CONFIG, **prompts.inputs, length=100, vision_shape=(4, 96))
    assert batch.input_ids.shape == (3, 100) and batch.vision.patches.shape == (4, 96, 1176)
    with pytest.raises(MessageError, match="length: found 10; expected at least the longest prompt, 40 tokens"):
        make_batch(config=CONFIG, **prompts.inputs, length=10)


@pytest.mark.parametrize("ndim", [2, 3])
def test_positions_can_be_given(ndim):
    prompts = Prompts(CONFIG, [[5], [9]], padding="left")
    given_positions = np.random.RandomState(0).randint(0, 50, (3, 2, 9))[3 - ndim if ndim == 3 else 0 :]
    given_positions = given_positions[0] if ndim == 2 else given_positions
    batch, next_position = make_batch(config=CONFIG, **prompts.inputs, position_ids=given_positions)
    whole = np.broadcast_to(given_positions, (3, 2, 9))
    assert np.array_equal(batch.position_ids[:, 0, :5], whole[:, 0, 4:])
    assert np.array_equal(batch.position_ids[:, 1, :9], whole[:, 1])
    assert next_position.tolist() == [whole[:, 0, 4:].max() + 1, whole[:, 1].max() + 1]
    with pytest.raises(MessageError, match=r"position_ids: found shape \[3, 2, 8\]; expected \[3, 2, 9\]"):
        make_batch(config=CONFIG, **prompts.inputs, position_ids=np.zeros((3, 2, 8), int))


def test_copies_of_the_inputs_are_made():
    """Nothing that a caller goes on using is written to."""
    prompts = Prompts(CONFIG, ROWS)
    before = {name: value.copy() for name, value in prompts.inputs.items()}
    make_batch(config=CONFIG, **prompts.inputs)
    for name, value in prompts.inputs.items():
        assert np.array_equal(value, before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.ones(5, int)}, "input_ids"),
        ({"input_ids": np.ones((2, 5))}, "input_ids: found float64"),
        ({"input_ids": np.ones((0, 5), int)}, r"found int64 \[0, 5\]"),
        ({"input_ids": np.full((1, 5), 320)}, "found token 320; expected tokens from 0 to 319"),
        ({"input_ids": np.full((1, 5), -7)}, "found token -7"),
        ({"attention_mask": np.ones((1, 4), int)}, r"attention_mask: found shape \[1, 4\]; expected \[1, 5\]"),
        ({"attention_mask": np.zeros((1, 5), int)}, "a row of padding alone"),
        ({"pixel_values": np.ones((4, 1176))}, "image_grid_thw: found nothing"),
        ({"image_grid_thw": np.array([[1, 2, 2]])}, "pixel_values: found nothing"),
        ({"video_grid_thw": np.array([[1, 2, 2]])}, "pixel_values_videos: found nothing"),
        (
            {"pixel_values": np.ones((4, 588)), "image_grid_thw": np.array([[1, 2, 2]])},
            r"pixel_values: found shape \[4, 588\]; expected \[4, 1176\]",
        ),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(MessageError, match=message):
        make_batch(**{"input_ids": np.ones((1, 5), int), "config": CONFIG, **change})


parts = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=6)


def prompt_of(parts):
    """Text and images in turns: of each the number of tokens of text, and of the image after it, which is its value."""
    media, medium_of, offset_of = [], [], []
    for number, (text, value) in enumerate(parts):
        media.append(Medium(np.full((4 * value, 3), value, np.float32), np.array([1, 2, 2 * value])))
        medium_of += [-1] * text + [number] * value
        offset_of += [-1] * text + list(range(value))
    arrays = (np.array(values, np.int32) for values in (medium_of, offset_of))
    length = len(medium_of)
    return Prompt(np.zeros(length, np.int32), np.tile(np.arange(length, dtype=np.int32), (3, 1)), tuple(media), *arrays)


@given(parts, parts)
def test_prompts_share_what_is_equal_token_by_token(one, other):
    prompts = prompt_of(one), prompt_of(other)
    tokens = [
        [(p.media[m].key if m >= 0 else None, int(o)) for m, o in zip(p.medium_of, p.offset_of, strict=True)]
        for p in prompts
    ]
    equal = [a == b for a, b in zip(*tokens, strict=False)]
    assert prompts[0].common_prefix(prompts[1]) == (equal.index(False) if False in equal else len(equal))


@given(parts, st.sets(st.integers(0, 5)))
def test_vision_tokens_find_the_features_that_are_there(parts, missing):
    prompt = prompt_of(parts)
    features = {
        medium: 100 * number + np.arange(len(medium.patches) // 4)
        for number, medium in enumerate(prompt.media)
        if number not in missing
    }
    expected = [
        100 * m + o if m >= 0 and m not in missing else -1
        for m, o in zip(prompt.medium_of.tolist(), prompt.offset_of.tolist(), strict=True)
    ]
    assert prompt.vision_index(features).tolist() == expected
