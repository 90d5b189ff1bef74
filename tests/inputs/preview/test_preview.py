"""What the model will see: read back from patches, placed in a prompt, and drawn."""

import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.errors import MediaError
from glm4v_jax.inputs.preview.placement import facts, place_in_prompt
from glm4v_jax.inputs.preview.preview import look, read_back, warning, why_scaled
from glm4v_jax.inputs.preview.sheet import MAX_FRAMES, WIDTH, draw_card, draw_sheet
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.vision.image import Glm4vImageProcessor, Glm4vImageProcessorFast
from glm4v_jax.inputs.vision.video import Glm4vVideoProcessor
from tests.helpers_transformers import import_transformers

BICUBIC = PIL.Image.Resampling.BICUBIC


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def resized(pixels, height, width):
    return np.asarray(PIL.Image.fromarray(pixels).resize((width, height), BICUBIC))


@pytest.fixture(scope="module")
def processor():
    return Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT)


@pytest.fixture
def save(tmp_path):
    """An image [H, W, 3] as a PNG, or frames as a GIF of so many milliseconds each; the path."""

    def write(pixels, name="image.png", milliseconds=500):
        images = [PIL.Image.fromarray(frame) for frame in ([pixels] if pixels.ndim == 3 else pixels)]
        path = str(tmp_path / name)
        images[0].save(
            path, **(dict(save_all=True, append_images=images[1:], duration=milliseconds) if images[1:] else {})
        )
        return path

    return write


def grey_frames(count, height=56, width=84):
    """Frames that a GIF keeps exactly, each of its own grey."""
    return np.stack([np.full((height, width, 3), 10 * index, np.uint8) for index in range(count)])


# Patches backwards.


@pytest.mark.parametrize("processor_class", [Glm4vImageProcessor, Glm4vImageProcessorFast])
@pytest.mark.parametrize("settings", [{}, {"do_rescale": False}, {"do_normalize": False}, {"merge_size": 1}])
def test_images_read_back_from_patches_equal_the_originals(processor_class, settings):
    image_processor = processor_class(**settings)
    pixels = noise(112, 196)
    features = image_processor(images=pixels)
    frames = read_back(features["pixel_values"], features["image_grid_thw"][0].tolist(), image_processor.resolve({}))
    assert frames.shape == (1, 2, 112, 196, 3)
    np.testing.assert_array_equal(frames[0, 0], pixels)
    np.testing.assert_array_equal(frames[0, 1], pixels)


def test_every_frame_of_a_video_is_read_back():
    video_processor = Glm4vVideoProcessor(do_sample_frames=False, temporal_patch_size=3)
    clip = np.stack([noise(112, 140, seed) for seed in range(4)])
    features = video_processor(videos=clip, video_metadata={"fps": 1, "frames_indices": [0, 1, 2, 3]})
    frames = read_back(
        features["pixel_values_videos"], features["video_grid_thw"][0].tolist(), video_processor.resolve({})
    )
    assert frames.shape == (2, 3, 112, 140, 3)
    np.testing.assert_array_equal(frames.reshape(6, 112, 140, 3), clip[[0, 1, 2, 3, 3, 3]])


def test_grey_patches_are_read_back_as_grey():
    image_processor = Glm4vImageProcessor(image_mean=0.5, image_std=0.5)
    grey = noise(112, 112)[:, :, 0]
    features = image_processor(images=grey)
    frames = read_back(features["pixel_values"], features["image_grid_thw"][0].tolist(), image_processor.resolve({}))
    np.testing.assert_array_equal(frames[0, 0], np.repeat(grey[..., None], 3, axis=2))


def test_patches_of_other_channels_are_refused():
    settings = Glm4vImageProcessor().resolve({})
    with pytest.raises(MediaError, match="2 channels"):
        read_back(np.zeros((4, 2 * 2 * 14 * 14), np.float32), (1, 2, 2), settings)


@pytest.mark.parametrize(("height", "width"), [(300, 451), (20, 20), (90, 1300)])
def test_the_preview_shows_the_resized_file(processor, save, height, width):
    pixels = noise(height, width)
    seen = look(save(pixels), processor)
    assert (seen.kind, seen.height, seen.width) == ("picture", height, width)
    np.testing.assert_array_equal(seen.frames[0, 0], resized(pixels, seen.seen_height, seen.seen_width))


def test_patches_of_the_reference_read_back_the_same(processor, save):
    transformers = import_transformers()
    pixels = noise(150, 230)
    seen = look(save(pixels), processor)
    theirs = transformers.Glm4vImageProcessor.from_pretrained(RANDOM_CHECKPOINT)
    features = theirs(images=PIL.Image.fromarray(pixels), return_tensors="np")
    (grid,) = features["image_grid_thw"].tolist()
    assert tuple(grid) == seen.grid_thw
    np.testing.assert_array_equal(read_back(features["pixel_values"], grid, seen.settings), seen.frames)


