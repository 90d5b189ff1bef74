import io
import json

import numpy as np
import PIL.Image
import pytest
from helpers_media import package_file
from helpers_paths import GOLDEN

from glm4v_jax.errors import CheckpointError, ConfigError, MediaError
from glm4v_jax.inputs.batch_feature import BatchFeature, check_return_tensors
from glm4v_jax.inputs.media.threads import map_threads
from glm4v_jax.inputs.vision import image as image_module
from glm4v_jax.inputs.vision.antialias import resize_bytes
from glm4v_jax.inputs.vision.image import Glm4vImageProcessor, Glm4vImageProcessorFast
from tests.helpers_transformers import import_transformers

RNG = np.random.default_rng(7)
CHECKPOINT = GOLDEN / "checkpoint"
PROCESSORS = [Glm4vImageProcessor, Glm4vImageProcessorFast]


def shipped(package: str, *parts: str) -> PIL.Image.Image:
    return PIL.Image.open(package_file(package, *parts))


def photo(height=90, width=130, channels=3, kind=np.uint8):
    """Smooth shapes with some noise: neither a flat nor a random image."""
    rows, columns = np.mgrid[:height, :width]
    waves = [
        np.sin(rows / (5 + c)) + np.cos(columns / (9 - c)) + RNG.normal(0, 0.1, rows.shape) for c in range(channels)
    ]
    scaled = np.clip(np.stack(waves, axis=-1) * 60 + 128, 0, 255).astype(np.uint8)
    return scaled if kind == np.uint8 else (scaled / 255).astype(kind)


def reference_of(cls, **settings):
    return getattr(import_transformers(), cls.__name__)(**settings)


def run_reference(processor, images, **kwargs):
    result = processor(images, **kwargs)
    values, grids = result["pixel_values"], result["image_grid_thw"]
    return np.asarray(values), np.asarray(grids)


def check_equal(cls, images, settings=None, **kwargs):
    """The bytes of the result equal the reference's, converted to float32 where it left bytes or float64."""
    values, grids = run_reference(reference_of(cls, **(settings or {})), images, **kwargs)
    result = cls(**(settings or {}))(images, **kwargs)
    assert result.pixel_values.dtype == np.float32 and result.image_grid_thw.dtype == np.int64
    np.testing.assert_array_equal(result.image_grid_thw, grids)
    np.testing.assert_array_equal(result.pixel_values, values.astype(np.float32))


# Against golden numbers.


def test_chelsea_has_the_published_numbers():
    crop = shipped("skimage", "data/chelsea.png").crop((10, 20, 343, 237))
    result = Glm4vImageProcessor()(crop)
    assert result.image_grid_thw.tolist() == [[1, 16, 24]]
    expected = [
        [0.79165900, 0.77706057, 0.74786371],
        [0.51428890, 0.48509204, 0.45589519],
        [0.89384794, 0.89384794, 0.87924951],
        [0.70406842, 0.66027313, 0.63107628],
        [-0.02585294, -0.04045137, 0.01794233],
        [0.06173760, -0.02585294, -0.06964822],
    ]
    np.testing.assert_allclose(result.pixel_values[:6, :3], expected, atol=5e-9)
    assert result.pixel_values.mean(dtype=np.float64) == pytest.approx(-0.08399576, abs=1e-8)
    assert result.pixel_values.std(dtype=np.float64) == pytest.approx(0.5732586, abs=1e-7)
    assert result.pixel_values.sum(dtype=np.float64) == pytest.approx(-37931.1417, abs=1e-4)


# Against the reference, bit for bit.


@pytest.mark.parametrize("cls", PROCESSORS)
@pytest.mark.parametrize("longest", [9633792, 100_000])
def test_real_photographs(cls, longest):
    images = [
        shipped("skimage", "data/chelsea.png"),
        shipped("skimage", "data/camera.png"),
        shipped("skimage", "data/rocket.jpg"),
        shipped("sklearn", "datasets/images/china.jpg"),
    ]
    check_equal(cls, images, {"size": {"shortest_edge": 12544, "longest_edge": longest}})


