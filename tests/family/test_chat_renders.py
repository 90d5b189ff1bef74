"""The family's chat template, rendered by transformers 5.24 and here: the same bytes."""

import json

import pytest
from helpers_family import CHATS, GOLDEN

from glm4v_jax.inputs.processor import Glm4vProcessor

RENDERS = json.loads((GOLDEN / "chat_renders.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def processor(family_checkpoint):
    return Glm4vProcessor.from_pretrained(family_checkpoint("flash"))


def render(processor, chat):
    arguments = {"add_generation_prompt": True, **chat}
    return processor.apply_chat_template(arguments.pop("messages"), tokenize=False, **arguments)


def test_every_conversation_has_a_render():
    assert RENDERS.keys() == CHATS.keys()


@pytest.mark.parametrize("name", CHATS)
def test_renders_equal_byte_for_byte(processor, name):
    assert render(processor, CHATS[name]) == RENDERS[name]


def openai(message):
    """The message as clients of OpenAI's interface send it back: no content beside calls, arguments as JSON."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "id": f"call_{index}", "function": {**call["function"], "arguments": json.dumps(arguments)}}
        for index, call in enumerate(message["tool_calls"])
        for arguments in [call["function"]["arguments"]]
    ]
    return {**message, "tool_calls": calls, "content": message["content"] or None}


@pytest.mark.parametrize("name", ["tools, called", "tools, answered"])
def test_spellings_of_openai_render_alike(processor, name):
    messages = [openai(message) for message in CHATS[name]["messages"]]
    assert any(message["content"] is None for message in messages)
    assert render(processor, {**CHATS[name], "messages": messages}) == RENDERS[name]
