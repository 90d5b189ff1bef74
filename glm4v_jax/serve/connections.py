"""Connections that do nothing: clients that never ask, ask half, or never read what they asked for."""

import time
from collections.abc import Callable, Iterable
from typing import Any


class Watch:
    """Cuts connections that are of no use.

    Uvicorn's own timer begins after a response, ends with the first byte of the next request, and then waits until
    what is to be sent has been read.
    """

    def __init__(self, seconds: float, most: int, clock: Callable[[], float] = time.monotonic):
        """Begin to watch.

        Args:
          seconds: without a request and without reading.
          most: connections; of more, those that have been idle for longest are cut at once.
          clock: the time.
        """
        self._seconds, self._most, self._clock = seconds, most, clock
        self._idle: dict[Any, tuple[Any, float]] = {}

    def cut(self, connections: Iterable[Any]) -> None:
        """Cut what has been idle for too long.

        Args:
          connections: uvicorn's protocols, with their `cycle` and `transport`.
        """
        now, connections = self._clock(), list(connections)
        before, self._idle = self._idle, {}
        for one in connections:
            unsent = one.transport.get_write_buffer_size()
            if unsent or one.cycle is None or one.cycle.response_complete or one.transport.is_closing():
                state = (one.cycle, unsent)
                was, since = before.get(one, (None, now))
                self._idle[one] = (state, since if was == state else now)
        longest = sorted(self._idle, key=lambda one: self._idle[one][1])
        excess = max(len(connections) - self._most, 0)
        for number, one in enumerate(longest):
            if number < excess or now - self._idle[one][1] >= self._seconds:
                one.transport.abort()
