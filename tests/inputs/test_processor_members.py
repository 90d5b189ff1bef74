"""Processors of the family's other members: which one, by the names in a checkpoint's files, and what it does."""

import dataclasses
import json
import re

import numpy as np
import pytest
from helpers_processor import BOV, EOV, HEAD, IMG, VIDEO, clip, edit, image_tokens, metadata

from glm4v_jax.config.family import PROCESSORS
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.inputs.preview.placement import facts, place_in_prompt
from glm4v_jax.inputs.preview.preview import look
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.vision.image import Glm4vImageProcessor, Glm4vImageProcessorFast
from glm4v_jax.inputs.vision.video import Glm4vVideoProcessor
from tests.helpers_tokenizer import write_small_processor, write_small_tokenizer

LAYOUTS = ("4.57", "5.x")


def write(directory, image, video=None, processor="Glm46VProcessor", layout="4.57", **settings):
    """A checkpoint's processor files, with these names; `settings` are of both parts."""
    images, videos = {"image_processor_type": image, **settings}, {"video_processor_type": video, **settings}
    if layout == "4.57":
        write_small_processor(directory)
        edit(directory, "preprocessor_config.json", processor_class=processor, **images)
        edit(directory, "video_preprocessor_config.json", processor_class=processor, **videos)
    else:
        write_small_tokenizer(directory)
        parts = {"image_processor": images, "video_processor": videos}
        edit(directory, "processor_config.json", processor_class=processor, **parts)
    edit(directory, "tokenizer_config.json", processor_class=processor)
    return directory


@pytest.fixture
def flash(tmp_path):
    return Glm4vProcessor.from_pretrained(write(tmp_path, "Glm46VImageProcessor", "Glm46VVideoProcessor"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("image", "video", "row"),
    [
        ("Glm46VImageProcessor", "Glm46VVideoProcessor", "glm46v"),
        ("Glm46VImageProcessorFast", "Glm46VVideoProcessor", "glm46v"),
        ("Glm46VImageProcessorPil", "Glm46VVideoProcessor", "glm46v"),
        ("GlmgaImageProcessor", "GlmgaVideoProcessor", "glmga"),
        ("GlmgaImageProcessorPil", "GlmgaVideoProcessor", "glmga"),
        # Where files name the class for images alone, or that of the processor.
        ("Glm46VImageProcessor", None, "glm46v"),
    ],
)
def test_names_in_the_files_choose_and_are_written_back(tmp_path, layout, image, video, row):
    write(tmp_path / "one", image, video, layout=layout)
    if video is None:
        (tmp_path / "one" / "video_preprocessor_config.json").unlink(missing_ok=True)
    processor = Glm4vProcessor.from_pretrained(tmp_path / "one")
    assert processor.image_processor.row == processor.video_processor.row == PROCESSORS[row]
    is_pillow = image.endswith("Pil")
    assert type(processor.image_processor) is (Glm4vImageProcessor if is_pillow else Glm4vImageProcessorFast)
    processor.save_pretrained(tmp_path / "two")
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "two").glob("*config.json")}
    assert written["preprocessor_config.json"]["image_processor_type"] == image
    assert written["video_preprocessor_config.json"]["video_processor_type"] == PROCESSORS[row].video
    assert {content["processor_class"] for content in written.values()} == {"Glm46VProcessor"}
    again = Glm4vProcessor.from_pretrained(tmp_path / "two")
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.video_processor.to_dict() == processor.video_processor.to_dict()
    assert again.row == processor.row


def test_settings_of_version_5_win_and_are_saved_where_they_are_read(tmp_path):
    write(tmp_path, "Glm4vImageProcessor", "Glm4vVideoProcessor", "Glm4vProcessor")
    names = {"image_processor_type": "Glm46VImageProcessor", "merge_size": 4}
    edit(tmp_path, "processor_config.json", processor_class="Glm46VProcessor", image_processor=names)
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    assert processor.image_processor.class_name == "Glm46VImageProcessor" and processor.image_processor.merge_size == 4
    assert processor.video_processor.class_name == "Glm4vVideoProcessor"
    processor.image_processor.merge_size = 1
    processor.save_pretrained(tmp_path)
    assert Glm4vProcessor.from_pretrained(tmp_path).image_processor.merge_size == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("names", "field", "found"),
    [
        (("Glm4vMoeImageProcessor", "Glm46VVideoProcessor"), "image_processor_type", "Glm4vMoeImageProcessor"),
        (("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"), "image_processor_type", "Qwen2VLImageProcessor"),
        (("Glm46VImageProcessor", "Qwen2VLVideoProcessor"), "video_processor_type", "Qwen2VLVideoProcessor"),
        (("Glm46VImageProcessor", "Glm46VVideoProcessor", "GlmAsrProcessor"), "processor_class", "GlmAsrProcessor"),
    ],
)
def test_other_names_are_refused_by_name(tmp_path, layout, names, field, found):
    with pytest.raises(CheckpointError, match=rf"config\.json: {field}: found '{found}'; expected one of Glm4v"):
        Glm4vProcessor.from_pretrained(write(tmp_path, *names, layout=layout))


