"""Bodies of requests: what is asked of the engine, what is refused by name, and what is ignored with a warning."""

import dataclasses
import json

import pytest

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.errors import GenerationError, MediaError, MessageError
from glm4v_jax.serve.errors import ApiError, client_error
from glm4v_jax.serve.requests import Served, chat_request, generation_config, text_request, tokenize_request

SERVED = Served("tiny", 1000)
THINKING = Served("tiny", 1000, frozenset({"messages", "enable_thinking", "tools"}))
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def asked(served=SERVED, **fields):
    return chat_request({"messages": HELLO, "seed": 1, **fields}, served)


def refusal(served=SERVED, read=chat_request, **fields):
    with pytest.raises(ApiError) as raised:
        read({"messages": HELLO, **fields} if read is chat_request else fields, served)
    return raised.value


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        (dict(temperature=0), dict(do_sample=False)),
        (dict(temperature=0.7), dict(do_sample=True, temperature=0.7)),
        (dict(top_p=0.5, min_p=0.1, repetition_penalty=1.1), dict(top_p=0.5, min_p=0.1, repetition_penalty=1.1)),
        (dict(top_k=-1), dict(top_k=0)),
        (dict(top_k=3), dict(top_k=3)),
        (dict(seed=-1), dict(seed=2**32 - 1)),
        (dict(stop="a"), dict(stop_strings=("a",))),
        (dict(stop=["a", "", "b"]), dict(stop_strings=("a", "b"))),
        (dict(stop=[]), {}),
        (dict(logit_bias={"5": -100}), dict(sequence_bias=(((5,), -100.0),))),
        (dict(ignore_eos=True), dict(eos_token_id=-1)),
        (dict(min_tokens=3), dict(min_new_tokens=3)),
        (dict(logprobs=True), dict(logprobs=0)),
        (dict(logprobs=True, top_logprobs=4), dict(logprobs=4)),
        (dict(logprobs=False, top_logprobs=0), {}),
        (dict(response_format={"type": "text"}), {}),
        (dict(response_format={"type": "json_object"}), dict(json_schema={})),
        (
            dict(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}),
            dict(json_schema={"type": "object"}),
        ),
        (dict(structured_outputs={"regex": "a+"}), dict(regex="a+")),
        (dict(structured_outputs={"choice": ["a", "b"]}), dict(choices=("a", "b"))),
        (dict(structured_outputs={"json": {"type": "object"}, "regex": None}), dict(json_schema={"type": "object"})),
        (dict(guided_choice=["a"]), dict(choices=("a",))),
        (dict(guided_regex="a"), dict(regex="a")),
        (dict(guided_json='{"type": "object"}'), dict(json_schema='{"type": "object"}')),
        (dict(temperature=None, stop=None, n=None), {}),
    ],
)
def test_fields_become_options(fields, options):
    assert asked(**fields).options == {"seed": 1} | options


