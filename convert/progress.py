"""How far a conversion is: a bar on a terminal, a plain line every so often elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

_PERIOD = 10.0
"""Seconds between two plain lines."""


@contextlib.contextmanager
def shown(what: str) -> Iterator[Callable[[int, int], None]]:
    """Inside, what is yielded takes bytes done and bytes in all and shows them on standard error, with speed and time
    left.
    """
    console = rich.console.Console(file=sys.stderr)
    if not console.is_terminal:
        yield _Lines(what).show
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


class _Lines:
    """A line now and then."""

    def __init__(self, what: str):
        self._what = what
        self._started = self._told = time.perf_counter()

    def show(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._told < _PERIOD or not done:
            return
        self._told = now
        speed = done / (now - self._started)
        left = (total - done) / speed
        print(
            f"{self._what}: {gigabytes(done)} of {gigabytes(total)}, {speed / 1e6:.0f} MB/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
