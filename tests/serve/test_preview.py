"""What the model sees, for the chat page: facts and drawings."""

import base64
import io

import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_media import png, write_video

from glm4v_jax.errors import MediaError
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.serve.errors import ApiError
from glm4v_jax.serve.preview import preview


@pytest.fixture(scope="module")
def processor():
    return Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT)


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def drawn(drawing):
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(drawing["url"].partition(",")[2]))))


def test_an_image_is_drawn_between_its_lines(processor):
    pixels = noise(112, 168)
    seen = preview({"type": "image", "image": png(PIL.Image.fromarray(pixels))}, processor)
    assert (seen["kind"], seen["grid_thw"], seen["image_tokens"]) == ("image", [1, 8, 12], 24)
    assert "file" not in seen
    (drawing,) = seen["drawings"]
    image = drawn(drawing)
    assert image.shape[:2] == (drawing["height"], drawing["width"]) == (448, 672)
    magnified = pixels.repeat(4, axis=0).repeat(4, axis=1)
    # Only the borders of patches are drawn over.
    assert (image[1:55, 1:55] == magnified[1:55, 1:55]).all()
    assert (image[56] != magnified[56]).any(axis=1).mean() > 0.9
    assert "tokens of 2 x 2 patches" in seen["legend"]


def test_frames_of_a_video_have_their_times(processor, tmp_path):
    frames = np.stack([np.full((56, 84, 3), 20 * index, np.uint8) for index in range(8)])
    video = write_video(tmp_path / "video.mp4", frames, rate=2).read_bytes()
    seen = preview({"type": "video", "video": video}, processor)
    assert seen["kind"] == "video"
    assert len(seen["drawings"]) == seen["grid_thw"][0] == 4
    assert [drawing["timestamp"] for drawing in seen["drawings"]] == seen["timestamps"]
    assert [drawing["time_text"] for drawing in seen["drawings"]] == seen["time_texts"]
    assert [index for drawing in seen["drawings"] for index in drawing["frames"]] == seen["frames_indices"]
    assert [time for drawing in seen["drawings"] for time in drawing["seconds"]] == seen["frames_seconds"]
    brightness = [drawn(drawing).mean() for drawing in seen["drawings"]]
    assert brightness == sorted(brightness)


def test_an_image_part_is_an_image_even_if_it_moves(processor):
    first, second = (PIL.Image.fromarray(noise(56, 56)) for _ in range(2))
    content = png(first, format="GIF", save_all=True, append_images=[second])
    assert preview({"type": "image", "image": content}, processor)["kind"] == "image"


def test_large_images_and_long_videos_stay_small(processor, tmp_path):
    large = preview({"type": "image", "image": png(PIL.Image.new("RGB", (1300, 1000)))}, processor)
    assert max(large["drawings"][0]["width"], large["drawings"][0]["height"]) <= 880
    frames = np.zeros((130, 32, 32, 3), np.uint8)
    long = preview(
        {"type": "video", "video": write_video(tmp_path / "long.mp4", frames, rate=2).read_bytes()}, processor
    )
    assert len(long["drawings"]) == 60 < long["grid_thw"][0]
    assert "60 of" in long["legend"]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_cannot_be_read_is_an_error(processor, kind):
    with pytest.raises(MediaError, match="found"):
        preview({"type": kind, kind: b"neither"}, processor)


@pytest.mark.parametrize(
    "item",
    [
        {"text": "?"},
        {"type": "video", "video": [b"a frame"]},
        {"type": "image", "image": b"", "max_pixels": 3136},
        {"type": "video", "video": b"", "fps": 1},
    ],
)
def test_what_a_preview_would_not_show_is_refused(processor, item):
    with pytest.raises(ApiError, match="found") as error:
        preview(item, processor)
    assert error.value.status == 400