def test_without_a_seed_answers_may_differ():
    body = {"messages": HELLO}
    assert chat_request(body, SERVED).options["seed"] != chat_request(body, SERVED).options["seed"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (dict(temperature=-1), "temperature", "temperature: found -1; expected a number of at least 0"),
        (dict(temperature="hot"), "temperature", "temperature: found 'hot'"),
        (dict(n=0), "n", "n: found 0; expected an integer of at least 1"),
        (dict(n=999), "n", "n: found 999 choices; expected at most 128, as many as this server takes"),
        (dict(stream_options={"include_usage": True}), "stream_options", "expected stream: true beside it"),
        (
            dict(stream=True, stream_options={"include_usage": 1}),
            "stream_options.include_usage",
            "found 1; expected true",
        ),
        (dict(thinking_token_budget=-1), "thinking_token_budget", "at least 0; 0 switches thoughts off"),
        (dict(tools="f"), "tools", "tools: found 'f'; expected a list of objects"),
        (dict(guided_choice=[]), "guided_choice", "guided_choice: found []; expected a list of at least one string"),
        (dict(n=True), "n", "n: found True"),
        (dict(top_logprobs=3), "top_logprobs", "top_logprobs: found 3; expected logprobs: true beside it"),
        (dict(logprobs=True, top_logprobs=21), "top_logprobs", "from 0 to 20"),
        (dict(logit_bias={"5": 101}), "logit_bias", "from -100 to 100"),
        (dict(logit_bias={"five": 1}), "logit_bias", "token ids"),
        (dict(logit_bias={str(token): 1 for token in range(301)}), "logit_bias", "at most 300 token ids"),
        (dict(stop_token_ids=[2**40]), "stop_token_ids", "at most 8 token ids"),
        (dict(stop_token_ids=list(range(9))), "stop_token_ids", "at most 8 token ids"),
        (dict(frequency_penalty=0.5), "frequency_penalty", "frequency_penalty: found 0.5; expected none"),
        (dict(modalities=["text", "audio"]), "modalities", "expected none"),
        (dict(continue_final_message=True), "continue_final_message", "expected none"),
        (dict(best_of=2), "best_of", "best_of: found 2; expected n"),
        (dict(response_format={"type": "xml"}), "response_format.type", "found 'xml'"),
        (dict(response_format={"type": "json_schema"}), "response_format.json_schema.schema", "expected a JSON schema"),
        (dict(structured_outputs={"grammar": "x"}), "structured_outputs", "expected one of json, json_object"),
        (dict(structured_outputs={"choice": "a"}), "structured_outputs.choice", "a list of at least one string"),
        (dict(guided_regex="a", guided_choice=["b"]), "guided_choice", "found beside guided_regex"),
        (dict(tools=[TOOL]), "tools", "no place for them"),
        (dict(chat_template_kwargs={"enable_thinking": "no"}), "chat_template_kwargs.enable_thinking", "true or false"),
        (dict(chat_template_kwargs={"thinking": False}), "chat_template_kwargs", "thinking: found False"),
        (dict(messages=[]), "messages", "messages: found []; expected a list of at least one message"),
        (dict(messages=None), "messages", "messages: found nothing"),
        (dict(messages=["a"]), "messages", "messages: found a list"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields, param, message):
    error = refusal(**fields)
    assert (error.status, error.param) == (400, param) and message in error.message


def test_another_model_is_not_found():
    error = refusal(model="gpt-5")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert asked(model="tiny") == asked(model=None)


def test_what_changes_nothing_is_ignored():
    found = asked(user="me", metadata={}, frequency_penalty=0, presence_penalty=0.0, modalities=["text"], foo=1)
    assert found.options == {"seed": 1}
    assert found.warnings == ("user: ignored", "metadata: ignored", "foo: ignored")
    assert asked(**{"my secret": 1}).warnings == ("a field: ignored",)


@pytest.mark.parametrize(
    "fields",
    [
        dict(chat_template_kwargs={"enable_thinking": False}),
        dict(thinking={"type": "disabled"}),
        dict(reasoning_effort="none"),
        dict(thinking_token_budget=0),
    ],
)
def test_thinking_is_switched_off_by_the_template_where_it_can(fields):
    on, off = asked(THINKING, **fields), asked(**fields)
    assert (on.variables, on.think_budget) == ({"enable_thinking": False}, 0)
    assert (off.variables, off.think_budget) == ({}, 0)
    assert asked(chat_template_kwargs={"enable_thinking": True}).think_budget is None


def test_the_template_gets_no_variables_of_the_servers():
    for name in ("messages", "add_generation_prompt"):
        assert refusal(THINKING, chat_template_kwargs={name: []}).param == "chat_template_kwargs"


def test_tools_are_shown_where_the_template_has_a_place():
    found = asked(THINKING, tools=[TOOL], tool_choice="auto")
    assert asked(THINKING, tools=[TOOL], parallel_tool_calls=False).has_single_call and not found.has_single_call
    assert found.tools == (TOOL,) and found.variables == {"tools": [TOOL]}
    assert asked(THINKING, tools=[TOOL], tool_choice="none").variables == {}
    assert refusal(THINKING, tools=[TOOL], tool_choice="required").param == "tool_choice"
    assert refusal(THINKING, tools=[{"type": "function"}]).param == "tools"


def config(base=None, prompt=100, close=2, **fields):
    base = GenerationConfig(**(base or {}))
    found = generation_config(asked(**fields), base, prompt, close, SERVED.max_model_len)
    return found.max_new_tokens, found.think_budget, found.answer_budget


@pytest.mark.parametrize(
    ("base", "fields", "limits"),
    [
        ({}, {}, (900, None, None)),
        (dict(max_new_tokens=64), {}, (64, None, None)),
        (dict(max_new_tokens=5000), {}, (900, None, None)),
        ({}, dict(max_tokens=50), (50, None, None)),
        ({}, dict(max_tokens=50, max_completion_tokens=60), (60, None, None)),
        ({}, dict(max_tokens=50, thinking_token_budget=20), (50, 20, 28)),
        ({}, dict(max_tokens=50, think_budget=20, answer_budget=5), (50, 20, 5)),
        ({}, dict(max_tokens=50, think_budget=60), (50, None, None)),
        ({}, dict(max_tokens=50, think_budget=0), (50, 0, 48)),
        (dict(think_budget=300), dict(max_tokens=1, think_budget=0), (1, 0, 1)),
        (dict(max_new_tokens=300, think_budget=300, answer_budget=300), {}, (300, 300, 300)),
        (dict(max_new_tokens=8192, think_budget=8192, answer_budget=8192), {}, (900, None, None)),
    ],
)
def test_prompt_thought_and_answer_fit_the_length_of_the_model(base, fields, limits):
    assert config(base, **fields) == limits


@pytest.mark.parametrize(("prompt", "fields"), [(1000, {}), (100, dict(max_tokens=901))])
def test_what_does_not_fit_is_refused(prompt, fields):
    with pytest.raises(ApiError, match="expected at most 1,000 in all") as raised:
        config(prompt=prompt, **fields)
    assert (raised.value.status, raised.value.code) == (400, "context_length_exceeded")


def test_more_tokens_may_end_an_answer():
    request = asked(stop_token_ids=[7])
    found = generation_config(request, GenerationConfig(eos_token_id=(3,)), 1, 2, 100)
    assert found.eos_token_id == (3, 7)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ([1, 2],)), ([[1], "a"], ([1], "a"))],
)
def test_prompts_of_texts(prompt, prompts):
    assert text_request({"prompt": prompt}, SERVED).prompts == prompts


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, "a"], [[-1]], [None], [[True]]])
def test_prompts_that_are_none(prompt):
    assert refusal(read=text_request, prompt=prompt).param == "prompt"