@pytest.mark.parametrize("cls", PROCESSORS)
@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"patch_size": 8, "merge_size": 3},
        {"temporal_patch_size": 3},
        {"temporal_patch_size": 1},
        {"resample": PIL.Image.Resampling.BILINEAR},
        {"resample": PIL.Image.Resampling.NEAREST},
        {"size": {"shortest_edge": 200_000, "longest_edge": 400_000}},
        {"do_convert_rgb": False},
    ],
    ids=str,
)
def test_every_setting_at_construction_and_in_a_call(cls, settings):
    images = [PIL.Image.fromarray(photo()), photo(61, 57)]
    check_equal(cls, images, settings)
    check_equal(cls, images, None, **settings)
    defaults = cls()(images).pixel_values
    if settings != {"do_convert_rgb": False}:
        assert not np.array_equal(cls(**settings)(images).pixel_values, defaults), "the setting had no effect"


@pytest.mark.parametrize("cls", PROCESSORS)
def test_without_resizing(cls):
    check_equal(cls, [photo(56, 84), photo(28, 28)], None, do_resize=False)
    with pytest.raises(MediaError, match="image 1: has 90 x 130 pixels; without do_resize, expected multiples of 28"):
        cls(do_resize=False)([photo(56, 84), photo()])


@pytest.mark.parametrize("cls", PROCESSORS)
def test_layouts_and_nesting(cls):
    base = photo()
    for images in (
        base,
        base.transpose(2, 0, 1),
        np.stack([base, base[::-1]]),
        [np.stack([base, base[::-1]]), np.stack([base])],
        [[base, base[:80]], [], [base[:, :70]]],
        [PIL.Image.fromarray(base)] * 3,
    ):
        check_equal(cls, images)
    check_equal(cls, base, None, input_data_format="channels_last")
    check_equal(cls, base.transpose(2, 0, 1), None, input_data_format="channels_first")
    np.testing.assert_array_equal(
        cls()([base, base.transpose(2, 0, 1)]).pixel_values[0::1], cls()([base, base]).pixel_values
    )


@pytest.mark.parametrize("cls", PROCESSORS)
def test_four_channels(cls):
    check_equal(
        cls,
        [photo(70, 90, channels=4)] * 2,
        {"image_mean": [0.5, 0.4, 0.3, 0.2], "image_std": [0.1, 0.2, 0.3, 0.4]},
        input_data_format="channels_last",
    )


def test_the_slow_one_in_either_data_format():
    for data_format in ("channels_first", "channels_last"):
        check_equal(Glm4vImageProcessor, photo(), None, data_format=data_format)
    with pytest.raises(ConfigError, match="Only channel first"):
        Glm4vImageProcessorFast()(photo(), data_format="channels_last")


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("do_rescale", [True, False])
def test_slow_images_in_unit_range(kind, do_rescale):
    check_equal(Glm4vImageProcessor, photo(kind=kind), None, do_rescale=do_rescale)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float32, np.uint16])
def test_slow_images_of_bytes_in_other_types(kind):
    check_equal(Glm4vImageProcessor, photo().astype(kind))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_fast_images_in_unit_range(kind):
    """Floats are resized by Pillow here and by torch there, both in float32: equal to rounding."""
    images = photo(kind=kind)
    values, _ = run_reference(reference_of(Glm4vImageProcessorFast), images, do_rescale=False)
    np.testing.assert_allclose(
        Glm4vImageProcessorFast()(images, do_rescale=False).pixel_values, values, atol=1e-5, rtol=0
    )


def test_fast_images_of_one_channel_spread_over_the_means():
    grey = photo(channels=1)
    check_equal(Glm4vImageProcessorFast, grey)
    check_equal(Glm4vImageProcessorFast, grey[:, :, 0][None])
    np.testing.assert_array_equal(
        Glm4vImageProcessorFast()(grey[:, :, 0], input_data_format="none").pixel_values,
        Glm4vImageProcessorFast()(grey).pixel_values,
    )


