"""M-RoPE positions against the reference's `get_rope_index`, and what must hold for any prompt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CONFIGS, Prompts

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.mrope import TokenIds, VisionRun, rope_index, vision_runs

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])

side = st.integers(1, 6).map(lambda n: 2 * n)
image = st.tuples(st.just("image"), st.tuples(side, side))
video = st.tuples(st.just("video"), st.tuples(st.integers(1, 4), side, side))


def rows_of(*parts):
    return st.lists(st.lists(st.one_of(st.integers(1, 9), *parts), min_size=1, max_size=5), min_size=1, max_size=4)


def ours(prompts, merge=2):
    return rope_index(
        prompts.input_ids, prompts.config, prompts.image_grid_thw, prompts.video_grid_thw,
        prompts.attention_mask, merge,
    )  # fmt: skip


@pytest.fixture(scope="module")
def get_rope_index(theirs):
    """The reference's, on NumPy arrays."""
    import torch

    def call(name, prompts):
        grids = (prompts.image_grid_thw, prompts.video_grid_thw)
        arrays = (prompts.input_ids, *grids, prompts.attention_mask)
        result = theirs(name).model.get_rope_index(*(None if x is None else torch.tensor(x) for x in arrays))
        return [x.numpy() for x in result]

    return call


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(rows=rows_of(image, video), padding=st.sampled_from(["left", "right"]))
def test_random_prompts_equal(get_rope_index, rows, padding):
    prompts = Prompts(CONFIG, rows, padding=padding)
    (positions, deltas), (expected, expected_deltas) = ours(prompts), get_rope_index("base", prompts)
    assert np.array_equal(positions, expected)
    if prompts.image_grid_thw is not None or prompts.video_grid_thw is not None:
        assert np.array_equal(deltas, expected_deltas)
    else:
        # Without grids the reference takes the largest position of padding, 1, into account: wrong for one-token rows.
        long = prompts.real.sum(axis=1) > 1
        assert np.array_equal(deltas[long], expected_deltas[long])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_prompts_without_merging_equal(get_rope_index, padding):
    config = Glm4vConfig.from_dict(CONFIGS["tester"])
    prompts = Prompts(config, [[3, ("image", (3, 5)), 2], [1, ("video", (2, 3, 1)), 4]], padding=padding)
    (positions, deltas), expected = ours(prompts, merge=1), get_rope_index("tester", prompts)
    assert np.array_equal(positions, expected[0]) and np.array_equal(deltas, expected[1])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(rows=rows_of(image, video), seed=st.integers(0, 99))
def test_properties(rows, seed):
    """Padding's side does not matter; positions do not fall behind; deltas say where the next token goes."""
    left, right = (Prompts(CONFIG, rows, padding=padding, seed=seed) for padding in ("left", "right"))
    (positions, deltas), (others, other_deltas) = ours(left), ours(right)
    for b in range(len(rows)):
        row, other = positions[:, b, left.real[b]], others[:, b, right.real[b]]
        assert np.array_equal(row, other) and deltas[b] == other_deltas[b]
        assert row[:, 0].tolist() == [0, 0, 0]
        assert deltas[b, 0] == row.max() + 1 - left.input_ids.shape[1]
        assert (np.diff(row[0]) >= 0).all()  # time never runs backwards
        tokens = left.input_ids[b, left.real[b]]
        text = tokens != CONFIG.image_token_id
        assert (row[:, text] == row[0, text]).all()
        assert len({tuple(p) for p in row.T}) == row.shape[1]  # no two tokens at one position
        alone = rope_index(tokens[None], CONFIG, *grids_of(rows, b))
        assert np.array_equal(alone[0][:, 0], row)
    assert (positions[:, ~left.real] == 1).all()


def grids_of(rows, b):
    images = [(1, *grid) for kind, grid in (p for p in rows[b] if not isinstance(p, int)) if kind == "image"]
    videos = [grid for kind, grid in (p for p in rows[b] if not isinstance(p, int)) if kind == "video"]
    return (np.array(images) if images else None), (np.array(videos) if videos else None)


def test_an_image_by_hand():
    ids = np.array([[1, 2, 310, 314, 314, 314, 314, 314, 314, 311, 5]])
    positions, deltas = rope_index(ids, CONFIG, np.array([[1, 4, 6]]))
    assert positions[0, 0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7]
    assert positions[1, 0].tolist() == [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7]
    assert positions[2, 0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    assert deltas.tolist() == [[8 - 11]] and positions.dtype == np.int32


def test_images_with_nothing_between_them():
    """The template never makes them, and the reference crashes on them (trap T14); their grids tell them apart."""
    ids = np.array([[1, 314, 314, 314, 5]])
    positions, _ = rope_index(ids, CONFIG, np.array([[1, 2, 2], [1, 2, 4]]))
    assert positions[:, 0].T.tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 2, 3], [4, 4, 4]]


def test_runs_of_vision_tokens():
    ids = TokenIds(image_token_id=9, video_start_token_id=7, video_end_token_id=8)
    tokens = np.array([9, 9, 1, 7, 9, 2, 9, 9, 8, 9, 7, 7, 8, 9])
    runs = [(0, 2, False), (4, 5, True), (6, 8, True), (9, 10, False), (13, 14, False)]
    assert vision_runs(tokens, ids) == [VisionRun(*run) for run in runs]
    assert vision_runs(np.zeros(0, int), ids) == [] and vision_runs(np.array([1, 2]), ids) == []


@pytest.mark.parametrize(
    ("images", "videos", "message"),
    [
        (None, None, "image_grid_thw: found too few images"),
        ([[1, 2, 2]], None, "video_grid_thw: found too few video frames"),
        ([[1, 2, 2], [1, 2, 2]], [[1, 2, 2]], "image_grid_thw: found 2 images; expected 1"),
        ([[1, 2, 2]], [[2, 2, 2]], "video_grid_thw: found 2 video frames; expected 1"),
        ([[1, 4, 2]], [[1, 2, 2]], "found 1 image tokens at token 1; expected 2, for the image of grid"),
    ],
)
def test_places_and_media_must_match(images, videos, message):
    ids = np.array([[310, 314, 311, 312, 310, 314, 311, 313]])
    with pytest.raises(MessageError, match=message):
        rope_index(
            ids, CONFIG, None if images is None else np.array(images), None if videos is None else np.array(videos)
        )
