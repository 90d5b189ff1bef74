import json
import pathlib

import numpy as np
import pytest

from glm4v_jax.errors import CheckpointError, MessageError
from glm4v_jax.inputs.text.chat_template import (
    choose_template,
    load_chat_template,
    printable_messages,
    render_conversation,
    render_template,
    template_variables,
)
from glm4v_jax.inputs.text.messages import extract_media
from tests.helpers_tokenizer import GOLDEN

TEMPLATE = (GOLDEN / "checkpoint" / "chat_template.jinja").read_text()
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
WITH_TOOLS = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% elif m.role == \"tool\" %}<T>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<A>{{ m.content or '' }}{{ (m.tool_calls or []) | tojson }}{% endif %}{% endfor %}"
)


def user(*items):
    return {"role": "user", "content": list(items)}


def text(value):
    return {"type": "text", "text": value}


A = {"role": "user", "content": "A"}
C = {"role": "user", "content": "C"}
HI = {"role": "user", "content": "Hi"}
IMAGE = {"type": "image", "url": "cat.png"}

CONVERSATIONS = {
    "user_str": [HI],
    "sys_user_str": [{"role": "system", "content": "Be brief."}, HI],
    "image_text": [user(IMAGE, text("What kind of dog is this?"))],
    "text_image": [user(text("Look: "), IMAGE)],
    "two_images": [user(IMAGE, IMAGE, text("Compare."))],
    "video": [user({"type": "video", "url": "v.mp4"}, text("Describe this video."))],
    "img_key_no_type": [user({"image": "cat.png"}, text("t"))],
    "video_and_image_keys": [user({"video": "v.mp4", "image": "cat.png"})],
    "sys_list": [{"role": "system", "content": [text("S")]}, HI],
    "multi_turn": [A, {"role": "assistant", "content": "B"}, C],
    "multi_turn_asst_list": [A, {"role": "assistant", "content": [text("B")]}, C],
    "asst_metadata": [A, {"role": "assistant", "metadata": "tool", "content": "{}"}, C],
    "observation_role": [A, {"role": "observation", "content": "B"}, C],
    "asst_think": [A, {"role": "assistant", "content": "<think>x</think><answer>y</answer>"}, C],
    "empty_text": [{"role": "user", "content": ""}],
    "text_with_newlines": [{"role": "user", "content": "\n a \n\n"}],
    "item_multi_text": [user(text("a"), text("b"))],
    "image_url_type": [user({"type": "image_url", "image_url": {"url": "cat.png"}}, text("t"))],
}
RENDERS = json.loads((GOLDEN / "facts" / "chat_template_renders.json").read_text())

IMAGE_TAGS = "<|begin_of_image|><|image|><|end_of_image|>"
# Where the checks do better than the bare template: what they give, or the error.
BETTER = {
    "sys_list": "[gMASK]<sop><|system|>\nS<|user|>\nHi",
    "multi_turn_asst_list": "[gMASK]<sop><|user|>\nA<|assistant|>\nB<|user|>\nC",
    "image_url_type": f"[gMASK]<sop><|user|>\n{IMAGE_TAGS}t",
    "video_and_image_keys": "message 0, item 0: field 'type' is missing and the item has image and video",
    "observation_role": "message 1: field 'role' is 'observation', which the chat template drops silently; "
    "expected one of 'system', 'user', 'assistant'",
}


def test_the_golden_renders_are_all_here():
    assert len(RENDERS) == 36
    assert {key.partition("|")[0] for key in RENDERS} == set(CONVERSATIONS)


@pytest.mark.parametrize("key", RENDERS)
def test_the_bare_template_gives_the_golden_renders(key):
    name, _, prompt = key.partition("|")
    assert render_template(TEMPLATE, CONVERSATIONS[name], add_generation_prompt=prompt == "True") == RENDERS[key]


@pytest.mark.parametrize("key", RENDERS)
def test_checked_renders(key):
    name, _, prompt = key.partition("|")
    add = prompt == "True"
    expected = RENDERS[key]
    if name in BETTER:
        expected = BETTER[name] + ("<|assistant|>\n" if add else "")
        if BETTER[name].startswith("message"):
            with pytest.raises(MessageError, match=BETTER[name]):
                render_conversation(CONVERSATIONS[name], TEMPLATE, add_generation_prompt=add)
            return
    assert render_conversation(CONVERSATIONS[name], TEMPLATE, add_generation_prompt=add) == expected


