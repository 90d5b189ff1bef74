"""The processor that a checkpoint directory describes."""

import pytest
from helpers_processor import IMG, PAD, SQUARE, VIDEO_IDS, clip, edit, metadata

from glm4v_jax.errors import CheckpointError
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.vision.image import Glm4vImageProcessor, Glm4vImageProcessorFast
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
    with pytest.raises(CheckpointError, match="no chat template"):
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


def test_wrong_directories_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        Glm4vProcessor.from_pretrained(tmp_path / "nowhere")
    write_small_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        Glm4vProcessor.from_pretrained(tmp_path)
    write_small_processor(tmp_path)
    edit(tmp_path, "preprocessor_config.json", image_processor_type="Glm46VImageProcessor")
    with pytest.raises(
        CheckpointError, match=r"preprocessor_config\.json: image_processor_type: found 'Glm46VImageProcessor'"
    ):
        Glm4vProcessor.from_pretrained(tmp_path)
    write_small_processor(tmp_path)
    edit(tmp_path, "tokenizer_config.json", added_tokens_decoder={}, additional_special_tokens=[])
    with pytest.raises(CheckpointError, match=r"the tokenizer lacks <\|image\|>"):
        Glm4vProcessor.from_pretrained(tmp_path)
