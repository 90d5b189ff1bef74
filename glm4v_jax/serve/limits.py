"""What a request may weigh: its body, counted while it comes in, and the JSON in it."""

import asyncio
import contextlib
import ipaddress
import re
import time
from collections.abc import Collection
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4v_jax.serve.errors import ApiError, is_plain
from glm4v_jax.serve.sending import JsonResponse

MAX_BODY_BYTES = 2**26
BODY_SECONDS = 60.0
# Bodies of all requests that are being received or prepared, as a multiple of the largest.
_BODIES_AT_A_TIME = 16
_MAX_DEPTH = 100
# Values in a body. An empty list is 3 bytes of JSON and 64 of memory, or more.
_MAX_VALUES = 2**20


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse the JSON object in a body.

    >>> parse_body(b'{"model": "tiny", "n": 1}')
    {'model': 'tiny', 'n': 1}

    Strict, as the standard is: UTF-8 without a byte order mark and unpaired surrogates, no NaN, no infinities. Of a key
    that comes twice the last value counts, as for every client's own parser.

    Raises:
      ApiError: it is not JSON, not an object, nested too deeply, or has too many values.
    """
    # Each value comes after one of these. Most that a text has are commas, so that this is far above any prompt.
    if len(body) > _MAX_VALUES and sum(map(body.count, (b",", b":", b"[", b"{"))) > _MAX_VALUES:
        raise _invalid(f"more than {_MAX_VALUES} values", "fewer")
    try:
        content = msgspec.json.decode(body)
    except RecursionError:
        raise _invalid("JSON that is nested deeply", f"at most {_MAX_DEPTH} levels") from None
    except (msgspec.DecodeError, ValueError, UnicodeError) as error:
        raise _invalid(f"no valid JSON{_place(error)}", "a JSON object") from None
    if not isinstance(content, dict):
        raise _invalid(f"a JSON {type(content).__name__}", "a JSON object")
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return content
    raise _invalid("JSON that is nested deeply", f"at most {_MAX_DEPTH} levels")


def _place(error: Exception) -> str:
    """Where an error of the parser stands, if it says so."""
    found = re.search(r"\(byte (\d{1,9})\)", str(error))
    return f" (at byte {found[1]})" if found else " (it ends too early)" if "truncated" in str(error) else ""


def _invalid(found: str, expected: str) -> ApiError:
    return ApiError(400, f"body: found {found}; expected {expected}", code="invalid_json")


class RequestLimits:
    """Middleware that bounds what requests may send, whatever their headers say.

    A body is counted as it comes in, and refused as soon as it is too large or too slow; the bodies of all requests
    together are bounded too. Only JSON is taken: a form, which any web page may send anywhere, never reaches a route.

    Attributes:
      app: what answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        body_seconds: float = BODY_SECONDS,
        hosts: Collection[str] = (),
    ):
        """Put limits before an application.

        Args:
          app: the application.
          max_body_bytes: largest body.
          body_seconds: within which it must have come.
          hosts: names under which the server may be asked besides addresses, without a port; none allows all. For a
            server without a key: a web page whose name is made to lead to the server asks under its own name.
        """
        self.app = app
        self._max_bytes, self._seconds, self._hosts = max_body_bytes, body_seconds, frozenset(map(str.lower, hosts))
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        body = _Body(self, receive, send, has_body=has_body)
        try:
            self._check(headers, has_body=has_body)
            await self.app(scope, body.receive, body.send)
        except ApiError as error:
            if body.is_answered:
                raise
            await JsonResponse(error.body(), error.status, error.headers)(scope, receive, body.send)
        finally:
            body.release()

    def take(self, size: int, total: int) -> None:
        """Count bytes of a body, which has `total` with them.

        Raises:
          ApiError: the body is too large, or all bodies together.
        """
        if total > self._max_bytes:
            raise self._too_large()
        if self._held + size > _BODIES_AT_A_TIME * self._max_bytes:
            raise ApiError(
                429, "body: found too many large ones at a time; expected fewer: send it again later",
                code="too_many_bytes", headers={"Retry-After": "1"},
            )  # fmt: skip
        self._held += size

    def give_back(self, size: int) -> None:
        """Forget bytes of a body."""
        self._held -= size

    @property
    def seconds(self) -> float:
        """Within which a body must have come."""
        return self._seconds

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: found more than {self._max_bytes} bytes; expected no more", code="body_too_large")

    def _check(self, headers: Headers, *, has_body: bool) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._hosts and not (_is_address(name.strip("[]")) or name.lower() in self._hosts):
            raise ApiError(
                421,
                "Host: found another name; expected an address, localhost or the --host of this server, which has no "
                "key: with one, any name will do",
                code="unknown_host",
            )
        if not has_body:
            return
        if (kind := headers.get("content-type", "").partition(";")[0].strip().lower()) != "application/json":
            found = (kind if is_plain(kind) else "another one") if kind else "none"
            raise ApiError(415, f"Content-Type: found {found}; expected application/json", code="unsupported_type")
        if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
            found = coding if is_plain(coding) else "some"
            raise ApiError(415, f"Content-Encoding: found {found}; expected none", code="unsupported_type")
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            raise self._too_large()


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


class _Body:
    """What one request has sent, and whether it has been answered."""

    def __init__(self, limits: RequestLimits, receive: Receive, send: Send, *, has_body: bool) -> None:
        self._limits, self._receive, self._send = limits, receive, send
        self._deadline = time.monotonic() + limits.seconds
        self._total = self._held = 0
        self._is_whole, self.is_answered = not has_body, False

    async def receive(self) -> Message:
        """The next message; that a client has gone may come at any time after its body."""
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408, f"body: found no end within {self._limits.seconds:g} seconds; expected it sooner", code="slow_body"
            ) from None
        size = len(message.get("body", b""))
        self._total += size
        self._limits.take(size, self._total)
        self._held += size
        self._is_whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a message; a connection whose body has not been read is of no use after it."""
        if message["type"] == "http.response.start":
            self.is_answered = True
            self.release()
            if not self._is_whole:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await self._send(message)

    def release(self) -> None:
        """Forget the bytes: they have been read, or never will be."""
        self._limits.give_back(self._held)
        self._held = 0
