"""Prompts prepared ahead: images and videos are read and resized in threads while the device works."""

import collections
import concurrent.futures
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from glm4v_jax.errors import Glm4vError, naming
from glm4v_jax.generate.scheduler import Failure
from glm4v_jax.generate.sequence import SequenceState

T = TypeVar("T")

_THREADS = 2


class PromptQueue(Generic[T]):
    """A queue of requests, in the order of their prompts, prepared ahead in threads; see `scheduler.RequestQueue`."""

    def __init__(
        self,
        prompts: Iterable[T],
        prepare: Callable[[int, T], SequenceState],
        *,
        ahead: int,
        skip_errors: bool = False,
    ):
        """Start preparing.

        Prompts are read as they are needed, in the caller's thread; `prepare` is called with number and prompt in
        others, for `ahead` prompts, whose pixels are kept. `skip_errors`: return a `Failure` instead of raising.
        """
        self._prompts: Iterator[tuple[int, T]] = enumerate(prompts)
        self._prepare, self._ahead, self._skip_errors = prepare, ahead, skip_errors
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, "prompts")
        self._ready: collections.deque[tuple[int, concurrent.futures.Future[SequenceState]]] = collections.deque()
        self._is_exhausted = False
        self.fill()

    @property
    def is_empty(self) -> bool:
        """Whether there are no more."""
        return self._is_exhausted and not self._ready

    def fill(self) -> None:
        """Start preparing more prompts, up to `ahead`; best called while the caller has nothing else to do."""
        while not self._is_exhausted and len(self._ready) < self._ahead:
            item = next(self._prompts, None)
            if item is None:
                self._is_exhausted = True
                return
            self._ready.append((item[0], self._threads.submit(self._prepare, *item)))

    def ready(self) -> list[SequenceState]:
        """The requests that can be taken without waiting, in their order."""
        done = itertools.takewhile(concurrent.futures.Future.done, (future for _, future in self._ready))
        return [future.result() for future in done if future.exception() is None]

    def take(self, *, wait: bool) -> SequenceState | Failure | None:
        """The next request, or why its prompt failed; None if there are no more, or, unless `wait`, none is prepared.

        Raises:
          Glm4vError, OSError: its prompt cannot be prepared; the message begins with its number.
        """
        if not self._ready:
            self.fill()
        if not self._ready or not (wait or self._ready[0][1].done()):
            return None
        index, future = self._ready.popleft()
        try:
            return future.result()
        except (Glm4vError, OSError) as error:
            if self._skip_errors:
                return Failure(index, error)
            if not isinstance(error, Glm4vError):
                raise
            with naming(f"prompt {index}", type(error)):
                raise

    def close(self) -> None:
        """Cancel what has not been taken."""
        if sys.is_finalizing():
            return  # an iterator that was never closed; the threads' module may be gone already
        self._threads.shutdown(wait=False, cancel_futures=True)
