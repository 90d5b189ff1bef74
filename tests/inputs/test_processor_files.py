"""The processor that a checkpoint directory describes."""

import re

import numpy as np
import pytest
from helpers_processor import IMG, ONE_STEP, PAD, SQUARE, VIDEO_IDS, assert_same, clip, edit, metadata
from helpers_transformers import import_transformers

from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer
from glm4v_jax.inputs.vision.image import Glm4vImageProcessor, Glm4vImageProcessorFast
from glm4v_jax.inputs.vision.video import Glm4vVideoProcessor
from tests.helpers_tokenizer import GOLDEN, write_small_processor, write_small_tokenizer


def test_from_pretrained_takes_settings(directory):
    size = {"shortest_edge": 200, "longest_edge": 5000}
    processor = Glm4vProcessor.from_pretrained(
        directory, use_fast=True, size=size, padding_side="right", fps=5, chat_template="{{ messages }}"
    )
    assert type(processor.image_processor) is Glm4vImageProcessorFast
    assert processor.image_processor.size == processor.video_processor.size == size
    assert processor.video_processor.fps == 5
    assert processor.tokenizer.padding_side == "right"
    assert processor.chat_template == "{{ messages }}"
    with pytest.warns(UserWarning, match="settings of the processor are ignored: trust_remote_code"):
        Glm4vProcessor.from_pretrained(directory, trust_remote_code=True)


def test_from_pretrained_reads_what_the_files_say(tmp_path):
    write_small_processor(tmp_path)
    edit(tmp_path, "preprocessor_config.json", image_processor_type="Glm4vImageProcessorFast", merge_size=4)
    edit(tmp_path, "video_preprocessor_config.json", fps=3)
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    assert type(processor.image_processor) is Glm4vImageProcessorFast
    assert processor.image_processor.merge_size == 4
    assert (processor.video_processor.merge_size, processor.video_processor.fps) == (2, 3)
    assert processor.chat_template == (GOLDEN / "checkpoint" / "chat_template.jinja").read_text()
    assert type(Glm4vProcessor.from_pretrained(tmp_path, use_fast=False).image_processor) is Glm4vImageProcessor