# Which frames, and when.


def test_frames_and_times_of_a_video(processor, save):
    # 7 frames of half a second: all are taken, and the last twice to make pairs.
    seen = look(save(grey_frames(7), "video.gif"), processor)
    assert seen.kind == "video"
    assert seen.grid_thw == (4, 4, 6)
    assert seen.frame_indices == [(0, 1), (2, 3), (4, 5), (6, 6)]
    assert [seen.time(index) for index in (0, 3, 6)] == [0.0, 1.5, 3.0]
    assert (np.ptp(seen.frames, axis=(2, 3, 4)) == 0).all()
    np.testing.assert_array_equal(seen.frames[:, :, 0, 0, 0], [[0, 10], [20, 30], [40, 50], [60, 60]])
    (place,) = place_in_prompt([seen], processor).places
    assert place.time_texts == ("0", "1", "2", "3")


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_an_animated_image_is_a_video_and_a_still_one_is_not(processor, save, suffix):
    assert look(save(noise(56, 84), f"still.{suffix}"), processor).kind == "picture"
    assert look(save(grey_frames(4), f"moving.{suffix}"), processor).kind == "video"


# Why it is so, and what is lost. The budget of the tiny checkpoint is that of GLM-4.1V: 6,144 tokens an image.


@pytest.mark.parametrize(
    ("height", "width", "why", "warns"),
    [
        (112, 196, "as it is", None),
        (300, 451, "sides rounded to multiples of 28", None),
        (20, 20, "scaled up to the smallest size", None),
        (20, 3000, "scaled up to sides of 28 pixels at least", None),
        (34, 3000, "sides rounded to multiples of 28", "scaled down by 1.00 in width and 0.82 in height"),
        (2400, 3000, "scaled down to the budget of 6144 tokens", "scaled down by 0.81 per side"),
    ],
)
def test_why_an_image_is_scaled(processor, save, height, width, why, warns):
    seen = look(save(np.zeros((height, width, 3), np.uint8)), processor)
    assert why_scaled(seen) == why
    said = warning(seen)
    assert said is None if warns is None else said.startswith(warns)


def test_the_warning_has_the_size_of_what_is_lost(processor, save):
    tight = Glm4vProcessor.from_pretrained(
        RANDOM_CHECKPOINT, size={"shortest_edge": 12544, "longest_edge": 2 * 224 * 224}
    )
    seen = look(save(noise(896, 896)), tight)
    assert seen.scale == (0.25, 0.25)
    assert seen.budget == seen.tokens == 64
    assert warning(seen) == "scaled down by 0.25 per side: details smaller than 4.0 pixels of the original are lost"


# Places in a prompt.


def mixed(processor, save):
    files = [save(noise(112, 140), "a.png"), save(grey_frames(6), "b.gif"), save(noise(84, 84), "c.png")]
    return files, [look(file, processor) for file in files]