def test_slow_images_of_one_channel_need_one_mean():
    grey = photo(channels=1)
    check_equal(Glm4vImageProcessor, grey, None, image_mean=0.5, image_std=0.5)
    message = r"image 0: image_mean must have 1 elements .* got 3.* image has 1 channel; .* convert the image to RGB"
    with pytest.raises(MediaError, match=message):
        Glm4vImageProcessor()(grey)
    result = Glm4vImageProcessor()(grey[:, :, 0], input_data_format="none", image_mean=0.5, image_std=0.5)
    assert result.pixel_values.shape == (result.image_grid_thw.prod(), 1 * 2 * 14 * 14)


@pytest.mark.parametrize("cls", PROCESSORS)
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "F"])
def test_pillow_modes_follow_the_processors_path(cls, mode):
    image = PIL.Image.fromarray(photo(channels=1)[:, :, 0].astype(np.uint16) * 200) if mode == "I;16" else None
    image = image or PIL.Image.fromarray(photo()).convert(mode)
    check_equal(cls, [image, image])


def test_exif_turns_files_and_not_pillow_images(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    PIL.Image.fromarray(photo(56, 112)).save(path, exif=exif)
    assert Glm4vImageProcessor()(path).image_grid_thw.tolist() == [[1, 8, 4]]
    assert Glm4vImageProcessor()(PIL.Image.open(path)).image_grid_thw.tolist() == [[1, 4, 8]]
    check_equal(Glm4vImageProcessor, [str(path)])
    check_equal(Glm4vImageProcessor, PIL.Image.open(path))


def test_a_side_under_28_pixels_is_scaled_up():
    assert Glm4vImageProcessor()(photo(16, 16)).image_grid_thw.tolist() == [[1, 6, 6]]


def test_three_rows_of_pixels_are_not_taken_for_channels():
    assert Glm4vImageProcessor()(PIL.Image.fromarray(photo(3, 50))).image_grid_thw[0, 2] > 6


@pytest.mark.parametrize(
    "resample", [PIL.Image.Resampling.BICUBIC, PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.LANCZOS]
)
@pytest.mark.parametrize("size", [(28, 700), (392, 84), (131, 97), (90, 130), (7, 5)])
def test_resizing_of_bytes_equals_torchvision(resample, size):
    import_transformers()
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    modes = {2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC, 1: InterpolationMode.LANCZOS}
    for pixels in (photo(), RNG.integers(0, 2, (90, 130, 3), dtype=np.uint8) * 255):
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        expected = resize(tensor, list(size), interpolation=modes[int(resample)], antialias=True)
        np.testing.assert_array_equal(resize_bytes(pixels, *size, resample), expected.permute(1, 2, 0).numpy())


# What the fast processor accepts and does not use.


def test_crop_and_padding_have_no_effect_as_in_the_reference(caplog):
    extra = {
        "do_center_crop": True,
        "crop_size": {"height": 20, "width": 20},
        "do_pad": True,
        "pad_size": {"height": 999, "width": 999},
        "default_to_square": False,
        "disable_grouping": True,
    }
    check_equal(Glm4vImageProcessorFast, photo(), None, **extra)
    assert "`do_center_crop` has no effect" in caplog.text and "`do_pad` has no effect" in caplog.text
    with pytest.raises(ConfigError, match="`crop_size` must be specified"):
        Glm4vImageProcessorFast()(photo(), do_center_crop=True)


def test_unknown_arguments(caplog):
    with pytest.raises(TypeError, match="colour"):
        Glm4vImageProcessor()(photo(), colour="red")
    Glm4vImageProcessorFast()(photo(), colour="red")
    assert "Unused or unrecognized kwargs: colour" in caplog.text


# What wrong input gets.


@pytest.mark.parametrize("cls", PROCESSORS)
@pytest.mark.parametrize("value", ["pt", "tf", "jax", "pytorch"])
def test_tensors_of_other_libraries(cls, value):
    with pytest.raises(ValueError, match="numpy arrays are always returned"):
        cls()(photo(), return_tensors=value)
    assert isinstance(cls()(photo(), return_tensors="np").pixel_values, np.ndarray)


def test_devices():
    with pytest.raises(ValueError, match="device='cuda' is not supported"):
        Glm4vImageProcessorFast()(photo(), device="cuda")
    with pytest.raises(ValueError, match="device='cpu' is not supported"):
        Glm4vImageProcessorFast(device="cpu")


@pytest.mark.parametrize("cls", PROCESSORS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 10, "width": 10}}, "size must contain 'shortest_edge' and 'longest_edge' keys"),
        ({"size": {"shortest_edge": 10}}, "size must contain"),
        ({"size": 448}, "size must contain"),
        ({"size": {"shortest_edge": 10, "longest_edge": 5}}, "expected shortest_edge of at most longest_edge"),
        ({"patch_size": 0}, "patch_size: found 0; expected an integer from 1"),
        ({"merge_size": "2"}, "merge_size: found '2'"),
        ({"temporal_patch_size": -1}, "temporal_patch_size: found -1"),
        ({"image_std": [0.1, 0.0, 0.1]}, "image_std: found .*; expected a number other than zero"),
        ({"image_mean": ["a", 1, 2]}, "image_mean: found"),
        ({"image_mean": [0.1] * 4}, "mean must have 3 elements"),
        ({"rescale_factor": float("nan")}, "rescale_factor: found nan"),
        ({"resample": 17}, "resample: found 17"),
        ({"input_data_format": "sideways"}, "input_data_format='sideways'"),
    ],
    ids=str,
)
def test_impossible_settings(cls, settings, message):
    with pytest.raises((ConfigError, MediaError), match=message):
        cls()(photo(), **settings)