def test_from_pretrained_reads_the_single_file_of_version_5(tmp_path):
    write_small_tokenizer(tmp_path)
    images = {"image_processor_type": "Glm4vImageProcessorFast", "patch_size": 7}
    videos = {"video_processor_type": "Glm4vVideoProcessor", "fps": 7}
    edit(tmp_path, "processor_config.json", image_processor=images, video_processor=videos)
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    assert type(processor.image_processor) is Glm4vImageProcessorFast
    assert (processor.image_processor.patch_size, processor.video_processor.fps) == (7, 7)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: found no chat template; expected .* of proc"):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_settings_of_the_parts_count_in_a_call(tmp_path):
    write_small_processor(tmp_path)
    edit(tmp_path, "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    edit(tmp_path, "video_preprocessor_config.json", do_sample_frames=False)
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    processor.tokenizer.padding_side = "right"
    found = processor(text=["a", "abc"], padding=True)
    assert sorted(found) == ["attention_mask", "input_ids"]
    assert found["input_ids"].tolist() == [[64, PAD, PAD], [64, 65, 66]]
    conversation = [{"role": "user", "content": [{"type": "video", "video": clip(40)}]}]
    for fps, patches in ((None, 20), (1, 2)):
        known = metadata(40, 10.0, frames_indices=list(range(40)))
        options = {"fps": fps, "video_metadata": known, "tokenize": True, "return_dict": True}
        assert processor.apply_chat_template(conversation, **options)["video_grid_thw"].tolist() == [[patches, 4, 6]]


def test_placeholders_that_the_tokenizer_names(tmp_path):
    write_small_processor(tmp_path)
    edit(tmp_path, "tokenizer_config.json", extra_special_tokens={"image_token": "[sMASK]", "video_token": "[MASK]"})
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    assert (processor.image_token_id, processor.video_token_id) == (259, 257)
    found = processor(text="[MASK][sMASK]<|image|>", images=SQUARE, videos=clip(40), video_metadata=metadata(40, 10.0))
    assert found["input_ids"].tolist() == [[259 if i == IMG else i for i in VIDEO_IDS[1:-1]] + [259] * 9 + [IMG]]


@pytest.mark.parametrize("use_fast", [False, True])
def test_saved_files_are_read_by_the_reference_with_equal_results(directory, tmp_path, use_fast):
    """Settings that were changed after loading included."""
    transformers = import_transformers()
    processor = Glm4vProcessor.from_pretrained(directory, use_fast=use_fast, fps=5, padding_side="right")
    processor.image_processor.size = {"shortest_edge": 12544, "longest_edge": 20_000}
    processor.tokenizer.pad_token = "[MASK]"
    processor(text=["a", "abc"], padding="max_length", max_length=9)  # leaves settings in the backend
    processor.chat_template = {"default": processor.chat_template, "named": "{{ messages[0].content[0].text }}"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "older"}')
    processor.save_pretrained(tmp_path)
    reference = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(reference).__name__ == "Glm4vProcessor"
    again = Glm4vProcessor.from_pretrained(tmp_path)
    assert type(again.image_processor) is type(processor.image_processor)
    assert again.chat_template == processor.chat_template == reference.chat_template
    assert reference.tokenizer.get_vocab() == again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert reference.tokenizer.special_tokens_map == processor.tokenizer.special_tokens_map

    items = [{"type": "image", "image": SQUARE}, {"type": "text", "text": "What is <sop>\u732b?"}]
    shown = [{"type": "video", "video": clip(40)}, {"type": "text", "text": "Describe."}]
    for content, known in ((items, None), (shown, [metadata(40, 10.0)])):
        batch = [[{"role": "user", "content": content}], [{"role": "user", "content": [content[1]]}]]
        kwargs = {"tokenize": True, "return_dict": True, "padding": True, "add_generation_prompt": True}
        kwargs |= {"video_metadata": known} if known else {}
        expected = processor.apply_chat_template(batch, **kwargs)
        assert_same(again.apply_chat_template(batch, **kwargs), expected)
        theirs = reference.apply_chat_template(batch, return_tensors="pt", **kwargs)
        for name, value in expected.items():
            # torchvision adds in another order, and videos are resized by it.
            step = ONE_STEP if name.startswith("pixel") else 0
            np.testing.assert_allclose(theirs[name].numpy(), value, rtol=0, atol=step, err_msg=name)


def test_each_part_saves_its_own_file(directory, tmp_path):
    processor = Glm4vProcessor.from_pretrained(directory)
    for part in (processor.tokenizer, processor.image_processor, processor.video_processor):
        part.save_pretrained(tmp_path / "new" / "place")
        again = type(part).from_pretrained(tmp_path / "new" / "place")
        assert (
            again.get_vocab() == part.get_vocab() if part is processor.tokenizer else again.to_dict() == part.to_dict()
        )
    names = {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json"}
    assert {path.name for path in (tmp_path / "new" / "place").iterdir()} - {"chat_template.jinja"} == names


@pytest.mark.parametrize("option", ["min_pixels", "max_pixels", "resized_height", "resized_width"])
def test_sizes_of_single_images_are_no_settings(directory, option):
    for cls in (Glm4vProcessor, Glm4vImageProcessor):
        with pytest.raises(ConfigError, match=f"{option}: found 784; expected it in a call or in an item of a message"):
            cls.from_pretrained(directory, **{option: 784})
    # In files of others it means nothing here, as in the reference.
    assert Glm4vImageProcessor.from_dict({option: 784, "merge_size": 4}).merge_size == 4


def test_misspelt_settings_are_named(directory):
    for cls in (Glm4vImageProcessor, Glm4vImageProcessorFast, Glm4vVideoProcessor):
        with pytest.warns(UserWarning, match=f"{cls.__name__}: unknown settings are ignored: siez"):
            cls.from_pretrained(directory, siez=3)
    with pytest.warns(UserWarning, match="Glm4vTokenizer: unknown settings are ignored: padding_sid"):
        Glm4vTokenizer.from_pretrained(directory, padding_sid="left")


def test_wrong_directories_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: found no such directory"):
        Glm4vProcessor.from_pretrained(tmp_path / "nowhere")
    write_small_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"settings of the processor; expected preprocessor_config\.json or"):
        Glm4vProcessor.from_pretrained(tmp_path)
    write_small_processor(tmp_path)
    edit(tmp_path, "tokenizer_config.json", added_tokens_decoder={}, additional_special_tokens=[])
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path))}: the tokenizer lacks <\|image\|>"):
        Glm4vProcessor.from_pretrained(tmp_path)


def test_the_place_of_a_broken_chat_template_is_named(tmp_path):
    write_small_processor(tmp_path)
    write_small_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path))}: chat template, line 2: unexpected"):
        Glm4vProcessor.from_pretrained(tmp_path)
    assert Glm4vProcessor.from_pretrained(tmp_path, chat_template="{{ messages }}").template() == "{{ messages }}"
