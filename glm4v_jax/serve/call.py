"""One request while it is answered: updates of its sequences, from the engine's thread to the event loop's."""

import asyncio
import collections
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence

from glm4v_jax.errors import GenerationError, Glm4vError
from glm4v_jax.generate.completion import Completion, Delta
from glm4v_jax.generate.live import LiveEngine, LiveRequest
from glm4v_jax.generate.scheduler import Failure, Update
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.serve.errors import ApiError, client_error
from glm4v_jax.serve.metrics import Metrics
from glm4v_jax.serve.responses import Reply

MAX_UNREAD = 1024
"""Updates of a stream that may wait for a slow reader."""


class Inbox:
    """What the engine's thread has for an event loop: one wake-up for all that a dispatch brings.

    Attributes:
      loop: the event loop.
    """

    def __init__(self) -> None:
        """To be called in the event loop."""
        self.loop, self._items = asyncio.get_running_loop(), collections.deque[Callable[[], None]]()

    def put(self, work: Callable[[], None]) -> None:
        """Have the event loop do this; in the engine's thread alone."""
        self._items.append(work)
        if len(self._items) == 1:  # else the loop has not emptied it yet
            try:
                self.loop.call_soon_threadsafe(self._empty)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._items.clear()

    def _empty(self) -> None:
        while self._items:  # each as a callback of its own: an error in one does not keep the others
            self.loop.call_soon(self._items.popleft())


class Call:
    """A request that has been submitted; used in the event loop.

    Attributes:
      reply: what its responses share.
    """

    def __init__(self, reply: Reply, sequences: Sequence[SequenceState], metrics: Metrics, since: float, inbox: Inbox):
        """`since`: when the request arrived, of `time.perf_counter`; `inbox`: of the event loop."""
        self.reply = reply
        self._sequences, self._metrics, self._since = list(sequences), metrics, since
        self._completions: dict[int, Completion] = {}
        self._latest: dict[int, float] = {}
        self._unread: list[tuple[int, Delta]] = []
        self._error: ApiError | None = None
        self._changed = asyncio.Event()
        self._inbox = inbox
        self._request: LiveRequest | None = None

    def submit(self, live: LiveEngine) -> None:
        """Queue the sequences; raises as `LiveEngine.submit` does."""
        self._request = live.submit(self._sequences, self._receive)

    def cancel(self) -> None:
        """End the sequences that have not ended."""
        if self._request is not None and not self.is_done:
            self._request.cancel()

    def fail(self, error: ApiError) -> None:
        """End the request with an error, all its sequences."""
        self.cancel()
        self._error = self._error or error
        self._changed.set()

    async def completions(self) -> list[Completion]:
        """Wait for all completions; cancels the request where the waiting is cancelled.

        Raises:
          ApiError: the engine failed.
        """
        try:
            while not self.is_done:
                await self._wait()
        finally:
            self.cancel()
        return self.ended()

    async def deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """Yield what choices have grown by, with their numbers; cancels the request where this is closed.

        Raises:
          ApiError: the engine failed, or this was not read for too long.
        """
        try:
            while self._unread or not self.is_done:
                while not (self._unread or self.is_done):
                    await self._wait()
                unread, self._unread = list(self._unread), []
                yield unread
            if self._error is not None:
                raise self._error
        finally:
            self.cancel()

    def ended(self) -> list[Completion]:
        """The completions of a request that has ended, in their order.

        Raises:
          ApiError: the engine failed.
        """
        if self._error is not None:
            raise self._error
        return [self._completions[number] for number in range(len(self._sequences))]

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self._error is not None or len(self._completions) == len(self._sequences)

    async def _wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _receive(self, sequence: SequenceState, update: Update | Failure) -> None:
        """Take an update, in the engine's thread."""
        self._inbox.put(functools.partial(self._take, sequence.index, update, time.perf_counter()))

    def _take(self, number: int, update: Update | Failure, now: float) -> None:
        if isinstance(update, Failure):
            self.fail(_failure(update.error))
            return
        delta = update.delta
        self._note(number, delta, now)
        if self._error is None and self.reply.request.is_stream:
            self._unread.append((number, delta))
            if len(self._unread) > MAX_UNREAD and not self.is_done:
                self._unread.clear()
                self.fail(ApiError(408, "stream: found a reader that is too slow; expected one that keeps up"))
        self._changed.set()

    def _note(self, number: int, delta: Delta, now: float) -> None:
        if delta.tokens:
            if (before := self._latest.get(number)) is None:
                self._metrics.first_token(now - self._since)
            else:
                self._metrics.more_tokens(now - before, len(delta.tokens))
            self._latest[number] = now
        if (completion := delta.completion) is not None:
            if completion.finish_reason == "error":
                self.fail(ApiError(400, f"response_format: {completion.error}", param="response_format"))
            elif completion.finish_reason == "cancelled":  # by the engine: nobody reads what a client cancels
                self.fail(ApiError(503, "server: found it ending; expected it to run until the answer is whole"))
            self._completions[number] = completion
            self._metrics.ended(completion.finish_reason, seconds=now - self._since, tokens=len(completion.tokens))


def _failure(error: Exception) -> ApiError:
    """What a client is told: `GenerationError` is the engine's fault, the others are about what was sent."""
    if isinstance(error, Glm4vError) and not isinstance(error, GenerationError):
        return client_error(error, "messages")
    return ApiError(500, str(error) if isinstance(error, GenerationError) else "engine: found an error; expected none")