@pytest.mark.parametrize("cls", PROCESSORS)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "flat list of images from None"),
        ([None], "flat list of images from None"),
        (np.zeros((3, 3, 3, 3, 3)), "shape"),
        (np.zeros((40, 50, 7), np.uint8), "image 0: Unable to infer channel dimension format"),
        (np.zeros((0, 50, 3), np.uint8), "has no pixels"),
        ([np.zeros((40, 40, 3), np.uint8), np.zeros((28, 5700, 3), np.uint8)], "image 1: absolute aspect ratio"),
        ("/no/such/image.png", "image 0: /no/such/image.png"),
    ],
    ids=str,
)
def test_impossible_images(cls, images, message):
    if images is None and cls is Glm4vImageProcessor:
        assert Glm4vImageProcessor()(None) == {}
        return
    with pytest.raises(MediaError, match=message):
        cls()(images)


def test_values_out_of_range_in_the_slow_processor():
    with pytest.raises(MediaError, match=r"outside the range \[0, 255\]"):
        Glm4vImageProcessor()(photo().astype(np.int32) + 300)
    with pytest.raises(MediaError, match=r"outside the range \[0, 1\].* whole numbers in \[0, 255\] \(uint8\)"):
        Glm4vImageProcessor()(photo(kind=np.float32) * 3.3)


def test_a_truncated_image_in_a_batch_is_named():
    buffer = io.BytesIO()
    PIL.Image.fromarray(photo()).save(buffer, "PNG")
    with pytest.raises(MediaError, match=r"image 1: \d+ bytes: found a truncated or corrupt image"):
        Glm4vImageProcessor()([photo(), buffer.getvalue()[:4000]])


def test_an_empty_list_of_images_gives_empty_arrays():
    for cls in PROCESSORS:
        result = cls()([])
        assert result.pixel_values.shape == (0, 1176) and result.image_grid_thw.shape == (0, 3)


def test_warnings(caplog):
    Glm4vImageProcessor()(photo(kind=np.float32))
    assert "already rescaled" in caplog.text
    Glm4vImageProcessor()(photo(), videos=[photo()])
    assert "`videos` has no effect" in caplog.text


# Checkpoints, sizes, features.


@pytest.mark.parametrize("cls", PROCESSORS)
def test_settings_of_a_checkpoint_win_over_the_class(cls, tmp_path):
    processor = cls.from_pretrained(CHECKPOINT)
    assert processor.size == {"shortest_edge": 12544, "longest_edge": 9633792}
    assert cls.from_pretrained(CHECKPOINT, patch_size=16).patch_size == 16
    saved = {**processor.to_dict(), "merge_size": 4, "never_heard_of": 1}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    again = cls.from_pretrained(tmp_path)
    assert again.merge_size == 4 and not hasattr(again, "never_heard_of")
    assert cls.from_dict(processor.to_dict()).to_dict() == processor.to_dict()


