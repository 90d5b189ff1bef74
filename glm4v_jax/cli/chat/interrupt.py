"""Ctrl-C that stops an answer and not the program."""

import signal
from types import FrameType
from typing import Any, Self


class Interrupt:
    """Inside the `with` block a first Ctrl-C is noted, and a second one raises `KeyboardInterrupt`."""

    def __init__(self) -> None:
        self.is_set = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