@pytest.mark.parametrize("text", [None, "What is this?"])
def test_the_prompt_is_the_processors(processor, save, text):
    files, seen = mixed(processor, save)
    prompt = place_in_prompt(seen, processor, text)
    content = [{"type": "video" if file.endswith("gif") else "image", "path": file} for file in files]
    content += [] if text is None else [{"type": "text", "text": text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    np.testing.assert_array_equal(prompt.input_ids, inputs["input_ids"][0])
    image_grids = [item.grid_thw for item in seen if item.kind == "picture"]
    videos = [item.grid_thw for item in seen if item.kind == "video"]
    np.testing.assert_array_equal(image_grids, inputs["image_grid_thw"])
    np.testing.assert_array_equal(videos, inputs["video_grid_thw"])


def test_places_of_a_mixed_prompt_by_hand(processor, save):
    _, seen = mixed(processor, save)
    prompt = place_in_prompt(seen, processor)
    # [gMASK] <sop> <|user|> newline <|begin_of_image|> come first, so the image begins at 5. It has 4 x 5 tokens.
    first, video, last = prompt.places
    assert first.tokens == 1 + 20 + 1
    assert first.positions == {"t": (5, 5), "h": (5, 8), "w": (5, 9)}
    # Then the end of the image at 10, the beginning of the video at 11, that of its first frame at 12. Three frames
    # of 2 x 3 tokens, each followed by its end, a digit, and but for the last the beginning of the next: 3 + 3 further.
    assert video.time_texts == ("0", "1", "2") and video.timestamps == [0, 1, 2]
    assert video.tokens == 1 + 3 * (1 + 6 + 1 + 1) + 1
    assert video.positions == {"t": (13, 25), "h": (13, 26), "w": (13, 27)}
    # After it: the end of the frame, a digit, the end of the video, the beginning of the image.
    assert last.tokens == 1 + 9 + 1
    assert last.positions == {"t": (32, 32), "h": (32, 34), "w": (32, 34)}
    # After it: its end, <|assistant|>, newline.
    assert prompt.next_position == 35 + 3


def test_positions_are_the_references(processor, save):
    import_transformers()
    import torch
    from transformers.models.glm4v.configuration_glm4v import Glm4vConfig
    from transformers.models.glm4v.modeling_glm4v import Glm4vModel

    _, seen = mixed(processor, save)
    prompt = place_in_prompt(seen, processor, "What is this?")

    class Model:
        config = Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT)

    position_ids, _ = Glm4vModel.get_rope_index(
        Model(),
        torch.tensor(prompt.input_ids[None]),
        torch.tensor([item.grid_thw for item in seen if item.kind == "picture"]),
        torch.tensor([item.grid_thw for item in seen if item.kind == "video"]),
    )
    np.testing.assert_array_equal(prompt.position_ids, position_ids[:, 0].numpy())
    at = np.flatnonzero(prompt.input_ids == processor.image_token_id)
    ends = np.cumsum([item.tokens for item in seen])
    for place, own in zip(prompt.places, np.split(at, ends[:-1]), strict=True):
        for axis, positions in zip("thw", position_ids[:, 0, own], strict=True):
            assert place.positions[axis] == (int(positions.min()), int(positions.max()))


def test_a_placeholder_in_the_question_is_text(processor, save):
    seen = look(save(noise(56, 84)), processor)
    prompt = place_in_prompt([seen], processor, "What is <|image|>?")
    assert prompt.places == place_in_prompt([seen], processor, "What?").places
    assert "What is <|image|>?" in processor.decode(prompt.input_ids)


def test_facts_fit_together(processor, save):
    _, seen = mixed(processor, save)
    for item, place in zip(seen, place_in_prompt(seen, processor).places, strict=True):
        told = facts(item, place)
        t, h, w = told["grid_thw"]
        assert told["patches"] == t * h * w == 4 * told["image_tokens"]
        assert (told["seen_height"], told["seen_width"]) == (14 * h, 14 * w)
        assert told["share_of_budget"] == pytest.approx(told["image_tokens"] / told["budget_tokens"], abs=1e-4)
        assert told["prompt_tokens"] > told["image_tokens"]
        assert ("timestamps" in told) == (told["kind"] == "video")


# What cannot be seen.


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("notes.txt", b"neither an image nor a video\n" * 50, "found no readable image; as a video: found text"),
        ("empty.png", b"", "found no readable image; as a video: "),
        (
            "photo.heic",
            b"\0\0\0\x18ftypheic" + bytes(500),
            "found no readable image (of a kind that Pillow does not read",
        ),
        ("head.png", b"\x89PNG\r\n\x1a\nxx", "found no readable image; as a video: "),
        ("video.mp4", bytes(range(256)) * 9, "found no readable image; as a video: found no readable video"),
    ],
)
def test_a_file_that_is_neither_is_named_once(processor, tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MediaError) as error:
        look(str(path), processor)
    assert str(error.value).startswith(f"{path}: {problem}")


def test_a_truncated_image_a_sliver_a_directory_and_nothing(processor, save, tmp_path):
    path = save(noise(56, 84))
    with open(path, "rb+") as file:
        file.truncate(2000)
    (tmp_path / "empty").mkdir()
    for place, problem in (
        (path, "found a truncated or corrupt image"),
        (save(noise(28, 28 * 201), "sliver.png"), "absolute aspect ratio"),
        (str(tmp_path / "empty"), "found no frames"),
        (str(tmp_path / "nowhere.png"), "found no such file"),
    ):
        with pytest.raises(MediaError) as error:
            look(place, processor)
        assert str(error.value).startswith(f"{place}: {problem}")


def test_an_image_too_large_to_decode_is_named(processor, save, monkeypatch):
    path = save(noise(56, 84))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MediaError) as error:
        look(path, processor)
    assert str(error.value).startswith(f"{path}: found too large an image (Image size (4704 pixels) exceeds limit")


# Drawings.


def card_of(path, processor, files=1):
    seen = look(path, processor)
    (place,) = place_in_prompt([seen], processor).places
    return seen, draw_card("title", seen, place.time_texts, ["a line"], None, files)


