"""The server as its users meet it: OpenAI's client, and plain HTTP, over a real port."""

import asyncio
import concurrent.futures
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import openai
import PIL.Image
import pytest
from helpers_serve import MODEL, data_url, http, wait_until

from glm4v_jax.errors import CheckpointError
from glm4v_jax.generate.engine import Request
from glm4v_jax.generate.slots import Slots
from glm4v_jax.generate.text.thinking import without_thoughts
from glm4v_jax.serve.app import create_app
from glm4v_jax.serve.media import has_media, resolve
from glm4v_jax.serve.server import bind, run
from glm4v_jax.serve.service import ServeSettings, Service
from glm4v_jax.tiny import TINY_CHECKPOINT
from glm4v_jax.tiny.digits import held_out

pytestmark = pytest.mark.slow

SLIVER = {"type": "image_url", "image_url": {"url": data_url(PIL.Image.new("L", (2000, 1)))}}
LONG_TEXT = "a" * 100_000
LONG = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "ignore_eos": True}


def question(example):
    """The user's message of an example, as OpenAI's clients write it, and as the engine takes it."""
    text = next(item["text"] for item in example.messages[0]["content"] if item["type"] == "text")
    content = [
        {"type": "image_url", "image_url": {"url": data_url(example.media)}},
        {"type": "text", "text": text},
    ]
    return [{"role": "user", "content": content}], example.prompt


def hello(text="Hello"):
    return [{"role": "user", "content": text}]


def test_an_application_answers_in_one_event_loop_after_the_other(server):
    """As tests of those who embed it ask: each request in a loop of its own."""

    async def ask():
        transport = httpx2.ASGITransport(create_app(server[0]))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            body = {"messages": hello(), "max_tokens": 2}
            return (await asyncio.wait_for(client.post("/v1/chat/completions", json=body), 60)).status_code

    assert [asyncio.run(ask()) for _ in range(2)] == [200, 200]


@pytest.fixture(scope="module")
def examples():
    """Twelve chats: a message for the client, one for the engine, and options; every third is text alone."""
    chats = []
    for number in range(12):
        task = ("reading", "grounding2", None)[number % 3]
        sent, asked = (hello(f"Hello {number}"),) * 2 if task is None else question(held_out(task)[number])
        chats.append((sent, asked, {"seed": number, "max_tokens": 24, "temperature": 0.8 if number % 2 else 0}))
    return chats


@pytest.fixture(scope="module")
def expected(tiny_engine, examples):
    """What the engine says to them by itself."""
    requests = [
        Request(asked, {
            "seed": options["seed"], "max_new_tokens": options["max_tokens"], "do_sample": bool(options["temperature"]),
            "temperature": options["temperature"] or None,
        })
        for _, asked, options in examples
    ]  # fmt: skip
    found = tiny_engine.generate_many(requests, logprobs=3)
    return [completion for _, completion in sorted((completion.index, completion) for completion in found)]


def said(completion):
    """Thought and content that a message is to have."""
    return completion.thought, without_thoughts(completion.text).strip()


@pytest.fixture
def slow(monkeypatch, tiny_engine):
    """A model that takes seconds for an answer."""
    decode = Slots.decode

    def wait(*arguments, **options):
        time.sleep(0.02)
        return decode(*arguments, **options)

    monkeypatch.setattr(Slots, "decode", wait)
    monkeypatch.setattr(tiny_engine, "steps_per_dispatch", 1)


def test_chats_are_what_the_engine_says(client, examples, expected):
    def ask(number):
        messages, _, options = examples[number]
        return client.chat.completions.create(model=MODEL, messages=messages, **options)

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, range(12)))
    for answer, completion in zip(answers, expected, strict=True):
        (choice,) = answer.choices
        assert (choice.message.reasoning, choice.message.content) == said(completion)
        assert choice.message.reasoning_content == choice.message.reasoning
        assert choice.finish_reason == completion.finish_reason
        assert answer.usage.prompt_tokens == completion.prompt_tokens
        assert answer.usage.completion_tokens == len(completion.tokens)
    assert any(completion.thought for completion in expected)


