"""What clients read: streams say the same as bodies; tokens are written by hand in the place of a model."""

import dataclasses
import json

import httpx2
import numpy as np
import openai
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_generation import script
from helpers_serve import MODEL, data_url, wait_until

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.generate.token_logprobs import TokenLogprob, TokenLogprobs
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer
from glm4v_jax.serve.requests import ApiRequest
from glm4v_jax.serve.responses import DONE, Reply, event
from tests.helpers_tokenizer import FAMILY_TEMPLATE

EOS = 775  # <|user|>
TEXT = "\n<think> two and two\n</think>\n<answer> It is <|begin_of_box|>4<|end_of_box|>, é. "


@pytest.fixture(scope="module")
def tokenizer():
    return Glm4vTokenizer.from_pretrained(RANDOM_CHECKPOINT)


def answered(tokenizer, text, *, request=None, prompt="Hello", size=1, end=(EOS,), images=(), **options):
    """The body and the choices of a stream of one answer, whose tokens come `size` at a time."""
    request = request or ApiRequest((), True, {})
    prompt = dataclasses.replace(Prompt.of_text(tokenizer.encode(prompt)), image_sizes=images)
    config = GenerationConfig(max_new_tokens=200, eos_token_id=EOS, logprobs=request.options.get("logprobs"), **options)
    sequence = SequenceState(prompt, config, tokenizer, 1000)
    reply = Reply(request, [prompt], "tiny", tokenizer)
    stream, choices = reply.choice_stream(0), []
    tokens = [*(tokenizer.encode(text) if isinstance(text, str) else text), *end]
    for i in range(0, len(tokens), size):
        some = tokens[i : i + size]
        entries = [TokenLogprob(token, -0.5, ((token, -0.5), (7, -np.inf))) for token in some]
        told = None if config.logprobs is None else TokenLogprobs.of(entries)
        delta, _ = sequence.take(some, i + size >= len(tokens), told)
        choices += stream.push(delta)
        if delta.completion is not None:
            break
    return reply.body([sequence.completion()]), choices


def joined(choices, name):
    return "".join(choice["delta"].get(name) or "" for choice in choices)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "thought", "content"),
    [
        (TEXT, "two and two", "It is <|begin_of_box|>4<|end_of_box|>, é."),
        ("<think>only a thought", "only a thought", ""),
        ("just text\n", None, "just text"),
        ("", None, ""),
    ],
)
def test_a_stream_says_the_same_as_the_body(tokenizer, text, thought, content, size):
    body, choices = answered(tokenizer, text, size=size)
    (choice,) = body["choices"]
    message = {"role": "assistant", "content": content, "reasoning": thought, "reasoning_content": thought}
    assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert (joined(choices, "reasoning"), joined(choices, "content")) == (thought or "", content)
    assert joined(choices, "reasoning_content") == joined(choices, "reasoning")
    assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}


@pytest.mark.parametrize("size", [1, 1000])
def test_a_template_may_open_the_thought(tokenizer, size):
    body, choices = answered(tokenizer, "a thought</think>an answer", prompt="Hello<think>\n", size=size)
    message = body["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("a thought", "an answer")
    assert (joined(choices, "reasoning"), joined(choices, "content")) == ("a thought", "an answer")
    body, _ = answered(tokenizer, "a thought", prompt="Hello<think>", end=())
    assert body["choices"][0]["message"]["reasoning"] == "a thought"
    count = body["usage"]["completion_tokens"]
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": count}


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_tool_calls(tokenizer, size):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}
    call = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>4</arg_value>\n</tool_call>"
    request = ApiRequest((), True, {}, tools=(tool,))
    for text, content in ((f"<think>hm</think>I add.\n{call}", "I add."), (call, None)):
        body, choices = answered(tokenizer, text, request=request, size=size)
        message = body["choices"][0]["message"]
        (found,) = message["tool_calls"]
        assert found["function"] == {"name": "add", "arguments": '{"a": 4}'} and message["content"] == content
        assert body["choices"][0]["finish_reason"] == choices[-1]["finish_reason"] == "tool_calls"
        calls = [one for choice in choices for one in choice["delta"].get("tool_calls", ())]
        assert "".join(one["function"]["arguments"] for one in calls) == '{"a": 4}'
        assert calls[0]["function"]["name"] == "add" and joined(choices, "content") == (content or "")