def test_a_drawing_shows_the_image_between_its_lines(processor, save):
    pixels = noise(112, 168)
    seen, card = card_of(save(pixels), processor)
    ruler = 26
    drawn = np.asarray(card.drawing)[ruler:, ruler:]
    scale = drawn.shape[0] // 112
    assert drawn.shape == (112 * scale, 168 * scale, 3)
    magnified = seen.frames[0, 0].repeat(scale, axis=0).repeat(scale, axis=1)
    changed = (drawn != magnified).any(axis=2)
    patch = 14 * scale
    for axis, count in ((0, 8), (1, 12)):
        # A line that follows a border is changed nearly everywhere; others only where borders cross them.
        share = changed.mean(axis=1 - axis)
        lines = set(np.flatnonzero(share > 0.9))
        token_lines = {place for index in range(2, count, 2) for place in (index * patch - 1, index * patch)}
        assert lines == token_lines | {index * patch for index in range(1, count, 2)}
        assert share[sorted(set(range(len(share))) - lines)].max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 128, 255])
def test_lines_show_on_every_ground(processor, save, level):
    for height in (112, 2800):
        _, card = card_of(save(np.full((height, height, 3), level, np.uint8)), processor)
        drawn = np.asarray(card.drawing)[26:, 26:].astype(int)
        # Along a row of pixels that crosses borders and follows none: a sixth of the range is plain to see.
        row = drawn[drawn.shape[0] // 2 + 3, :, 0]
        assert np.abs(row - level).max() >= 42


def test_small_patches_are_not_outlined(processor, save):
    _, coarse = card_of(save(noise(112, 168)), processor)
    _, fine = card_of(save(noise(2000, 2000)), processor)
    assert "dotted: patches" in coarse.lines[-1]
    assert "dotted" not in fine.lines[-1]
    assert "tokens of 2 x 2 patches" in fine.lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(28, 5600), (5600, 28), (60, 3000), (2800, 2800), (84, 84)])
@pytest.mark.parametrize("files", [1, 3, 50])
def test_drawings_keep_within_their_room(processor, save, height, width, files):
    seen, card = card_of(save(np.full((height, width, 3), 90, np.uint8)), processor, files)
    room = next(height for most, height in ((1, 880), (4, 560), (1000, 360)) if files <= most)
    assert card.drawing.width <= WIDTH
    assert card.drawing.height <= room + 26
    if max(height, width) == 5600:
        assert "strips" in card.lines[-1]
        assert max(card.drawing.size) > 300
    # Every token is there: the area of the ground is that of all tokens.
    ground = (np.abs(np.asarray(card.drawing).astype(int) - 90) < 3).all(axis=2).sum()
    pitch = np.sqrt(ground / seen.tokens)
    assert pitch > 4


def test_a_video_is_a_contact_sheet(processor, save):
    seen, card = card_of(save(grey_frames(6), "video.gif"), processor)
    drawn = np.asarray(card.drawing)
    for first, second in seen.frames[:, :, 0, 0, 0].tolist():
        # Greys are written in colours of the same value, so rows of one colour count, not single pixels.
        for level, least in ((first, 4000), (second, 300)):
            assert (drawn == level).all(axis=2).sum() > least
    assert "the other frame of the pair" in card.lines[-1]


def test_of_a_long_video_some_frames_are_drawn(processor, save):
    clip = np.stack([np.full((28, 28, 3), index % 256, np.uint8) for index in range(2 * MAX_FRAMES + 8)])
    seen, card = card_of(save(clip, "video.gif"), processor)
    assert seen.grid_thw[0] == MAX_FRAMES + 4
    assert f"{MAX_FRAMES} of {MAX_FRAMES + 4} temporal patches drawn" in card.lines[-1]
    assert card.drawing.width <= WIDTH


def test_a_sheet_holds_all_drawings_and_long_names(processor, save):
    cards = [card_of(save(noise(height, 84, height), f"{height}.png"), processor, 2)[1] for height in (56, 140)]
    cards.append(draw_card("n" * 500, look(save(noise(56, 56)), processor), (), ["word " * 200], "lost", 2))
    sheet = draw_sheet(cards)
    assert sheet.width <= WIDTH + 56
    content = np.asarray(sheet)
    for card in cards:
        drawing = np.asarray(card.drawing)
        row = drawing[drawing.shape[0] // 2]
        rows = np.flatnonzero((content[:, 28 : 28 + len(row)] == row).all(axis=(1, 2)))
        assert any(
            np.array_equal(content[top : top + drawing.shape[0], 28 : 28 + len(row)], drawing)
            for top in (int(place) - drawing.shape[0] // 2 for place in rows)
        )
    assert (content == (176, 58, 0)).all(axis=2).any()