def test_defaults_of_the_members():
    assert Glm4vVideoProcessor().size["longest_edge"] == 28 * 28 * 2 * 30000
    assert Glm4vVideoProcessor(video_processor_type="Glm46VVideoProcessor").size["longest_edge"] == 28 * 28 * 2 * 30000
    capped = Glm4vVideoProcessor(video_processor_type="GlmgaVideoProcessor")
    assert (capped.size["longest_edge"], capped.max_frames, capped.fps) == (28 * 28 * 2 * 55790, 640, 2)
    assert "max_frames" not in Glm4vVideoProcessor().to_dict()
    with pytest.raises(ConfigError, match="image_processor_type: found 'GlmImageProcessor'; expected one of Glm4vI"):
        Glm4vImageProcessor(image_processor_type="GlmImageProcessor")


def test_sides_are_multiples_of_expanded_patches(tmp_path):
    frames, image = clip(4, 150, 210), np.zeros((150, 210, 3), np.uint8)
    for name, grid in (("GlmgaImageProcessor", [1, 12, 16]), ("GlmgaImageProcessorPil", [1, 10, 16])):
        directory = write(tmp_path / name, name, "GlmgaVideoProcessor", patch_expand_factor=2)
        processor = Glm4vProcessor.from_pretrained(directory)
        inputs = processor.image_processor(image)
        assert inputs.image_grid_thw.tolist() == [grid]
        assert processor.image_processor.get_number_of_image_patches(150, 210) == np.prod(grid)
        video = processor.video_processor(frames, do_sample_frames=False)
        assert video.video_grid_thw.tolist() == [[2, 12, 16]]
        assert processor.video_processor.get_num_of_video_patches(4, 150, 210) == 2 * 12 * 16


def test_times_stand_after_the_frames_in_the_members_words(flash):
    """Six frames a second of two seconds, in pairs: each shows the time of its first."""
    known = metadata(60, 30.0)
    texts = [f"{index / 30:.1f} seconds" for index in (0, 10, 20, 30, 40, 50)]
    expected = [BOV]
    for text in texts:
        expected += [*image_tokens(6), *flash.tokenizer.encode(text, add_special_tokens=False)]
    inputs = flash(text=VIDEO, videos=clip(60), video_metadata=known)
    assert inputs["input_ids"].tolist() == [[*expected, EOV]]
    messages = [{"role": "user", "content": [{"type": "video", "video": clip(60)}]}]
    inputs = flash.apply_chat_template(messages, tokenize=True, return_dict=True, video_metadata=[known])
    head = flash.tokenizer.encode(HEAD, add_special_tokens=False)
    assert inputs["input_ids"].tolist() == [[*head, *expected, EOV]]
    # Frames that are sampled already have the times that their rate says.
    frames = [{"role": "user", "content": [{"type": "video", "video": list(clip(4)), "fps": 4}]}]
    text = flash.decode(flash.apply_chat_template(frames, tokenize=True)[0])
    assert "<|end_of_image|>0.0 seconds<|begin" in text and "<|end_of_image|>0.5 seconds<|end_of_video|>" in text


def test_the_class_of_the_processor_decides_what_times_say(tmp_path):
    names = ("Glm4vImageProcessor", "Glm46VVideoProcessor")
    assert Glm4vProcessor.from_pretrained(write(tmp_path, *names, "Glm4vProcessor")).row.time_text == "{whole}"
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json"):
        edit(tmp_path, name, processor_class=None)
    assert Glm4vProcessor.from_pretrained(tmp_path).row is PROCESSORS["glm46v"]


def test_a_preview_says_what_the_prompt_says(flash, tmp_path):
    import PIL.Image

    frames = [PIL.Image.fromarray(frame) for frame in clip(4)]
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:], duration=250)
    seen = look(tmp_path / "video.gif", flash)
    (place,) = place_in_prompt([seen], flash).places
    told = facts(seen, place)
    assert told["time_texts"] == ["0.0 seconds", "0.5 seconds"] and told["timestamps"] == [0.0, 0.5]


def test_ids_of_the_configuration_are_those_of_the_tokenizer(flash, tmp_path):
    ids = {"image_token_id": IMG, "video_start_token_id": BOV, "video_end_token_id": EOV}
    config = dataclasses.replace(Glm4vConfig.tiny(), **ids)
    flash.check_ids(config)
    for field, token in zip(ids, ("<|image|>", "<|begin_of_video|>", "<|end_of_video|>"), strict=True):
        fault = f"{tmp_path}/config.json: {field}: found 7; expected {ids[field]}, as the tokenizer has {token}"
        with pytest.raises(CheckpointError, match=re.escape(fault)):
            flash.check_ids(dataclasses.replace(config, **{field: 7}))


def test_placeholders_that_version_5_names(tmp_path):
    write(tmp_path, "Glm46VImageProcessor", "Glm46VVideoProcessor")
    edit(
        tmp_path,
        "tokenizer_config.json",
        image_token="[sMASK]",
        model_specific_special_tokens={"video_token": "[MASK]"},
    )
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    assert (processor.image_token, processor.video_token) == ("[sMASK]", "[MASK]")
    processor.save_pretrained(tmp_path)
    assert Glm4vProcessor.from_pretrained(tmp_path).image_token == "[sMASK]"