@pytest.mark.parametrize("size", [1, 1000])
def test_tags_in_an_answer_of_a_grammar_are_text(tokenizer, size):
    request = ApiRequest((), True, {"regex": ".{11}"})
    # As text and not as the token of its name, which no grammar allows.
    tokens = [*tokenizer.encode("<think>hm</think><answer>"), *(tokenizer.encode(x)[0] for x in "a <think> b")]
    body, choices = answered(tokenizer, tokens, request=request, size=size, regex=".{11}")
    message = body["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm", "a <think> b")
    assert (joined(choices, "reasoning"), joined(choices, "content")) == ("hm", "a <think> b")


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (((640, 480),), {"boxes": [[0, 0, 500, 500]], "pixel_boxes": [[0, 0, 320, 240]]}),
        (((640, 480), (10, 10)), {"boxes": [[0, 0, 500, 500]]}),
        ((), {"boxes": [[0, 0, 500, 500]]}),
    ],
)
def test_boxes_are_fields_too(tokenizer, images, expected):
    text = "<think>[[1,2,3,4]]</think><answer>At <|begin_of_box|>[[0,0,500,500]]<|end_of_box|>"
    body, choices = answered(tokenizer, text, images=images)
    message = body["choices"][0]["message"]
    assert {name: message.get(name) for name in expected} == expected == choices[-1]["delta"]
    assert "<|begin_of_box|>[[0,0,500,500]]<|end_of_box|>" in message["content"]
    body, choices = answered(tokenizer, "No boxes.", images=images)
    assert "boxes" not in body["choices"][0]["message"] and choices[-1]["delta"] == {}


def test_thoughts_are_left_out_where_they_are_not_wanted(tokenizer):
    request = ApiRequest((), True, {}, with_reasoning=False)
    body, choices = answered(tokenizer, TEXT, request=request)
    assert body["choices"][0]["message"]["reasoning"] is None and joined(choices, "reasoning") == ""


def test_usage_counts_the_tokens_of_the_thought(tokenizer):
    body, _ = answered(tokenizer, TEXT, prompt="Hello")
    thought = len(tokenizer.encode(TEXT.partition("</think>")[0] + "</think>"))
    prompt, new = len(tokenizer.encode("Hello")), len(tokenizer.encode(TEXT)) + 1
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_log_probabilities_of_a_chat(tokenizer, size):
    body, choices = answered(tokenizer, TEXT, request=ApiRequest((), True, {"logprobs": 2}), size=size)
    found = body["choices"][0]["logprobs"]["content"]
    assert [entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]] == found
    assert b"".join(bytes(entry["bytes"]) for entry in found[:-1]).decode() == TEXT
    assert found[0]["logprob"] == -0.5
    assert [entry["logprob"] for entry in found[0]["top_logprobs"]] == [-0.5, -9999.0]


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_texts_and_their_log_probabilities(tokenizer, size):
    body, choices = answered(tokenizer, TEXT, request=ApiRequest((), False, {"logprobs": 2}), size=size)
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == TEXT
    assert "".join(choice["text"] for choice in choices) == TEXT
    found = body["choices"][0]["logprobs"]
    offsets = [one for choice in choices for one in (choice["logprobs"] or {"text_offset": []})["text_offset"]]
    assert len(found["tokens"]) == len(found["text_offset"]) == len(offsets) and offsets[0] == 0
    assert found["text_offset"][1] == len(found["tokens"][0]) and found["top_logprobs"][0][found["tokens"][0]] == -0.5


def test_finish_reasons(tokenizer):
    def reason(text, **options):
        choice = answered(tokenizer, text, **options)[0]["choices"][0]
        return choice["finish_reason"], choice["stop_reason"]

    assert reason("a b", end=()) == ("length", None)
    assert reason("a STOP b", stop_strings=["STOP"]) == ("stop", "STOP")
    assert reason("abc " * 200, stop_repetition=True) == ("stop", "repetition")
    assert reason("a b", request=ApiRequest((), True, {}, stop_tokens=(EOS,))) == ("stop", EOS)


