"""Ctrl-C while a program is importing."""

import os
import signal
import threading
import types

_PAUSE = 0.05
"""Seconds until an interrupt in the middle of an import is tried again."""


def interrupt_between_imports() -> None:
    """Have Ctrl-C raise `KeyboardInterrupt` once no import is under way.

    In the middle of an import it may come out as another error, such as that a package is missing, or end the process
    with a segmentation fault (JAX's native code); in JAX's callback of the garbage collector it is lost.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    within = frame
    while within is not None:
        code = within.f_code
        if code.co_filename == "<frozen importlib._bootstrap>" or code.co_name == "_xla_gc_callback":
            again = threading.Timer(_PAUSE, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        within = within.f_back
    signal.default_int_handler(number, frame)