@pytest.mark.parametrize(
    "template", [TEMPLATE, CHATML, WITH_TOOLS, TRIMMING], ids=["glm", "chatml", "tools", "trimming"]
)
@pytest.mark.parametrize("kwargs", [{}, {"add_generation_prompt": True}, {"continue_final_message": True}], ids=str)
def test_renders_equal_the_reference(template, kwargs):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    conversations = [
        [HI],
        [A, {"role": "assistant", "content": "B"}, C],
        [A, {"role": "assistant", "content": " \n Sure, here is the "}],
        [A, {"role": "assistant", "content": "B\n"}],
    ]
    if template is TEMPLATE:
        conversations += [[user(IMAGE, text("a"), text("b  "))], [user(text("t"), IMAGE)]]
    for conversation in conversations:
        expected = utils.render_jinja_template([conversation], chat_template=template, **kwargs)[0][0]
        assert render_conversation(conversation, template, **kwargs) == expected


HELPERS = """{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}
  {%- if loop.index > 3 %}{% break %}{% endif -%}
  {%- set ns.n = ns.n + 1 -%}
  {% generation %}{{ m.role }}{{ {'b': '<&é>', 'a': [1, none]} | tojson }}{{ [1] | tojson(indent=2) }}
  {%- endgeneration %}
  {%- if m.role == 'user' %}{% continue %}{% endif %}
user assistant {{ strftime_now('%Y') }}
{%- endfor %}
{{ ns.n }} {{ bos_token }} {{ tools }} {{ documents | length if documents else 'none' }}
"""


def test_helper_functions_equal_the_reference():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    conversation = [A, {"role": "assistant", "content": "B"}, C, A, C]
    for variables in ({"bos_token": "<b>"}, {"tools": [{"name": "f"}], "documents": [{"title": "t", "text": "x"}]}):
        expected = utils.render_jinja_template([conversation], chat_template=HELPERS, **variables)[0][0]
        assert render_template(HELPERS, conversation, **variables) == expected


def test_messages_given_are_not_changed():
    conversation = [
        {"role": "system", "content": [text("S")]},
        user({"image": "cat.png"}, {"type": "text", "text": "t", "image": None}),
    ]
    before = json.dumps(conversation)
    render_conversation(conversation, TEMPLATE, continue_final_message=True)
    assert json.dumps(conversation) == before


def test_empty_columns_of_a_table_are_not_an_images():
    conversation = [user({"type": "text", "text": "t", "image": None, "video": None})]
    assert "<|image|>" in render_template(TEMPLATE, conversation).replace("video", "image")
    assert render_conversation(conversation, TEMPLATE) == "[gMASK]<sop><|user|>\nt"
    assert extract_media(conversation, TEMPLATE) == ([], [])


def test_a_template_that_names_no_role_takes_all():
    conversation = [{"role": "developer", "content": "D"}, {"role": "user", "content": [text("a")]}]
    with pytest.raises(MessageError, match="the chat template refuses the conversation: can only concatenate"):
        render_conversation(conversation, CHATML)
    conversation[1]["content"] = "a"
    assert render_conversation(conversation, CHATML) == (
        "<|im_start|>developer\nD<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
    )


def test_a_template_with_more_roles_and_types_takes_them():
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    conversation = [A, call, {"role": "tool", "content": [text("4"), text("2")]}]
    assert render_conversation(conversation, WITH_TOOLS) == '<U>A<A>[{"name": "f"}]<T>42'
    with pytest.raises(MessageError, match="message 1: field 'tool_calls': found some, which the chat template drops"):
        render_conversation(conversation, TEMPLATE)
    with pytest.raises(MessageError, match="message 0: field 'role' is 'observation', which the chat template drops"):
        render_conversation([{"role": "observation", "content": "4"}], WITH_TOOLS)
    template = "{% for i in messages[0].content %}{% if i.type == 'audio' %}<S>{% endif %}{% endfor %}'user'"
    assert render_conversation([user({"type": "audio", "url": "a.wav"})], template) == "<S>'user'"


