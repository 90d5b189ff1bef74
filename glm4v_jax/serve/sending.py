"""How responses are sent: JSON, and streams of events until the client leaves."""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glm4v_jax.serve.call import Call
from glm4v_jax.serve.errors import ApiError
from glm4v_jax.serve.responses import DONE, error_event, event, to_bytes

T = TypeVar("T")

_LAST_SECONDS = 5.0
"""After the deadline of a stream, for its end to be read."""


class JsonResponse(Response):
    """A response with a JSON body."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None):
        super().__init__(to_bytes(content), status, headers)


class EventStream(Response):
    """A stream of events: the deltas of a call, until it ends, the client leaves, or its time is over."""

    def __init__(self, call: Call, deadline: float, late: ApiError):
        """`deadline`: of the event loop's clock; `late`: what the stream ends with then."""
        self._call, self._deadline, self._late = call, deadline, late
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        timer = asyncio.get_running_loop().call_at(self._deadline, self._call.fail, self._late)
        try:
            async with asyncio.timeout_at(self._deadline + _LAST_SECONDS):
                await unless_gone(receive, self._write(send))
        except TimeoutError:  # a reader that does not read: the connection is of no use
            raise ClientDisconnect from None
        finally:
            timer.cancel()

    async def _write(self, send: Send) -> None:
        reply = self._call.reply

        async def say(body: bytes, *, is_last: bool = False) -> None:
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": not is_last})

        streams = [reply.choice_stream(number) for number in range(len(reply.prompts) * reply.request.n)]
        events = b""
        try:
            await say(_events(reply.first_chunks()))
            async for news in self._call.deltas():
                choices = [choice for number, delta in news for choice in streams[number].push(delta)]
                events = _events(reply.chunk([choice]) for choice in choices)
                if self._call.is_done:
                    break  # the end goes with them
                await say(events)
                events = b""
            events += _events(reply.last_chunks(self._call.ended()))
        except ApiError as error:
            events += error_event(error)
        finally:
            self._call.cancel()
        await say(events + DONE, is_last=True)


def _events(chunks: Iterable[Any]) -> bytes:
    return b"".join(map(event, chunks))


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do some work, unless the client leaves.

    Raises:
      ClientDisconnect: it has left; the work is cancelled.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