def test_events_of_a_stream(tokenizer):
    prompt = Prompt.of_text(tokenizer.encode("Hello"))
    request = ApiRequest((), True, {}, n=2, is_stream=True, with_usage=True, warnings=("user: ignored",))
    reply = Reply(request, [prompt], "tiny", tokenizer)
    first = reply.first_chunks()
    assert [chunk["choices"][0]["index"] for chunk in first] == [0, 1]
    assert all(chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""} for chunk in first)
    assert first[0]["warnings"] == ["user: ignored"] and "warnings" not in first[1]
    assert first[0]["usage"] is None and first[0]["object"] == "chat.completion.chunk"
    completion = dataclasses.replace(begin(tokenizer).completion(), tokens=(1, 2))
    (last,) = reply.last_chunks([completion, completion])
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert last["usage"]["prompt_tokens"] == len(prompt) and last["id"] == first[0]["id"]
    assert json.loads(event(last).removeprefix(b"data: ")) == last and DONE == b"data: [DONE]\n\n"


def test_every_chunk_but_that_of_token_counts_has_a_choice(tokenizer):
    request = ApiRequest((), False, {}, n=2, is_stream=True, warnings=("user: ignored",))
    (chunk,) = Reply(request, [Prompt.of_text([5])], "tiny", tokenizer).first_chunks()
    assert chunk["warnings"] == ["user: ignored"] and chunk["choices"][0]["text"] == ""


def begin(tokenizer):
    return SequenceState(Prompt.of_text([5]), GenerationConfig(eos_token_id=EOS), tokenizer, 1000)


@pytest.mark.slow
def test_a_client_calls_a_tool_and_sends_back_what_it_shows(serving, monkeypatch, tiny_engine):
    """With the template of the siblings: thought, text and calls, then a result with an image in it."""
    monkeypatch.setattr(tiny_engine.processor, "chat_template", FAMILY_TEMPLATE)
    tokenizer, texts = tiny_engine.processor.tokenizer, script(monkeypatch, tiny_engine.processor.tokenizer)
    call = "\n<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>é</arg_value>\n</tool_call>"
    said = f"<think>Hm.</think>\nOne <answer>.{call}{call}"
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {}}}}]
    history = [{"role": "user", "content": "What time is it?"}]
    asked = {"model": MODEL, "messages": history, "temperature": 0}
    with (
        serving(max_model_len=512) as (service, address),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client,
    ):
        wait_until(lambda: service.state == "ready")
        texts += [said, said, "Noon."]
        (choice,) = client.chat.completions.create(**asked, tools=tools).choices
        with client.chat.completions.stream(**asked, tools=tools) as stream:
            streamed = stream.get_final_completion().choices[0]
        for found in (choice, streamed):
            assert found.finish_reason == "tool_calls" and found.message.content == "One <answer>."
            assert [one.function.name for one in found.message.tool_calls] == ["look", "look"]
            assert json.loads(found.message.tool_calls[0].function.arguments) == {"at": "é"}
        assert choice.message.reasoning == "Hm."
        image = {"type": "image_url", "image_url": {"url": data_url(PIL.Image.new("RGB", (56, 56)))}}
        result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "It is noon."}
        history += [choice.message, result, {**result, "content": [{"type": "text", "text": "A clock."}, image]}]
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        assert client.chat.completions.create(**asked, extra_body=off).choices[0].message.content == "Noon."
        history[1] = choice.message.model_dump(exclude_none=True)
        shown = httpx2.post(f"{address}/tokenize", json={"messages": history, **off}, timeout=60).json()
    text = tokenizer.decode(shown["tokens"])
    assert f"/nothink<|assistant|>\n<think>Hm.</think>\nOne <answer>.{call}{call}<|observation|>" in text
    assert text.count("<|image|>") == 9 and text.endswith("\n</tool_response><|assistant|>\n<think></think>\n")