@pytest.mark.parametrize("role", ["image", "text", "User", "observation", "tool"])
def test_roles_that_the_template_drops_are_refused(role):
    with pytest.raises(MessageError, match=f"conversation 4, message 1: field 'role' is '{role}'"):
        render_conversation([A, {"role": role, "content": "B"}, C], TEMPLATE, where="conversation 4, ")


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("Hi", "found str; expected a list of messages"),
        (HI, "found dict; expected a list of messages"),
        ([], "found no message"),
        (["Hi"], "message 0: found str; expected an object with 'role' and 'content'"),
        ([{"content": "Hi"}], "message 0: field 'role': found nothing"),
        ([{"role": 3, "content": "Hi"}], "message 0: field 'role': found int"),
        ([A, {"role": "assistant"}], "message 1: field 'content': found nothing"),
        ([A, {"role": "assistant", "content": None}], "message 1: field 'content': found nothing"),
        ([{"role": "user", "content": 7}], "message 0: field 'content': found int"),
        ([{"role": "user", "content": {"type": "text"}}], "message 0: field 'content': found dict"),
        ([user("Hi")], "message 0, item 0: found str; expected an object with 'type'"),
        ([A, user(IMAGE, {"type": "text"})], "message 1, item 1: field 'text': found nothing"),
        ([user({"type": "text", "content": "Hi"})], "message 0, item 0: field 'text': found nothing"),
        ([user({"type": "text", "text": 5})], "message 0, item 0: field 'text': found int"),
        ([user({"type": "audio", "url": "a.wav"})], "field 'type': found 'audio'; expected 'text', 'image' or 'video'"),
        ([user({"type": ["image"]})], r"field 'type': found \['image'\]"),
        ([user({"url": "cat.png"})], "field 'type' is missing and the item has neither"),
        ([user({"image": "cat.png", "text": "t"})], "field 'type' is missing and the item has text and image"),
        ([user({"type": "text", "text": "t", "image": "cat.png"})], "type 'text' has the field 'image'"),
        ([user({"type": "image", "video": "v.mp4"})], "type 'image' has the field 'video'"),
        ([user({"type": "image", "url": "a.png", "path": "b.png"})], "the image has the fields 'url', 'path'"),
        ([user({"type": "image_url", "image_url": {"detail": "low"}})], "field 'image_url' has no 'url'"),
        ([user({"type": "image_url", "url": "cat.png"})], "field 'image_url' has no 'url'"),
        ([{"role": "system", "content": [IMAGE]}], "message 0: .* takes only text .* role 'system', .* image"),
        ([A, {"role": "assistant", "content": [text("a"), IMAGE]}], "message 1: the chat template takes only text"),
    ],
)
def test_malformed_conversations_are_refused(conversation, message):
    with pytest.raises(MessageError, match=message):
        render_conversation(conversation, TEMPLATE)


def test_files_are_not_printed_where_a_template_prints_what_it_gets():
    class File(bytes):
        def __repr__(self):
            raise AssertionError("printed")

    items = [{"type": "image", "image": File(b"x")}, {"type": "video", "video": [File(b"x")]}, text("[{")]
    with pytest.raises(MessageError, match="takes only text"):
        render_conversation([A, {"role": "assistant", "content": items}], TEMPLATE)
    assert "[{" in render_conversation([{"role": "user", "content": items}], TEMPLATE)


def test_continue_final_message_is_checked():
    with pytest.raises(MessageError, match="exclude each other"):
        render_conversation([HI], TEMPLATE, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(MessageError, match="message 0: continue_final_message found no text"):
        render_conversation([user(IMAGE)], TEMPLATE, continue_final_message=True)
    with pytest.raises(MessageError, match="does not print the final message"):
        render_conversation([HI], "{{ messages[0].content | upper }}'user'", continue_final_message=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no ' + messages[0].content) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(999999999) | list }}",
        "{{ messages[0].nothing.more }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ 1 / 0 }}",
        "{{ '{'.format() }}",
        "{{ 'a'.index('b') }}",
    ],
)
def test_templates_that_fail_or_reach_out_are_stopped(template):
    with pytest.raises(MessageError, match="the chat template refuses the conversation"):
        render_template(template, [HI])


def test_a_template_that_does_not_parse_is_named():
    with pytest.raises(CheckpointError, match="chat template, line 2: "):
        render_template("\n{% if %}", [HI])
    with pytest.raises(CheckpointError, match="chat template, line 1: "):
        template_variables("{{")


def test_template_variables():
    assert template_variables(TEMPLATE) == {"messages", "add_generation_prompt"}


