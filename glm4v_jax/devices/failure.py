"""What ends one of several processes ends all of them, with its message.

`fail` leaves the message with the coordination service, where a thread of every other process waits for it. A process
that dies without a word is noticed by JAX itself, which counts heartbeats.
"""

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import jax

from glm4v_jax.devices import coordination

_FAILED, _HEARD = "glm4v_jax/failed", "glm4v_jax/heard/"
# How much later a process may end for listening to the others.
_LISTEN_SECONDS = 1
# The first process holds what the others read: it must not end before they have read it, and have ended themselves.
_FAREWELL_SECONDS = 5.0
_LAST_SECONDS = 0.5
# What is wrong in all processes is the first one's to report.
_PRECEDENCE_SECONDS = 1.0
_PAUSE = 0.05


def print_error(message: str) -> None:
    """Report a message on standard error."""
    print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201


_report: Callable[[str], None] = print_error


def report_with(report: Callable[[str], None]) -> None:
    """Set what is done with the message that this process ends with, its own or another's."""
    global _report
    _report = report


def watch() -> None:
    """End this process when another fails, and all of them for an exception here that nobody catches."""
    is_over = threading.Event()
    listener = threading.Thread(target=_listen, args=(is_over,), name="failures of other processes", daemon=True)
    listener.start()
    atexit.register(_stop, listener, is_over)
    sys.excepthook = functools.partial(_uncaught, sys.excepthook)


def fail(message: str, status: int = 1, *, is_reported: bool = False) -> NoReturn:
    """End all processes with a message, which names this one in the others, whose status is 1.

    `is_reported`: the message has been reported in this process.
    """
    index = coordination.process_index()
    if index > 0:
        time.sleep(_PRECEDENCE_SECONDS)
    if not coordination.put(_FAILED, f"process {index}: {message}"):
        time.sleep(2 * _FAREWELL_SECONDS)  # the listener reports which process was the first to fail
    if not is_reported:
        _report(message)
    if index == 0:
        _wait_for_listeners(coordination.process_count() - 1)
    _leave(status)


def _listen(is_over: threading.Event) -> None:
    """Wait for another process's failure, and end this one."""
    message = None
    while message is None:
        if is_over.is_set():
            return
        try:
            message = coordination.wait_for(_FAILED, _LISTEN_SECONDS)
        except jax.errors.JaxRuntimeError:
            return  # this process comes to its end, or the first one has, which JAX sees to
    index = coordination.process_index()
    if message.startswith(f"process {index}: "):
        return
    _report(message)
    if index == 0:
        _wait_for_listeners(coordination.process_count() - 2)
    else:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            coordination.put(f"{_HEARD}{index}", "heard")
    _leave(1)


def _stop(listener: threading.Thread, is_over: threading.Event) -> None:
    """Let the listener end: if Python ended while it is in native code, that would abort the process."""
    is_over.set()
    listener.join(2 * _LISTEN_SECONDS)


def _wait_for_listeners(number: int) -> None:
    """Give other processes the time to hear of a failure: the message is kept in the first process."""
    deadline = time.monotonic() + _FAREWELL_SECONDS
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        while coordination.count(_HEARD) < number and time.monotonic() < deadline:
            time.sleep(_PAUSE)
    time.sleep(_LAST_SECONDS)


def _uncaught(
    before: Callable[..., Any], kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Replace `sys.excepthook`: print as before, and end all processes."""
    before(kind, error, traceback)
    fail(" ".join(f"{kind.__name__}: {error}".split()), is_reported=True)


def _leave(status: int) -> NoReturn:
    """End the process at once: a computation may be waiting for the others for ever, and Python would wait for it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
