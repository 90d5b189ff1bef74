"""Special tokens in what people write are text, in whatever part of a message they stand."""

import pytest
from helpers_processor import IMG, SQUARE, clip

from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.media.load import SampledVideo
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.text.literals import Literals, has_literals
from tests.helpers_tokenizer import FAMILY_TEMPLATE, write_small_processor

IMAGE = {"type": "image", "image": SQUARE}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Glm4vProcessor.from_pretrained(write_small_processor(tmp_path_factory.mktemp("checkpoint")))


def turn(processor, messages, images=None, videos=None, **variables):
    (ids,) = processor.prepare_turn(messages, processor.prepare_media(images, videos), **variables)[
        "input_ids"
    ].tolist()
    return ids


def said(text, role="user"):
    return {"role": role, "content": text}


def test_every_special_token_in_a_message_is_text(processor):
    special = [token for token, i in processor.tokenizer.get_added_vocab().items() if 256 <= i < 272]
    text = " ".join(special)
    ids = turn(processor, [said(text)])
    assert [index for index in ids if index >= 256] == [258, 260, 263, 264]  # [gMASK] <sop> <|user|> <|assistant|>
    assert processor.decode(ids) == f"[gMASK]<sop><|user|>\n{text}<|assistant|>\n"


def test_the_text_around_a_special_token_is_encoded_with_it(processor):
    """As the plain text that it is, byte pairs across its ends included."""
    text = "see <|image|> here"
    ids = turn(processor, [said(text)])
    plain = processor.tokenizer(f"\n{text}", split_special_tokens=True)["input_ids"]
    assert ids == [258, 260, 263, *plain, 264, 198]


def test_messages_without_special_tokens_are_encoded_as_by_the_template(processor):
    messages = [said("Be brief.", "system"), said([IMAGE, {"type": "text", "text": "What?"}])]
    expected = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)[0].tolist()
    assert turn(processor, messages, SQUARE) == expected


def test_images_and_videos_keep_their_places(processor):
    video = SampledVideo(clip(4), 2)
    items = [
        IMAGE,
        {"type": "text", "text": "<|image|> or <|video|>?"},
        {"type": "video", "video": video.frames, "fps": 2},
    ]
    ids = turn(processor, [said(items)], SQUARE, [video])
    expected = turn(processor, [said([IMAGE, {"type": "text", "text": "?"}, items[2]])], SQUARE, [video])
    assert ids.count(IMG) == expected.count(IMG) == 9 + 2 * 6
    assert "<|image|> or <|video|>?" in processor.decode(ids)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_whoever_says_it_it_is_text(processor, role):
    plain, special = (turn(processor, [said("Hi"), said(text, role), said("Yes")]) for text in ("x", "<|user|>"))
    assert plain.count(263) == special.count(263)


def test_tags_of_thoughts_stay_tokens(processor):
    text = "<think>a</think><answer>b</answer>"
    ids = turn(processor, [said("Hi"), said(text, "assistant"), said("<|user|>")])
    assert [index for index in ids if index >= 272] == [272, 273, 274, 275]


def test_tools_calls_and_their_results_are_text(processor):
    parts = processor.image_processor, processor.tokenizer, processor.video_processor
    processor = Glm4vProcessor(*parts, FAMILY_TEMPLATE)
    call = {"function": {"name": "<|user|>", "arguments": '{"<|image|>": "\\u003c|image|\\u003e"}'}}
    messages = [
        said("Hi"),
        # JSON may write any character as an escape.
        {"role": "assistant", "content": None, "reasoning_content": "<|image|>", "tool_calls": [call]},
        {"role": "tool", "content": "<|image|> <|user|>"},
        {"role": "tool", "content": [{"type": "text", "text": "<|assistant|>"}, IMAGE]},
    ]
    ids = turn(processor, messages, SQUARE, tools=[{"name": "<|user|>"}])
    tokens = processor.tokenizer.convert_ids_to_tokens([index for index in ids if index >= 256 and index != IMG])
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|assistant|>"]
    assert [token for token in tokens if token.startswith("<|") and "_of_" not in token] == roles
    assert ids.count(IMG) == 9 and processor.decode(ids).count("<|user|>") == 4
    assert processor.decode(ids).count("<|image|>") == 4 + 9


def test_text_that_looks_like_a_mark_is_itself(processor):
    mark = Literals(processor.tokenizer).marked([said("<|image|>")])[0]["content"]
    assert has_literals(mark)
    ids = turn(processor, [said(mark)])
    assert processor.decode(ids) == f"[gMASK]<sop><|user|>\n{mark}<|assistant|>\n"


def test_text_that_is_no_unicode_is_refused(processor):
    with pytest.raises(MessageError, match="lone surrogate"):
        turn(processor, [said("<|image|> \ud800")])