def test_settings_inside_a_processor_config(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"patch_size": 16}}))
    assert Glm4vImageProcessor.from_pretrained(tmp_path).patch_size == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "found invalid JSON"),
        ("[]", "expected an object"),
        ('{"image_processor": 3}', "expected an object"),
        ('{"patch_size": 0}', "patch_size: found 0"),
        (None, "found no settings of the processor; expected preprocessor_config.json"),
    ],
)
def test_broken_checkpoints_are_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        Glm4vImageProcessor.from_pretrained(tmp_path)
    assert "preprocessor_config.json" in str(caught.value)


@pytest.mark.parametrize("cls", PROCESSORS)
def test_number_of_patches_is_that_of_the_image(cls):
    processor = cls(size={"shortest_edge": 12544, "longest_edge": 60_000})
    for size in ((90, 130), (16, 20), (500, 300)):
        assert processor.get_number_of_image_patches(*size) == len(processor(photo(*size)).pixel_values)
    expected = len(processor(photo(), patch_size=8, merge_size=1).pixel_values)
    kwargs = {"patch_size": 8, "merge_size": 1, "size": None, "do_something": 3}
    assert processor.get_number_of_image_patches(90, 130, kwargs) == expected


def test_features():
    features = BatchFeature(a=1)
    features.b = 2
    assert features["b"] == 2 and features.a == 1 and dict(**features) == {"a": 1, "b": 2}
    with pytest.raises(AttributeError, match="'c'"):
        _ = features.c
    check_return_tensors(None)


# Threads.


def test_a_batch_is_prepared_by_several_threads_in_order(monkeypatch):
    import threading

    seen = set()
    original = image_module.resize_as_image

    def spy(*args):
        seen.add(threading.current_thread().name)
        return original(*args)

    images = [photo(60 + i, 50) for i in range(12)]
    expected = np.concatenate([Glm4vImageProcessor()(image).pixel_values for image in images])
    monkeypatch.setattr("glm4v_jax.inputs.media.threads.num_workers", lambda: 4)
    monkeypatch.setattr(image_module, "resize_as_image", spy)
    np.testing.assert_array_equal(Glm4vImageProcessor()(images).pixel_values, expected)
    assert len(seen) > 1


def test_map_threads_keeps_order_and_raises_the_first_error(monkeypatch):
    monkeypatch.setattr("glm4v_jax.inputs.media.threads.num_workers", lambda: 4)
    assert map_threads(str, range(50)) == [str(i) for i in range(50)]
    with pytest.raises(ZeroDivisionError):
        map_threads(lambda n: 1 // n, [1, 2, 0, 3])


def test_errors_carry_the_position_and_the_file_name(tmp_path):
    path = tmp_path / "wide.png"
    PIL.Image.new("RGB", (6000, 20)).save(path)
    for source in (path, str(path), PIL.Image.open(path)):
        with pytest.raises(MediaError, match=r"^image 1 \(.*wide\.png\): absolute aspect ratio"):
            Glm4vImageProcessor()([photo(), source])
    with pytest.raises(MediaError, match=r"^image 0: /no/such\.png: found no such file"):
        Glm4vImageProcessor()("/no/such.png")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(MediaError, match=r"^image 1: .*wide\.png: found a truncated"):
        Glm4vImageProcessor()([photo(), PIL.Image.open(path)])


def test_clipped_pillow_images_warn():
    deep = PIL.Image.fromarray(photo(channels=1)[:, :, 0].astype(np.uint16) * 200)
    with pytest.warns(UserWarning, match=r"Pillow image of 130 x 90 pixels: has values above 255 \(mode I;16\)"):
        Glm4vImageProcessor()(deep)


def test_a_checkpoint_with_a_wrong_number_of_means(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5]}))
    with pytest.raises(
        MediaError, match=r"image_mean must have 3 .* it is \[0\.5, 0\.5\], and the image has 3 channels"
    ):
        Glm4vImageProcessor.from_pretrained(tmp_path)(photo())
