import json
import math

import pytest
from helpers_paths import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v_jax.errors import MediaError
from glm4v_jax.inputs.vision.smart_resize import smart_resize
from tests.helpers_transformers import import_transformers

FACTS = json.loads((GOLDEN / "facts/smart_resize_4.57.1.json").read_text())
LONGEST = {"default": 28 * 28 * 15000, "ckpt": 9633792}

sides = st.integers(1, 9000)
sizes = st.tuples(sides, sides).filter(lambda size: max(size) / min(size) <= 200)


def check(expected, *size, **bounds):
    """A row of the table holds a size or the message of an error."""
    if isinstance(expected, str):
        with pytest.raises(MediaError) as caught:
            smart_resize(*size, **bounds)
        # The reference does not say whose ratio it is.
        size_of_it = f": {size[2]} x {size[1]} pixels" if "ratio" in expected else ""
        assert str(caught.value) == expected + size_of_it
    else:
        assert list(smart_resize(*size, **bounds)) == expected


@pytest.mark.parametrize(("bound", "height", "width", "expected"), FACTS["image"])
def test_images_of_the_table(bound, height, width, expected):
    if isinstance(expected, str) and min(height, width) < 28:
        # 4.57.1 refuses it; tested below.
        expected = list(smart_resize(2, 28, int(width * 28 / height), max_pixels=LONGEST[bound]))
    check(expected, 2, height, width, max_pixels=LONGEST[bound])


@pytest.mark.parametrize(("frames", "height", "width", "expected"), FACTS["video"])
def test_videos_of_the_table(frames, height, width, expected):
    check(expected, frames, height, width, max_pixels=28 * 28 * 2 * 30000)


def test_agrees_with_the_reference_on_many_sizes():
    import_transformers()
    from transformers.models.glm4v.image_processing_glm4v import smart_resize as reference

    for frames in (2, 3, 7, 40):
        for height in range(28, 2400, 151):
            for width in range(28, 2400, 113):
                assert smart_resize(frames, height, width) == reference(frames, height, width)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (1, 1), (27, 300), (300, 27), (5, 40)])
def test_a_side_under_the_factor_is_scaled_up_first(height, width):
    scale = max(28 / height, 28 / width)
    enlarged = int(height * scale), int(width * scale)
    assert smart_resize(2, height, width) == smart_resize(2, *(max(28, side) for side in enlarged))


def test_sixteen_by_sixteen_is_the_grid_of_5x():
    assert smart_resize(2, 16, 16) == (84, 84)


@settings(deadline=None)
@given(sizes, st.integers(2, 64), st.sampled_from([28, 14, 32]))
def test_sides_are_multiples_and_the_volume_is_in_bounds(size, frames, factor):
    low, high = 112 * 112, 14 * 14 * 2 * 2 * 2 * 6144
    height, width = smart_resize(frames, *size, factor=factor, min_pixels=low, max_pixels=high)
    assert height % factor == 0 and width % factor == 0 and min(height, width) >= factor
    volume = round(frames / 2) * 2 * height * width
    # Frames are counted rounded for the test of the bounds and as they are for the factor, hence frames / rounded.
    if min(height, width) > factor:
        assert volume <= high * max(1, round(frames / 2) * 2 / frames)
    assert volume >= low * min(1, round(frames / 2) * 2 / frames)


@settings(deadline=None)
@given(sizes)
def test_an_image_already_of_that_size_stays(size):
    once = smart_resize(2, *size)
    if max(once) / min(once) <= 200:
        assert smart_resize(2, *once) == once


@settings(deadline=None)
@given(st.tuples(st.integers(280, 3000), st.integers(280, 3000)).filter(lambda size: max(size) / min(size) < 10))
def test_the_aspect_ratio_changes_by_less_than_a_patch_on_each_side(size):
    height, width = smart_resize(2, *size)
    before, after = math.log(size[0] / size[1]), math.log(height / width)
    assert abs(before - after) <= math.log1p(28 / min(height, width)) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 100, 100), "t:1 must be larger than temporal_factor:2"),
        ((2, 0, 100), "must be positive"),
        ((2, 100, -3), "must be positive"),
        ((2, 28, 5628), "aspect ratio must be smaller than 200"),
        ((2, 1, 300), "aspect ratio must be smaller than 200, got 300.0: 300 x 1 pixels"),
    ],
)
def test_impossible_sizes(arguments, message):
    with pytest.raises(MediaError, match=message):
        smart_resize(*arguments)
