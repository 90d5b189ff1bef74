"""Standard output and standard error of a command: what is dropped, escaped, or put into a line."""

import collections
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from glm4v_jax.console.distributed import LOG_LEVEL, READER_GONE
from glm4v_jax.errors import one_line

_SHOWN_NOTES = 20
"""Of one kind; ten thousand files may have the same flaw."""


_CACHE_FAULTS = ("Error reading persistent compilation cache", "Error writing persistent compilation cache")
"""What JAX warns of."""
_CACHE_NOTE = (
    "the cache of compiled programs fails, and programs are compiled again: `glm4v cache --clear` removes damaged files"
)


def say_line(text: str) -> None:
    """Print a line on standard error in one call; `print` makes two, and another thread's line may come between."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def notes(name: str, *, quiet: bool) -> Iterator[None]:
    """Print what libraries and this package warn of as lines of their own, without the place in Python's code."""
    counts: collections.Counter[tuple[str, int]] = collections.Counter()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if quiet:
            return
        counts[filename, lineno] += 1
        if str(message).startswith(_CACHE_FAULTS):  # one for each program
            if counts[filename, lineno] == 1:
                text = " ".join(str(message).partition(": ")[2].split())
                say_line(f"{name}: note: {_CACHE_NOTE} ({text})")
            return
        if counts[filename, lineno] <= _SHOWN_NOTES:
            say_line(f"{name}: note: {' '.join(str(message).split())}")
        if counts[filename, lineno] == _SHOWN_NOTES:
            say_line(f"{name}: note: more of this kind are not shown")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def silent_errors() -> Iterator[None]:
    """Write what goes to standard error to nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


class _Losing(io.TextIOBase):
    """A stream that loses what cannot be written."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()
        return len(text)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


@contextlib.contextmanager
def losing_errors() -> Iterator[None]:
    """Lose what cannot be written to standard error: a full disk for its log must not end a server."""
    with contextlib.redirect_stderr(_Losing(sys.stderr)):
        yield


@contextlib.contextmanager
def native_logs(verbose: bool) -> Iterator[None]:
    """Have JAX, if it is imported in the body, log what it compiles; or hide what its native code logs.

    That code calls a compilation of more than two minutes a probable bug of XLA, which is what a large model takes.
    """
    wanted = {"JAX_LOG_COMPILES": "1"} if verbose else {LOG_LEVEL: "3"}
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def open_closed_output() -> None:
    """Write to nowhere where standard output or standard error was closed (`>&-`), which Python has no stream for."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for the rest of the process


def escape_unencodable() -> None:
    """Write what the encoding of standard output lacks as escapes, as standard error does, in place of failing.

    That is most characters where it is ASCII (a C locale, PYTHONIOENCODING=ascii), and names of files that are not
    valid Unicode everywhere.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Write standard output to nowhere, once nobody reads it.

    Python flushes once more at its end, which must not fail; see the documentation of SIGPIPE in `signal`.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_flushed() -> bool:
    """Flush standard output; discard it where that fails, as on a full disk: Python would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()
        return False
    return True


def output_failed(name: str, error: OSError) -> int:
    """Say that standard output, or the file that the error names, cannot be written; return the exit status."""
    discard_output()
    if isinstance(error, BrokenPipeError):
        return READER_GONE
    say_line(f"{name}: error: {'standard output: ' if error.filename is None else ''}{one_line(error)}")
    return 1
