"""Prompts made ready while others are answered: pictures are read and resized in threads beside the device's work."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from glm4v_jax.errors import Glm4vError
from glm4v_jax.generate.answer import Answer

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
        on_error: Callable[[int, Exception], None] | None = None,
    ):
        """Begin to prepare.

        Args:
          prompts: read as they are needed, in the caller's thread.
          prepare: (number, prompt) -> answer; called in other threads.
          ahead: how many prompts to keep ready, pixels and all.
          on_error: what to do with a prompt that cannot be prepared, instead of raising what was wrong.
        """
        self._prompts: Iterator[tuple[int, T]] = enumerate(prompts)
        self._prepare, self._ahead, self._on_error = prepare, ahead, on_error
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, "prompts")
        self._ready: collections.deque[tuple[int, concurrent.futures.Future[Answer]]] = collections.deque()
        self._is_exhausted = False
        self._fill()

    @property
    def is_empty(self) -> bool:
        """Whether there are no more."""
        return self._is_exhausted and not self._ready

    def take(self, *, wait: bool) -> Answer | None:
        """The next answer; None if there are no more, or with `wait` False, if it is not ready yet.

        Raises:
          Glm4vError, OSError: what was wrong with its prompt.
        """
        while self._ready and (wait or self._ready[0][1].done()):
            index, future = self._ready.popleft()
            self._fill()
            try:
                return future.result()
            except (Glm4vError, OSError) as error:
                if self._on_error is None:
                    raise
                self._on_error(index, error)
        return None

    def close(self) -> None:
        """Forget what is left."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while not self._is_exhausted and len(self._ready) < self._ahead:
            item = next(self._prompts, None)
            if item is None:
                self._is_exhausted = True
                return
            self._ready.append((item[0], self._threads.submit(self._prepare, *item)))