def test_streams_say_the_same(client, examples, expected):
    def ask(number):
        messages, _, options = examples[number]
        return list(
            client.chat.completions.create(
                model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, **options
            )
        )

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        for chunks, completion in zip(threads.map(ask, range(12)), expected, strict=True):
            *chunks, last = chunks
            deltas = [chunk.choices[0].delta for chunk in chunks]
            thought, content = said(completion)
            assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == (thought or "")
            assert "".join(delta.content or "" for delta in deltas) == content
            assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, completion.finish_reason]
            assert not last.choices and last.usage.completion_tokens == len(completion.tokens)
            assert last.usage.prompt_tokens == completion.prompt_tokens


def test_texts_are_what_the_engine_says(client, tiny_engine):
    prompts = ["Hello", [1, 2, 3]]
    options = dict(temperature=0, max_tokens=6)
    found = client.completions.create(model=MODEL, prompt=prompts[0], **options)
    tokens = tiny_engine.processor.tokenizer.encode("Hello")
    ((expected),) = tiny_engine.generate_many(
        [{"input_ids": [tokens]}], max_new_tokens=6, do_sample=False, logprobs=3
    )  # fmt: skip
    assert found.object == "text_completion" and found.choices[0].text == expected.text
    assert found.usage.prompt_tokens == len(tokens)
    chunks = list(client.completions.create(model=MODEL, prompt=prompts[0], stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    several = client.completions.create(model=MODEL, prompt=["Hello", "Hello"], **options)
    assert [choice.text for choice in several.choices] == [expected.text] * 2
    assert client.completions.create(model=MODEL, prompt=prompts[1], **options).usage.prompt_tokens == 3


def test_options_of_sampling(client):
    def ask(**options):
        options = {"temperature": 1.5, "max_tokens": 12, "extra_body": {"top_k": 0, "top_p": 1.0}, **options}
        return client.chat.completions.create(model=MODEL, messages=hello(), **options).choices

    def texts(choices):
        return [(choice.message.reasoning, choice.message.content) for choice in choices]

    assert texts(ask(seed=7)) == texts(ask(seed=7))
    assert texts(ask(seed=7, n=2))[:1] == texts(ask(seed=7))
    assert len({str(texts(ask())) for _ in range(4)}) > 1
    one, two = ask(n=2, seed=1, logprobs=True, top_logprobs=3)
    assert (one.index, two.index) == (0, 1) and texts([one]) != texts([two])
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in one.logprobs.content)
    (whole,) = ask(temperature=0)
    text = f"{whole.message.reasoning or ''}{whole.message.content}"
    (cut,) = ask(temperature=0, stop=[text[3]])
    assert f"{cut.message.reasoning or ''}{cut.message.content}" == text[: text.index(text[3])].strip()
    assert (cut.finish_reason, cut.stop_reason) == ("stop", text[3])


def test_n_choices_in_a_stream(client):
    whole = client.chat.completions.create(model=MODEL, messages=hello(), n=2, seed=1, max_tokens=8)
    parts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(
        model=MODEL, messages=hello(), n=2, seed=1, max_tokens=8, stream=True
    ):  # fmt: skip
        delta = chunk.choices[0].delta
        parts[chunk.choices[0].index] += (getattr(delta, "reasoning", None) or "") + (delta.content or "")
    assert parts == {
        choice.index: (choice.message.reasoning or "") + choice.message.content for choice in whole.choices
    }


def test_usage_counts_what_was_in_the_cache(client):
    sent = hello("one two three four five six seven eight nine ten eleven twelve " * 3)
    for is_second in (False, True):
        usage = client.chat.completions.create(model=MODEL, messages=sent, max_tokens=2, n=2).usage
        assert (usage.prompt_tokens_details.cached_tokens > 0) == is_second


def test_a_template_with_tools_and_a_switch_for_thinking(server, monkeypatch, tiny_engine):
    template = tiny_engine.processor.chat_template
    switch = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    monkeypatch.setattr(tiny_engine.processor, "chat_template", tools + template + switch)

    def tokens(**fields):
        body = {"messages": hello(), "return_token_strs": True, **fields}
        return http.post(f"{server[1]}/tokenize", json=body).json()["token_strs"]

    plain = tokens()
    assert tokens(chat_template_kwargs={"enable_thinking": False}) == [*plain, "<think>", "</think>"]
    tool = {"type": "function", "function": {"name": "add"}}
    assert len(tokens(tools=[tool])) > len(plain) == len(tokens(tools=[tool], tool_choice="none"))
    body = {"messages": hello(), "max_tokens": 4, "reasoning_effort": "none"}
    message = http.post(f"{server[1]}/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["reasoning"] is None


def test_a_thought_is_closed_when_its_budget_is_used_up(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=question(held_out("reading")[0])[0],
        max_tokens=20,
        temperature=0,
        extra_body={"thinking_token_budget": 3},
    )
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens_details.reasoning_tokens <= 5 and answer.usage.completion_tokens <= 20


def test_an_answer_follows_a_schema(client):
    schema = {"type": "object", "properties": {"digit": {"type": "integer"}}, "required": ["digit"]}
    form = {"type": "json_schema", "json_schema": {"name": "digit", "schema": schema | {"additionalProperties": False}}}
    sent = question(held_out("reading")[0])[0]
    answer = client.chat.completions.create(
        model=MODEL, messages=sent, response_format=form, max_tokens=60, temperature=0
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["digit"], int)
    assert answer.choices[0].message.reasoning
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(
            model=MODEL, messages=sent, response_format={"type": "json_schema", "json_schema": {"schema": {"type": 1}}}
        )


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server, is_stream, slow):
    service, address = server
    before = cancelled(service)
    body = json.dumps(LONG | {"stream": is_stream}).encode()
    with connected(address) as connection:
        connection.sendall(head_of_post(f"Content-Length: {len(body)}") + body)
        wait_until(lambda: service.live.num_running == 1)
    wait_until(lambda: cancelled(service) == before + 1)
    assert service.live.num_running == 0


def connected(address):
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head_of_post(field):
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{field}"
    return head.encode() + b"\r\n\r\n"


def cancelled(service):
    """Choices that were cancelled so far."""
    for line in service.metrics.text().decode().splitlines():
        if line.startswith("glm4v:request_success_total") and '"cancelled"' in line:
            return float(line.split()[-1])
    return 0


def test_a_full_queue_answers_429_and_the_others_are_right(serving, examples, expected, slow):
    sent, _, options = examples[0]
    with serving(max_waiting=4) as (service, address):
        wait_until(lambda: service.state == "ready")
        with concurrent.futures.ThreadPoolExecutor(30) as threads:
            body = {"messages": sent, **options}
            found = list(threads.map(lambda _: http.post(f"{address}/v1/chat/completions", json=body), range(30)))
    assert {response.status_code for response in found} == {200, 429}
    for response in found:
        if response.status_code == 200:
            message = response.json()["choices"][0]["message"]
            assert (message["reasoning"], message["content"]) == said(expected[0])
        else:
            assert response.json()["error"]["code"] == "queue_full" and response.headers["Retry-After"] == "1"


def test_texts_do_not_wait_for_images(server, client, examples, monkeypatch):
    end, begun = threading.Event(), threading.Event()

    def slowly(messages, *arguments):
        if has_media(messages):
            begun.set()
            end.wait(60)
        return resolve(messages, *arguments)

    def ask(messages):
        return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2).choices

    monkeypatch.setattr("glm4v_jax.serve.service.resolve", slowly)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        slow = [threads.submit(ask, examples[0][0]) for _ in range(8)]
        try:
            assert begun.wait(60) and ask(hello())
            assert http.post(f"{server[1]}/tokenize", json={"messages": hello()}).status_code == 200
            assert not any(one.done() for one in slow)
        finally:
            end.set()
        assert all(one.result() for one in slow)


