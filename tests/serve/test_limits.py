"""Bodies are bounded while they come in, whatever is said of them."""

import asyncio
import contextlib
import json
import socket
import threading
import tracemalloc

import pytest
import uvicorn

from glm4v_jax.serve.errors import ApiError
from glm4v_jax.serve.limits import RequestLimits, parse_body

LIMIT = 1000


async def app(scope, receive, send):
    """Answers with the length of the body."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


def asked(limits, chunks=(), **headers):
    """(status, headers, JSON) of a request whose body comes in chunks; None waits for ever."""
    sent, taken = [], iter(chunks)

    async def receive():
        chunk = next(taken, b"")
        if chunk is None:
            await asyncio.Event().wait()
        taken_last = not chunk
        return {"type": "http.request", "body": chunk, "more_body": not taken_last}

    async def send(message):
        sent.append(message)

    named = {"content-type": "application/json", "transfer-encoding": "chunked"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    raw = [(name.encode(), value.encode()) for name, value in named.items() if value]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": raw}
    asyncio.run(limits(scope, receive, send))
    start, body = sent
    return start["status"], dict(start["headers"]), json.loads(body["body"])


def code_of(answer):
    status, _, body = answer
    return status, body["error"]["code"]


def test_bodies_within_the_limit_pass():
    limits = RequestLimits(app, max_body_bytes=LIMIT)
    assert asked(limits, [b"x" * 600, b"x" * 400])[::2] == (200, 1000)
    assert asked(limits, [], transfer_encoding="", content_length="0", content_type="text/plain")[0] == 200
    assert b"connection" not in asked(limits, [b"x"])[1]


@pytest.mark.parametrize(
    ("chunks", "headers"),
    [
        ([b"x" * 600] * 2, {}),
        ([b"x" * 600] * 2, {"content_length": "10"}),
        ([b"x"] * (LIMIT + 1), {}),
        ([None], {"content_length": str(LIMIT + 1)}),
        ([None], {"content_length": "9" * 30}),
    ],
)
def test_larger_bodies_are_refused_while_they_come_in(chunks, headers):
    answer = asked(RequestLimits(app, max_body_bytes=LIMIT), chunks, **headers)
    assert code_of(answer) == (413, "body_too_large")
    # What is left of the body is not read.
    assert answer[1][b"connection"] == b"close"


def test_slow_bodies_are_refused():
    limits = RequestLimits(app, body_seconds=0.05)
    assert code_of(asked(limits, [b"x", None])) == (408, "slow_body")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content_type": "text/plain"}, (415, "unsupported_type")),
        ({"content_type": "application/x-www-form-urlencoded"}, (415, "unsupported_type")),
        ({"content_encoding": "gzip"}, (415, "unsupported_type")),
        ({"host": "evil.example"}, (421, "unknown_host")),
        ({"host": "evil.example:8000"}, (421, "unknown_host")),
        ({"host": "127.0.0.1.evil.example"}, (421, "unknown_host")),
    ],
)
def test_what_a_web_page_could_send_is_refused(headers, expected):
    limits = RequestLimits(app, hosts=("localhost", "Gpu.example"))
    answer = asked(limits, [], **{"host": "localhost"} | headers)
    assert code_of(answer) == expected
    if expected[0] == 415:  # types are harmless
        assert f"found {next(iter(headers.values()))}; " in answer[2]["error"]["message"]
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]", "[::1]:8000", "10.0.0.1:80", "gpu.example"):
        assert asked(limits, [], host=host, content_type="application/json; charset=utf-8")[0] == 200


def test_all_bodies_together_are_bounded_and_forgotten():
    limits = RequestLimits(app, max_body_bytes=LIMIT)
    for _ in range(3):
        asked(limits, [b"x" * LIMIT])
        asked(limits, [b"x" * 600] * 2)
    limits.take(15 * LIMIT, LIMIT)
    assert asked(limits, [b"x" * LIMIT])[0] == 200
    limits.take(1, 1)
    answer = asked(limits, [b"x" * LIMIT])
    assert code_of(answer) == (429, "too_many_bytes") and answer[1][b"retry-after"] == b"1"


@contextlib.contextmanager
def serving(application):
    config = uvicorn.Config(application, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("is_chunked", [False, True])
def test_65_mib_over_a_socket_get_413_and_take_no_memory(is_chunked):
    block = b" " * 2**16
    framing = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {65 * 2**20}"
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
    part = b"%x\r\n%s\r\n" % (len(block), block) if is_chunked else block
    with serving(RequestLimits(app)) as port, socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        tracemalloc.start()
        client.sendall(head.encode())
        with contextlib.suppress(ConnectionError):
            for _ in range(65 * 2**20 // len(block)):
                client.sendall(part)
        answer = client.recv(2**16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert b" 413 " in answer.splitlines()[0] and b"body_too_large" in answer
    assert peak < 2**24


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b'{"a": 1} x', r"no valid JSON \(at byte 10\)"),
        (b"[]", "a JSON list"),
        (b'"a"', "a JSON str"),
        (b"null", "a JSON NoneType"),
        (b'{"a": NaN}', "no valid JSON"),
        (b'{"a": -Infinity}', "no valid JSON"),
        (b'{"a": 1e999}', "no valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b'{"a": "\xff"}', "no valid JSON"),
        ('{"a": "é"}'.encode("latin-1"), "no valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "no valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "no valid JSON"),
        (b'{"a": "\\ud800 alone"}', "no valid JSON"),
        (b'{"a": "\\udc00 alone"}', "no valid JSON"),
        (b"{'a': 1}", "no valid JSON"),
        (b'{"a": ' * 100_000, "nested deeply"),
        (b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}", "nested deeply"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested deeply"),
        (b'{"a":' + b"[" * 2**20, "values"),
        (b'{"a":[' + b"[]," * 2**20 + b"0]}", "values"),
        (b'{"a":[' + b"1," * 2**20 + b"0]}", "values"),
    ],
)
def test_bodies_that_are_not_json_objects_are_refused(body, found):
    with pytest.raises(ApiError, match=found) as caught:
        parse_body(body)
    assert caught.value.status == 400 and len(caught.value.message) < 200


def test_json_objects_are_read():
    assert parse_body(b'{"a": "\\ud83d\\ude00 \\u00e9", "b": 1, "b": 2, "c": -0.5e1}') == {
        "a": "😀 é",
        "b": 2,
        "c": -5.0,
    }
    depth = b'{"a":' + b"[" * 98 + b"]" * 98 + b"}"
    assert list(parse_body(depth)) == ["a"]
    assert len(parse_body(json.dumps({"a": "x" * 2**21}).encode())["a"]) == 2**21
