"""Frames into rows: nothing lost, nothing mixed, few shapes, little padding; and the weights of the position table."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.vision_rows import (
    MAX_ROW_LENGTH,
    MIN_ROW_LENGTH,
    FirstFit,
    bicubic_weights,
    bucket,
    buckets,
    choose_shape,
    first_fit,
    fits,
    merge_order,
    pack,
    padded_share,
)

sides = st.integers(1, 12).map(lambda n: 2 * n)
frame_lists = st.lists(st.tuples(sides, sides), min_size=1, max_size=12)


def members(limit):
    return sorted({1 << k for k in range(limit.bit_length())} | {3 << k for k in range(limit.bit_length() - 1)})


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_buckets_are_the_next_member(n, minimum):
    minimum = bucket(minimum)
    found = bucket(n, minimum)
    assert found == min(m for m in members(2**21) if m >= max(n, minimum))
    assert found < 1.5 * max(n, minimum) or n <= 2


@given(st.integers(1, 5000), st.integers(0, 5000), st.sampled_from([1, 32, 128]))
def test_buckets_are_those_of_all_numbers_in_between(low, extra, minimum):
    assert buckets(low, low + extra, minimum) == sorted({bucket(n, minimum) for n in range(low, low + extra + 1)})


def media_of_frames(pixels, frames):
    """An image of each frame (height, width), from patches one after another."""
    parts = np.split(pixels, np.cumsum([h * w for h, w in frames])[:-1])
    return [Medium(part, np.array([1, h, w])) for part, (h, w) in zip(parts, frames, strict=True)]


@given(frame_lists, st.sampled_from([1, 2, 4]))
def test_shapes_come_from_a_small_set(frames, shards):
    lengths = [h * w for h, w in frames]
    rows, length = choose_shape(lengths, shards)
    assert rows % shards == 0 and rows // shards in members(64) and length in members(2 * MAX_ROW_LENGTH)
    assert length >= max(MIN_ROW_LENGTH, max(lengths)) and rows * length >= sum(lengths)


def test_rows_longer_than_the_limit_hold_one_huge_frame():
    assert choose_shape([24_576])[1] == 24_576
    assert choose_shape([2_000] * 30)[1] <= MAX_ROW_LENGTH


@settings(max_examples=60, deadline=None)
@given(frame_lists, st.sampled_from([1, 2]), st.integers(0, 2**16))
def test_every_patch_arrives_once(frames, shards, seed):
    """Each frame is in one row, in order, alone in its segment, at a multiple of the merge block."""
    patches = sum(h * w for h, w in frames)
    pixels = np.random.RandomState(seed).standard_normal((patches, 3)).astype(np.float32)
    media = media_of_frames(pixels, frames)
    rows, features = pack(media, merge_size=2, position_grid=5, row_multiple=shards)
    num_rows, length = rows.segment_ids.shape
    assert num_rows % shards == 0
    assert (rows.segment_ids > 0).sum() == patches
    start = 0
    for number, (h, w) in enumerate(frames, start=1):
        at = np.argwhere(rows.segment_ids == number)
        assert len(at) == h * w and len(set(at[:, 0])) == 1  # one row
        row, first = at[0]
        assert first % 4 == 0 and np.array_equal(at[:, 1], first + np.arange(h * w))
        here = (row, slice(first, first + h * w))
        assert np.array_equal(rows.patches[here], pixels[start : start + h * w])
        assert np.array_equal(rows.coords[here], merge_order(h, w, 2))
        assert np.array_equal(rows.weights_h[here], bicubic_weights(h, 5)[rows.coords[here][:, 0]])
        assert np.array_equal(rows.weights_w[here], bicubic_weights(w, 5)[rows.coords[here][:, 1]])
        merged = features[media[number - 1]]
        assert np.array_equal(merged, (row * length + first) // 4 + np.arange(h * w // 4))
        start += h * w
    for padding in (rows.patches, rows.coords, rows.weights_h, rows.weights_w):
        assert not padding[rows.segment_ids == 0].any()
    assert padded_share(rows) == pytest.approx(1 - patches / (num_rows * length))


def test_one_shape_can_be_forced():
    media = media_of_frames(np.ones((28, 3), np.float32), [(4, 6), (2, 2)])
    for shape in ((1, 64), (3, 24), (2, 28)):
        rows, _ = pack(media, merge_size=2, position_grid=5, shape=shape)
        assert rows.segment_ids.shape == shape and (rows.segment_ids > 0).sum() == 28
    with pytest.raises(ValueError, match="do not fit 1 x 24"):
        pack(media, merge_size=2, position_grid=5, shape=(1, 24))


def test_frames_of_a_video_are_packed_one_by_one():
    patches = np.random.RandomState(0).standard_normal((3 * 16, 3)).astype(np.float32)
    video = Medium(patches, np.array([3, 2, 8]))
    rows, features = pack([video], merge_size=2, position_grid=5, shape=(2, 32))
    assert video.frames.tolist() == [[2, 8]] * 3
    assert [(rows.segment_ids == number).sum() for number in (1, 2, 3)] == [16, 16, 16]
    assert np.array_equal(rows.patches.reshape(-1, 4 * 3)[features[video]], patches.reshape(-1, 4 * 3))


def test_padding_stays_low():
    """Random mixes of images and video frames of real sizes: a quarter at most on average, as announced."""
    random = np.random.RandomState(0)
    padded = total = 0
    for _ in range(60):
        frames = [2 * random.randint(4, 40, 2) for _ in range(random.randint(1, 9))]
        lengths = [int(h * w) for h, w in frames]
        rows, length = choose_shape(lengths)
        padded, total = padded + rows * length - sum(lengths), total + rows * length
    assert padded / total <= 0.25


def test_merge_order_of_a_small_grid():
    assert merge_order(2, 4, 2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert merge_order(2, 2, 1).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("source", [1, 5, 7, 24])
@pytest.mark.parametrize("target", [1, 2, 5, 24, 34, 146])
def test_bicubic_weights_equal_grid_sample(source, target):
    """One axis at a time: the weights that torch gives an identity table, taps beyond the border among them."""
    torch = pytest.importorskip("torch")
    coordinate = ((torch.arange(target, dtype=torch.float32) + 0.5) / target) * 2 - 1
    table = torch.eye(source).reshape(1, source, 1, source)  # [1, channels = entry, 1, source]
    grid = torch.stack((coordinate, torch.zeros(target)), dim=-1).reshape(1, 1, target, 2)
    expected = torch.nn.functional.grid_sample(
        table, grid, mode="bicubic", align_corners=False, padding_mode="border"
    )[0, :, 0].T  # fmt: skip
    found = bicubic_weights(target, source)
    # Coordinates of 146 samples round to 2^-17, which the cubic's slope of at most 1.5 passes on.
    np.testing.assert_allclose(found, expected.numpy(), atol=4e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("grid", [(6, 4), (24, 24), (46, 34), (2, 50)])
def test_two_axes_equal_grid_sample(grid):
    torch = pytest.importorskip("torch")
    h, w = grid
    table = np.random.RandomState(0).standard_normal((24, 24, 6)).astype(np.float32)
    found = np.einsum("yi,xj,ijd->yxd", bicubic_weights(h, 24), bicubic_weights(w, 24), table)
    norm_h, norm_w = (((torch.arange(n, dtype=torch.float32) + 0.5) / n) * 2 - 1 for n in grid)
    sample = torch.stack(torch.meshgrid(norm_h, norm_w, indexing="ij")[::-1], dim=-1)[None]
    expected = torch.nn.functional.grid_sample(
        torch.tensor(table).permute(2, 0, 1)[None], sample, mode="bicubic", align_corners=False, padding_mode="border"
    )
    np.testing.assert_allclose(found, expected[0].permute(1, 2, 0).numpy(), atol=1e-5 * np.abs(table).max())


def test_weights_of_the_same_size_are_the_identity():
    assert np.array_equal(bicubic_weights(1, 1), [[1]])
    np.testing.assert_allclose(bicubic_weights(24, 24), np.eye(24), atol=1e-5)


items = st.lists(st.integers(0, 12), min_size=1, max_size=40)


@given(items, st.integers(1, 9), st.sampled_from([None, 1, 3]))
def test_items_go_to_the_first_row_with_room(lengths, count, per_row):
    rows, used, counts = FirstFit(count, 10, per_row), [0] * count, [0] * count
    for length in lengths:
        room = [row for row in range(count) if used[row] + length <= 10 and counts[row] != per_row]
        assert rows.has_room(length) == bool(room)
        if not room:
            assert rows.add(length) is None
            continue
        row = room[0]
        counts[row] += 1
        assert rows.add(length) == (row, used[row], counts[row])
        used[row] += length


@given(items, st.integers(1, 9))
def test_frames_fit_where_they_have_places(lengths, rows):
    places = first_fit(sorted(lengths, reverse=True), 12)
    assert fits(lengths, (rows, 12)) == (max(place.row for place in places) < rows)
    assert not fits([*lengths, 13], (rows, 12)) and fits([], (rows, 12))