def test_a_bad_image_hurts_nobody_else(client, examples, expected):
    bad = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]

    def ask(number):
        messages, _, options = examples[number]
        if number % 2:
            messages = [{"role": "user", "content": bad}]
        try:
            return client.chat.completions.create(model=MODEL, messages=messages, **options)
        except openai.BadRequestError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for number, answer in enumerate(threads.map(ask, range(8))):
            if number % 2:
                assert answer.param == "messages" and "iVBOR" not in str(answer)
            else:
                message = answer.choices[0].message
                assert (message.reasoning, message.content) == said(expected[number])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "body: found no valid JSON (it ends too early)"),
        ("POST", "/v1/chat/completions", {"messages": []}, 400, "messages: found []"),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content: found nothing"),
        ("POST", "/v1/chat/completions", {"messages": hello(), "model": "x"}, 404, "model: found 'x'"),
        ("POST", "/v1/chat/completions", {"messages": hello(), "max_tokens": 999}, 400, "expected at most 256 in all"),
        ("POST", "/v1/chat/completions", {"messages": hello("a " * 400)}, 400, "expected at most 256 in all"),
        ("POST", "/v1/chat/completions", {"messages": hello(LONG_TEXT)}, 400, "characters; expected at most 256"),
        (
            "POST",
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "content": "", "reasoning_content": LONG_TEXT}]},
            400,
            "characters",
        ),
        ("POST", "/tokenize", {"prompt": LONG_TEXT}, 400, "found 100,000 characters"),
        ("POST", "/v1/chat/completions", {"messages": hello(), "n": 80}, 400, "found 80 choices; expected at most 68"),
        ("POST", "/v1/chat/completions", {"messages": hello(), "logprobs": True, "top_logprobs": 4}, 400, "at most 3"),
        ("POST", "/v1/chat/completions", {"messages": hello(), "top_p": 2}, 400, "top_p: found 2"),
        (
            "POST",
            "/v1/chat/completions",
            {"messages": [*hello(), {"role": "user", "content": [{"type": "text", "text": "?"}, SLIVER]}]},
            400,
            "messages[1].content[1]: found 2000 x 1 pixels; expected sides of at most 200 to 1",
        ),
        ("POST", "/v1/completions", {"prompt": [10**6]}, 400, "prompt: found token 1000000"),
        ("POST", "/v1/completions", {"prompt": "<|image|>"}, 400, "image"),
        ("POST", "/tokenize", {}, 400, "found neither"),
        ("GET", "/v1/models/other", None, 404, "model: found another"),
        ("GET", "/nowhere", None, 404, "path: found /nowhere; expected one of /, /v1/chat/completions, "),
        ("GET", "/my%20secret", None, 404, "path: found another path; "),
        ("GET", "/v1/completions", None, 405, "method: found GET; expected POST"),
        ("POST", "/v1/models/x", b"{}", 405, "method: found POST; expected GET or HEAD"),
    ],
)
def test_what_is_refused(server, method, path, body, status, message):
    content = json.dumps(body) if isinstance(body, dict) else body
    response = http.request(method, server[1] + path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status and message in response.json()["error"]["message"]
    assert ("Allow" in response.headers) == (status == 405)


def test_models_versions_and_tokens(server, client, tiny_engine):
    assert [model.id for model in client.models.list()] == [MODEL] == [client.models.retrieve(MODEL).id]
    from glm4v_jax import __version__

    assert http.get(f"{server[1]}/version").json() == {"version": __version__}
    assert http.get(f"{server[1]}/ping").json()["status"] == "ready"
    sent, asked = question(held_out("reading")[0])
    found = http.post(f"{server[1]}/tokenize", json={"messages": sent, "return_token_strs": True}).json()
    tokens = tiny_engine.prompt(asked).input_ids.tolist()
    assert (found["tokens"], found["count"], found["max_model_len"]) == (tokens, len(tokens), 256)
    assert found["token_strs"][-2] == "<|assistant|>"
    text = http.post(f"{server[1]}/tokenize", json={"prompt": "Hello"}).json()
    assert text["tokens"] == tiny_engine.processor.tokenizer.encode("Hello") and text["token_strs"] is None


def test_the_page_and_what_the_model_sees(server):
    found = http.get(server[1])
    assert found.status_code == 200 and found.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in found.headers["content-security-policy"]
    item = question(held_out("reading")[0])[0][0]["content"][0]
    seen = http.post(f"{server[1]}/v1/preview", json=item).json()
    assert (seen["seen_width"], seen["kind"]) == (84, "image")
    refused = http.post(f"{server[1]}/v1/preview", json={"type": "text", "text": "a"})
    assert refused.status_code == 400
    refused = http.post(f"{server[1]}/v1/preview", json={"type": "image_url", "image_url": "cat.png"})
    assert refused.json()["error"]["message"] == "body.image_url: found no data URL; expected data:<type>;base64,<data>"


def test_metrics_have_vllms_names(server, client):
    client.chat.completions.create(model=MODEL, messages=hello(), max_tokens=3)
    lines = http.get(f"{server[1]}/metrics").text.splitlines()
    found = {line.partition("{")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}
    for name in (
        "num_requests_running", "num_requests_waiting", "request_success_total", "prompt_tokens_total",
        "generation_tokens_total", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count", "engine_restarts_total", "prefix_cache_queries_total",
    ):  # fmt: skip
        assert f"glm4v:{name}" in found, name
    assert found["glm4v:num_requests_running"] == 0 and found["glm4v:prompt_tokens_total"] > 0


def test_a_server_with_a_key(serving):
    with serving(api_key="secret") as (service, address):
        wait_until(lambda: service.state == "ready")
        for path in ("/v1/models", "/metrics", "/version"):
            assert http.get(address + path).status_code == 401
            assert http.get(address + path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert http.get(f"{address}/health").status_code == http.get(address).status_code == 200
        basic = http.get(f"{address}/version", headers={"Authorization": "Basic secret"}).json()["error"]["message"]
        assert "found a scheme other than Bearer" in basic and "secret" not in basic
        with pytest.raises(openai.AuthenticationError, match="found another key"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_body_is_not_taken_without_the_key(serving):
    with serving(api_key="secret") as (_, address), connected(address) as connection:
        connection.sendall(head_of_post("Transfer-Encoding: chunked") + b"1\r\na\r\n")
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert b" 401 " in answer.splitlines()[0] and b"connection: close" in answer.lower()


@pytest.mark.parametrize("sent", [b"", b"GET /heal", b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\nGET /ve"])
def test_connections_that_do_nothing_are_cut(serving, monkeypatch, sent):
    monkeypatch.setattr("glm4v_jax.serve.server._KEEP_ALIVE", 0.5)
    with serving() as (_, address), connected(address) as connection:
        connection.sendall(sent)
        try:
            while connection.recv(2**16):
                pass
        except ConnectionResetError:
            pass


def test_a_server_of_this_machine_has_its_names(serving):
    with serving(hosts=("localhost",)) as (_, address):
        assert http.get(f"{address}/version").status_code == 200
        assert http.get(f"{address}/version", headers={"Host": "rebound.example.org"}).status_code == 421


def test_until_it_is_ready_a_server_says_how_far_it_is(serving):
    is_slow = threading.Event()

    def load():
        is_slow.wait()
        raise OSError("no such model")

    with serving(load) as (service, address):
        found = http.get(f"{address}/health")
        assert found.status_code == 503 and "loading the model" in found.json()["message"]
        refused = http.post(f"{address}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "5"
        wait_until(lambda: refusals(service) == 1)  # and not those who ask for its health
        is_slow.set()
        wait_until(lambda: service.state == "failed")
        assert str(service.error) == "no such model"


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise CheckpointError("model: found none; expected one")

    with pytest.raises(CheckpointError, match="found none"):
        run(Service(ServeSettings(model=MODEL), load), bind("127.0.0.1", 0))


def test_an_engine_that_fails_again_and_again_ends_the_server(serving):
    with serving() as (service, address):
        wait_until(lambda: service.state == "ready")
        service.live.state = "failed"
        wait_until(lambda: not is_reachable(address))


def refusals(service):
    """Requests that came before the server was ready."""
    lines = service.metrics.text().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if 'reason="not_ready"' in line and "_total" in line), 0)


def is_reachable(address):
    try:
        return http.get(f"{address}/health").status_code
    except httpx2.TransportError:
        return None


def test_a_request_may_take_only_so_long(serving, slow):
    with serving(request_timeout=0.7) as (service, address):
        wait_until(lambda: service.state == "ready")
        assert http.post(f"{address}/v1/chat/completions", json=LONG).status_code == 504
        # As an event, or as the response where preparation took as long.
        streamed = http.post(f"{address}/v1/chat/completions", json=LONG | {"stream": True})
        assert '"timeout_error"' in streamed.text and '"finish_reason":"' not in streamed.text
        assert streamed.status_code == 504 or streamed.text.endswith("data: [DONE]\n\n")


def test_what_is_running_when_the_server_ends_gets_an_error(serving, slow):
    body = LONG | {"stream": True}
    with serving(drain_seconds=1) as (service, address), concurrent.futures.ThreadPoolExecutor(2) as threads:
        wait_until(lambda: service.state == "ready")
        sent = [threads.submit(http.post, f"{address}/v1/chat/completions", json=body) for _ in range(2)]
        wait_until(lambda: service.live.num_running == 2)
        service.drain()
        assert http.get(f"{address}/health").json()["status"] == "draining"
        assert http.post(f"{address}/v1/completions", json={"prompt": "a"}).status_code == 503
        for response in sent:
            text = response.result().text
            assert '"service_unavailable_error"' in text and text.endswith("data: [DONE]\n\n")


def test_a_signal_lets_streams_finish(tmp_path):
    """The command as a process of its own."""
    command = [sys.executable, "-m", "glm4v_jax", "serve", "--port", "0", "--slots", "4", "--max-model-len", "256"]
    options = ["--model", str(TINY_CHECKPOINT), "--no-warmup", "--max-logprobs", "3", "--drain-seconds", "120"]
    log = tmp_path / "log"
    with log.open("w") as stderr, subprocess.Popen([*command, *options], stderr=stderr) as process:
        try:
            wait_until(lambda: "http://" in log.read_text() or process.poll() is not None)
            address = re.search(r"http://\S+", log.read_text())[0]
            wait_until(lambda: http.get(f"{address}/health").status_code == 200)
            has_begun = threading.Barrier(5)

            def ask(_):
                url, body = f"{address}/v1/chat/completions", LONG | {"stream": True}
                with http.stream("POST", url, json=body) as response:
                    lines = response.iter_lines()
                    next(line for line in lines if re.search('"(content|reasoning)":"[^"]', line))  # all is compiled
                    has_begun.wait(120)
                    return [line for line in lines if line]

            with concurrent.futures.ThreadPoolExecutor(4) as threads:
                streams = threads.map(ask, range(4))
                has_begun.wait(120)
                process.send_signal(signal.SIGTERM)
                for lines in streams:
                    assert lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]
            assert process.wait(120) == 0
        finally:
            process.kill()
    assert "SIGTERM: ending" in log.read_text() and "Traceback" not in log.read_text()


def test_a_warm_server_compiles_nothing(serving, lowerings):
    from glm4v_jax.generate.engine import Engine

    def load():
        return Engine.from_pretrained(TINY_CHECKPOINT, num_slots=2, stacked=True)

    with serving(load, is_warmed=True, max_model_len=64) as (service, address):
        wait_until(lambda: service.state in ("ready", "failed"), 300)
        assert service.error is None
        image = question(held_out("reading")[0])[0]
        with lowerings() as names:
            for fields in (
                {"messages": hello(), "max_tokens": 4},
                {"messages": hello("a b c "), "max_tokens": 20, "n": 2, "temperature": 1.0},
                {"messages": image, "max_tokens": 20, "logprobs": True, "top_logprobs": 2},
                {"messages": image, "max_tokens": 20, "response_format": {"type": "json_object"}},
                {"messages": hello(), "max_tokens": 6, "logit_bias": {"5": -100}, "min_tokens": 2},
                {
                    "messages": hello(),
                    "max_tokens": 6,
                    "logit_bias": {"5": 1},
                    "response_format": {"type": "json_object"},
                },
                {"messages": hello(), "max_tokens": 20, "thinking_token_budget": 2},
            ):
                assert http.post(f"{address}/v1/chat/completions", json=fields).status_code == 200
    assert names == []
