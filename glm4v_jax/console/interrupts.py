"""Ctrl-C that is noted; and where Python or native code would lose it: in an import, in callbacks of some kinds."""

import os
import signal
import sys
import threading
import types
from typing import Any, Self

_SWALLOWING = ("_xla_gc_callback", "__hash__", "__eq__")
"""Functions that native code calls and whose errors it may drop, as `msgspec.convert` does in the hash of a type."""
_PAUSE = 0.05
"""Seconds until an interrupt that came at a bad moment is tried again."""


def interrupt_between_imports() -> None:
    """Have Ctrl-C raise `KeyboardInterrupt` once no import is under way, and where it is not ignored.

    In the middle of an import it may come out as another error, such as that a package is missing, or end the process
    with a segmentation fault (JAX's native code). In callbacks of the garbage collector, of weak references and in
    finalizers Python ignores exceptions, and so does native code in those of a dictionary's keys.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    within = frame
    while within is not None:
        code = within.f_code
        if code.co_filename == "<frozen importlib._bootstrap>" or code.co_name in _SWALLOWING:
            _again()
            return
        within = within.f_back
    signal.default_int_handler(number, frame)


def _unraisable(ignored: Any) -> None:
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        _again()
    else:
        sys.__unraisablehook__(ignored)


def _again() -> None:
    again = threading.Timer(_PAUSE, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


class Interrupt:
    """Ctrl-C that stops an answer and not the program: in the `with` block the first is noted, the second raised."""

    def __init__(self) -> None:
        self.is_set = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