def test_media_come_in_the_order_of_the_conversation():
    frames = [np.zeros((2, 2, 3), np.uint8)] * 2
    array = np.ones((4, 4, 3), np.uint8)
    conversation = [
        {"role": "system", "content": "S"},
        user(text("a"), {"type": "image", "url": "1.png"}, {"type": "video", "path": "1.mp4"}, {"image": "2.png"}),
        {"role": "assistant", "content": "b"},
        user(
            {"type": "video", "video": frames},
            {"type": "image", "base64": "AAAA"},
            {"type": "image", "base64": "data:image/png;base64,BBBB"},
            {"type": "image_url", "image_url": "3.png"},
            {"type": "video_url", "video_url": {"url": "http://127.0.0.1/2.mp4"}},
            {"type": "image", "image": array},
            {"type": "image", "path": pathlib.Path("4.png")},
        ),
    ]
    images, videos = extract_media(conversation, TEMPLATE)
    assert images[:3] == ["1.png", "2.png", "data:image/unknown;base64,AAAA"]
    assert images[3:5] == ["data:image/png;base64,BBBB", "3.png"]
    assert images[5] is array
    assert images[6] == pathlib.Path("4.png")
    assert videos == ["1.mp4", frames, "http://127.0.0.1/2.mp4"]
    with pytest.raises(MessageError, match=r"message 1, item 1: the image has no source; expected one of .* 'url'"):
        extract_media([HI, user(text("a"), {"type": "image"})], TEMPLATE)


def test_frames_with_a_rate_have_been_sampled():
    """Frames have no rate of their own, and what the item says counts; a file is sampled at the item's."""
    frames = [np.zeros((28, 28, 3), np.uint8)] * 4
    items = [{"type": "video", "video": video} for video in (frames, frames, "1.mp4")]
    _, videos = extract_media([user(items[0] | {"fps": 2}, items[1], items[2] | {"fps": 2})], TEMPLATE)
    assert videos[0].frames is frames and videos[0].metadata(9).timestamps == [0, 0.5, 1, 1.5]
    assert videos[1] is frames
    assert (videos[2].source, videos[2].options) == ("1.mp4", {"fps": 2, "do_sample_frames": True})
    for rate in ("fast", 0, True):
        with pytest.raises(MessageError, match=f"message 0, item 0: fps of the frames: found {rate!r}; expected a num"):
            extract_media([user({"type": "video", "video": frames, "fps": rate})], TEMPLATE)


def test_an_image_without_a_source_can_be_rendered():
    assert render_conversation([user({"type": "image"}, text("t"))], TEMPLATE) == f"[gMASK]<sop><|user|>\n{IMAGE_TAGS}t"


def test_texts_are_joined_where_the_template_takes_no_items():
    message = {"role": "assistant", "metadata": "m", "content": [text("a"), text("b")]}
    assert printable_messages([message], TEMPLATE) == [{"role": "assistant", "metadata": "m", "content": "ab"}]
    with_items = "{% for m in messages %}{{ m.metadata }}{% for x in m.content %}{{ x.text }}|{% endfor %}{% endfor %}"
    assert render_conversation([message], with_items) == "ma|b|"


def test_where_templates_are_found(tmp_path):
    assert load_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "t"}]}')
    assert load_chat_template(tmp_path) == {"default": "t"}
    (tmp_path / "processor_config.json").write_text('{"chat_template": "p"}')
    assert load_chat_template(tmp_path) == "p"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert load_chat_template(tmp_path) == "j"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r")
    assert load_chat_template(tmp_path) == {"default": "j", "rag": "r"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "l"}')
    assert load_chat_template(tmp_path) == "l"
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"chat_template\.json: chat_template: found NoneType"):
        load_chat_template(tmp_path)


def test_choice_among_templates():
    several = {"default": "d", "rag": "r"}
    assert choose_template("t") == "t"
    assert choose_template(several) == "d"
    assert choose_template(several, "rag") == "r"
    assert choose_template(several, "{{ messages }}") == "{{ messages }}"
    assert choose_template(None, "s") == "s"
    with pytest.raises(CheckpointError, match=r"ckpt: found no chat template; expected chat_template\.jinja, "):
        choose_template(None, where="ckpt")
    with pytest.raises(
        CheckpointError, match="chat_template: found the chat templates rag; expected one that is called 'default'"
    ):
        choose_template({"rag": "r"})


@pytest.mark.parametrize(
    "template", ["", " \n", "{# 'user' #}", "{% for m in messages if m.role == 'USER' %}x{% endfor %}"]
)
def test_a_template_that_prints_nothing_is_refused(template):
    with pytest.raises(CheckpointError, match="prints nothing of a user's message: it is empty or broken"):
        render_conversation([HI], template)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tools.jinja"])
def test_a_template_that_is_not_utf8_is_named(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=rf"{path.name}: found invalid UTF-8"):
        load_chat_template(tmp_path)
