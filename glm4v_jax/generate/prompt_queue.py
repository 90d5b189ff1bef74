"""Prompts made ready while others are answered: pictures are read and resized in threads beside the device's work."""

import collections
import concurrent.futures
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from glm4v_jax.errors import Glm4vError
from glm4v_jax.generate.scheduler import Failure
from glm4v_jax.generate.sequence import Answer

T = TypeVar("T")

_THREADS = 2


class AnswerQueue(Generic[T]):
    """Answers to begin, in the order of their prompts, each made ready ahead of its turn."""

    def __init__(
        self,
        prompts: Iterable[T],
        prepare: Callable[[int, T], Answer],
        *,
        ahead: int,
        skip_errors: bool = False,
    ):
        """Begin to prepare.

        Args:
          prompts: read as they are needed, in the caller's thread.
          prepare: (number, prompt) -> answer; called in other threads.
          ahead: how many prompts to keep ready, pixels and all.
          skip_errors: hand out what was wrong with a prompt in its place, instead of raising it.
        """
        self._prompts: Iterator[tuple[int, T]] = enumerate(prompts)
        self._prepare, self._ahead, self._skip_errors = prepare, ahead, skip_errors
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, "prompts")
        self._ready: collections.deque[tuple[int, concurrent.futures.Future[Answer]]] = collections.deque()
        self._is_exhausted = False
        self.fill()

    @property
    def is_empty(self) -> bool:
        """Whether there are no more."""
        return self._is_exhausted and not self._ready

    def fill(self) -> None:
        """Begin to prepare more, up to those to keep ready: best called when the caller has nothing else to do."""
        while not self._is_exhausted and len(self._ready) < self._ahead:
            item = next(self._prompts, None)
            if item is None:
                self._is_exhausted = True
                return
            self._ready.append((item[0], self._threads.submit(self._prepare, *item)))

    def ready(self) -> list[Answer]:
        """Those that can be taken without waiting, in their order."""
        done = itertools.takewhile(concurrent.futures.Future.done, (future for _, future in self._ready))
        return [future.result() for future in done if future.exception() is None]

    def take(self, *, wait: bool) -> Answer | Failure | None:
        """The next answer, or what was wrong with its prompt; None if there are no more, or it is not ready yet.

        Args:
          wait: until it is ready.

        Raises:
          Glm4vError, OSError: what was wrong with its prompt.
        """
        if not self._ready:
            self.fill()
        if not self._ready or not (wait or self._ready[0][1].done()):
            return None
        index, future = self._ready.popleft()
        try:
            return future.result()
        except (Glm4vError, OSError) as error:
            if not self._skip_errors:
                raise
            return Failure(index, error)

    def close(self) -> None:
        """Forget what is left."""
        if sys.is_finalizing():
            return  # of an iterator that nobody closed; the threads' module may be gone already
        self._threads.shutdown(wait=False, cancel_futures=True)