def test_many_prompts_have_few_choices():
    assert "found 200 choices" in refusal(read=text_request, prompt=["a"] * 100, n=2).message


def test_tokenizing_takes_a_prompt_or_messages():
    assert tokenize_request({"prompt": "a"}, SERVED)[0].prompt == "a"
    assert tokenize_request({"messages": HELLO}, SERVED)[0].messages == HELLO
    assert "found both" in refusal(read=tokenize_request, prompt="a", messages=HELLO).message
    assert "found neither" in refusal(read=tokenize_request).message


def test_errors_show_nothing_of_what_was_sent():
    secret = "data:image/png;base64," + "QUJD" * 100
    errors = [
        refusal(temperature=secret),
        refusal(temperature="my QUJD"),
        refusal(model=secret),
        refusal(messages=[{"role": secret}], n=[secret]),
        client_error(MediaError(f"image 0: cannot read {secret} nor https://example.org/x?key=1")),
    ]
    for error in errors:
        assert "QUJD" not in json.dumps(error.body()) and "example" not in error.message


def test_errors_of_the_engine_name_the_clients_fields():
    error = client_error(GenerationError("stop_strings: found ''; expected strings"))
    assert (error.param, error.message) == ("stop", "stop: found ''; expected strings")
    assert client_error(MediaError("image 0: found nothing"), "messages").param == "messages"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("message 1, item 2: field 'text': found nothing", "messages[1].content[2].text: found nothing"),
        (
            "message 0: field 'content': found dict; expected a string",
            "messages[0].content: found dict; expected a string",
        ),
        (
            "message 0: field 'role' is \"my 'secret\", which the chat template drops silently",
            "messages[0].role: found a string of 10 characters, which the chat template drops silently",
        ),
        (
            "image 0: absolute aspect ratio must be smaller than 200, got 666.64: 3 x 2000 pixels",
            "image 0: found 3 x 2000 pixels; expected sides of at most 200 to 1",
        ),
        (
            "message 0: the chat template takes only text as 'content' of role 'my secret', found a list with image",
            "messages[0]: the chat template takes only text as 'content' of this role, found a list with image",
        ),
        ("video 0: found no readable video (decord: [x] at (y); pyav: z)", "video 0: found no readable video"),
    ],
)
def test_errors_of_the_processor_have_the_paths_of_the_client(message, shown):
    assert client_error(MessageError(message), "messages").message == shown


def test_a_model_without_a_template_does_not_chat():
    served = dataclasses.replace(SERVED, has_template=False)
    with pytest.raises(ApiError, match="messages: found a chat; expected 'prompt' for /v1/completions"):
        chat_request({"messages": [{"role": "user", "content": "Hello"}]}, served)
    assert text_request({"prompt": "Hello"}, served).prompts
