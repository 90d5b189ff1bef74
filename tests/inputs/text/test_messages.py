"""Messages in the shapes in which clients send them, and the options of the images and videos in them."""

import warnings

import pytest
from helpers_tokenizer import GOLDEN

from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.text.chat_template import render_conversation
from glm4v_jax.inputs.text.messages import extract_media, normalise_messages
from glm4v_jax.inputs.vision.settings import AREA_OPTIONS
from tests.helpers_tokenizer import FAMILY_TEMPLATE

TEMPLATE = (GOLDEN / "checkpoint" / "chat_template.jinja").read_text()
# As those of siblings that call tools; `content` that is null would print "None", JSON arguments would fail.
WITH_TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{% set call = call.function or call %}[{{ call.name }}{% for k, v in call.arguments.items() %} {{ k }}={{ v }}"
    "{% endfor %}]{% endfor %}{% endfor %}{# 'system' 'user' 'assistant' 'tool' #}"
)
HI = {"role": "user", "content": "Hi"}
PLACE = "http://127.0.0.1/cat.png"
IMAGE = {"type": "image", "url": PLACE}


def user(*items):
    return {"role": "user", "content": list(items)}


def calling(arguments, **more):
    function = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}], **more}


@pytest.mark.parametrize(
    "message",
    [
        calling('{"a": 1, "b": "x"}', content=None),
        calling('{"a": 1, "b": "x"}'),
        calling({"a": 1, "b": "x"}, content=""),
        calling('{"a": 1, "b": "x"}', content=[]),
        calling('{"a": 1, "b": "x"}', content=None, refusal=None, audio=None, function_call=None, annotations=[]),
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": '{"a": 1, "b": "x"}'}]},
    ],
    ids=["null content", "no content", "objects", "empty list", "all fields of the SDK", "without 'function'"],
)
def test_tool_calls_of_openai_clients_are_rendered(message):
    answer = {"role": "tool", "tool_call_id": "call_1", "name": "add", "content": [{"type": "text", "text": "3"}]}
    assert render_conversation([HI, message, answer], WITH_TOOLS) == "<user>Hi<assistant>[add a=1 b=x]<tool>3"


def test_a_call_without_arguments_has_none():
    assert render_conversation([HI, calling("")], WITH_TOOLS) == "<user>Hi<assistant>[add]"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "B", "tool_calls": None, "refusal": None, "name": "bob"},
        {"role": "assistant", "content": "B", "tool_calls": [], "function_call": None, "annotations": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "B", "annotations": []}], "id": "msg_1",
         "status": "completed", "type": "message"},
        {"role": "assistant", "content": "B", "reasoning_content": "Hmm."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "B"}]},
    ],
)  # fmt: skip
def test_answers_that_clients_send_back_are_rendered(message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render_conversation([HI, message], TEMPLATE).endswith("Hi<|assistant|>\nB")


IMAGE_TAGS = "<|begin_of_image|><|image|><|end_of_image|>"


@pytest.mark.parametrize("role", ["user", "tool"])
def test_images_of_openai_clients_are_shown_by_a_template_that_knows_both_spellings(role):
    """That of GLM-4.6V knows `image_url` in a tool's result, and would drop it in a user's message."""
    items = [{"type": "image_url", "image_url": {"url": PLACE}}, {"type": "text", "text": "A map."}]
    messages = [HI, calling('{"a": 1}', content=None), {"role": role, "tool_call_id": "call_1", "content": items}]
    prompt = render_conversation(messages, FAMILY_TEMPLATE)
    assert prompt.count(IMAGE_TAGS) == 1 and "A map." in prompt.split(IMAGE_TAGS)[1]
    assert extract_media(messages, FAMILY_TEMPLATE) == ([PLACE], [])


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_go_where_the_template_has_a_place_for_them(field):
    """It keeps those of the turns since the user has spoken; a turn may be cut off in its thought."""
    call = calling('{"a": 1}', content=None, **{field: "I add."})
    result = {"role": "tool", "tool_call_id": "call_1", "content": "3"}
    assert "<|assistant|>\n<think>I add.</think>\n<tool_call>add\n" in render_conversation(
        [HI, call, result], FAMILY_TEMPLATE
    )
    assert "I add." not in render_conversation([HI, call, result, HI], FAMILY_TEMPLATE)
    cut = [HI, {"role": "assistant", "content": None, field: "Hm"}]
    assert render_conversation(cut, FAMILY_TEMPLATE).endswith("<think>Hm</think>")
    assert render_conversation(cut, TEMPLATE).endswith("<|assistant|>\n")


def test_developer_is_system():
    assert render_conversation([{"role": "developer", "content": "D"}, HI], TEMPLATE).startswith(
        "[gMASK]<sop><|system|>\nD"
    )


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image_url", "image_url": {"url": PLACE}},
        {"type": "image_url", "image_url": {"url": PLACE, "detail": "low"}},
        {"type": "image_url", "image_url": PLACE},
        {"image_url": {"url": PLACE}},
        {"type": "input_image", "image_url": PLACE, "detail": "auto", "file_id": None},
        {"type": "image", "url": PLACE, "cache_control": {"type": "ephemeral"}},
    ],
)
def test_images_of_openai_clients_are_images(item):
    question = {"type": "input_text", "text": "t"}
    images, videos = extract_media([user(item, question)], TEMPLATE)
    assert (images, videos) == ([PLACE], [])
    assert render_conversation([user(item, question)], TEMPLATE) == render_conversation(
        [user(IMAGE, {"type": "text", "text": "t"})], TEMPLATE
    )


