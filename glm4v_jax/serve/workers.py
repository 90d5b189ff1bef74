"""Few threads for the work of many requests, which wait for one in the event loop."""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from glm4v_jax.serve.errors import ApiError

R = TypeVar("R")


class Workers:
    """Threads, and a bounded number of requests that wait for one.

    They wait in the event loop, not in the executor's queue: that would keep what a client has sent, after the client
    has left, until a thread comes to it.

    >>> async def double() -> int:
    ...     return await Workers(1, 8).run(lambda: 2 * 21)
    >>> asyncio.run(double())
    42
    """

    def __init__(self, threads: int, max_waiting: int, name: str = "prepare"):
        """Create them; call `close` in the end.

        Args:
          threads: work that is done at a time.
          max_waiting: requests that may wait for a thread.
          name: of the threads.
        """
        self._most, self._count = threads + max_waiting, 0
        self._num_threads = threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._permits = asyncio.Semaphore(threads)
        self._running = set[concurrent.futures.Future[Any]]()
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, name)

    @property
    def is_busy(self) -> bool:
        """Whether a thread is working, perhaps for a client that has left."""
        return bool(self._running)

    async def run(self, function: Callable[..., R], *arguments: Any) -> R:
        """Run a function in one of the threads.

        Raises:
          ApiError: too many requests wait.
        """
        if self._count >= self._most:
            raise busy(
                f"server: found {self._count} requests being prepared; expected fewer than {self._most}, by its "
                "--max-waiting: send it again later"
            )
        self._count += 1
        try:
            free = self._free
            await free.acquire()
            return await asyncio.wrap_future(self._submit(free, function, *arguments))
        finally:
            self._count -= 1

    def close(self) -> None:
        """Begin nothing more; does not wait for what is running."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def _free(self) -> asyncio.Semaphore:
        """Of the running event loop: one that is closed with work of its own running returns no permits."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._permits = loop, asyncio.Semaphore(self._num_threads)
        return self._permits

    def _submit(
        self, free: asyncio.Semaphore, function: Callable[..., R], *arguments: Any
    ) -> concurrent.futures.Future[R]:
        loop = asyncio.get_running_loop()

        def end(future: concurrent.futures.Future[R]) -> None:
            self._running.discard(future)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(free.release)

        try:
            future = self._threads.submit(function, *arguments)
        except RuntimeError:
            free.release()
            raise ApiError(503, "server: found it ending; expected it ready") from None
        self._running.add(future)
        future.add_done_callback(end)
        return future


def busy(message: str) -> ApiError:
    """The error for a request that is to be sent again later."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