@pytest.mark.parametrize("option", AREA_OPTIONS)
def test_options_of_an_image_come_with_it_in_either_place(option):
    pair = {"resized_height": "resized_width", "resized_width": "resized_height"}.get(option)
    options = {option: 56} | ({pair: 56} if pair else {})
    nested = {"type": "image_url", "image_url": {"url": PLACE, **options}}
    beside = {"type": "image_url", "image_url": {"url": PLACE}, **options}
    for item in (nested, beside, {**IMAGE, **options}):
        ((image,), _) = extract_media([user(item)], TEMPLATE)
        assert (image.source, image.options) == (PLACE, options)


def test_normalised_messages_stay_as_they_are():
    messages = [
        {"role": "developer", "content": [{"type": "input_text", "text": "D"}]},
        user({"type": "image_url", "image_url": {"url": PLACE, "max_pixels": 9}}, {"text": "t"}),
        calling("{}", content=None),
    ]
    once = normalise_messages(messages, WITH_TOOLS)
    assert normalise_messages(once, WITH_TOOLS) == once


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (calling("{}"), "field 'tool_calls': found some, which the chat template drops"),
        (calling("{}", content="B"), "field 'tool_calls': found some, which the chat template drops"),
        ({"role": "assistant", "content": "B", "function_call": {"name": "f"}}, "field 'function_call': found some"),
        ({"role": "assistant", "content": "B", "audio": {"id": "a"}}, "field 'audio': found some"),
        ({**HI, "images": ["a.png"]}, "field 'images': found some; expected images and videos as items of 'content'"),
        (user({**IMAGE, "max_pixel": 9}), "item 0: found 'max_pixel' in an item of type 'image'; .* min_pixels, max_p"),
        (user({**IMAGE, "fps": 2}), "found 'fps' in an item of type 'image'"),
        (user({**IMAGE, "max_pixels": 0}), "item 0: max_pixels: found 0; expected an integer of at least 1"),
        (user({**IMAGE, "max_pixels": "9"}), "item 0: max_pixels: found '9'"),
        (user({**IMAGE, "max_pixels": 9, "min_pixels": 10}), "min_pixels: found 10; expected at most max_pixels, 9"),
        (user({**IMAGE, "resized_height": 28}), "resized_width: found None; expected a number of pixels beside res"),
        (user({"type": "video", "url": "a.mp4", "fps": 0}), "item 0: fps: found 0"),
        (user({"type": "video", "url": "a.mp4", "nframes": 8}), "found 'nframes' in an item .* fps says how many"),
        (user({"type": "video", "url": "a.mp4", "start": 8}), "found 'start' in an item of type 'video'"),
        (user({"type": "text", "text": "t", "txt": "u"}), "found 'txt' in an item of type 'text'; expected some of"),
        (user({"type": "input_image", "file_id": "file-1"}), "item 0: field 'image_url' has no 'url'"),
        (user({"type": "input_audio", "input_audio": {"data": ""}}), "field 'type': found 'input_audio'"),
        (user({"type": "file", "file": {"file_id": "f"}}), "field 'type': found 'file'"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(message, found):
    with pytest.raises(MessageError, match=found):
        render_conversation([message], TEMPLATE)
        extract_media([message], TEMPLATE)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("{", r"tool_calls'\[0\].function.arguments: found invalid JSON"),
        ("[1]", r"tool_calls'\[0\].function.arguments: found a JSON list; expected an object"),
    ],
)
def test_arguments_that_are_no_objects_are_named(arguments, found):
    with pytest.raises(MessageError, match=found):
        render_conversation([HI, calling(arguments)], WITH_TOOLS)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (
            {"content": "<think>a</think>b", "reasoning_content": "c"},
            "message 1: found <think> in 'content' beside 'reasoning_content'; expected the thought in one of them",
        ),
        (
            {"content": [{"type": "text", "text": " <think>a</think>b"}], "reasoning": "c"},
            "<think> in 'content' beside 'reasoning'",
        ),
        ({"content": "b", "reasoning_content": "c", "reasoning": "d"}, "'reasoning_content' and 'reasoning' with diff"),
        ({"content": "b", "reasoning_content": ["c"]}, "field 'reasoning_content': found list; expected a string"),
        (
            {"content": None, "tool_calls": [{"arguments": {}}]},
            r"'tool_calls'\[0\].name: found None; expected the name",
        ),
    ],
)
def test_a_thought_is_there_once_and_a_call_has_a_name(message, found):
    with pytest.raises(MessageError, match=found):
        render_conversation([HI, {"role": "assistant", **message}], FAMILY_TEMPLATE)


def test_a_blank_thought_is_none():
    said = {"role": "assistant", "content": "<think>a</think>b", "reasoning_content": " ", "reasoning": ""}
    assert render_conversation([HI, said], FAMILY_TEMPLATE).endswith("<think>a</think>\nb")


def test_unknown_fields_of_messages_are_named_in_a_warning():
    with pytest.warns(UserWarning, match="message 0: unknown to the chat template, and ignored: contents"):
        render_conversation([{**HI, "contents": "?"}], TEMPLATE)
