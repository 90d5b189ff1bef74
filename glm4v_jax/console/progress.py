"""How far a batch is: a bar on a terminal, a plain line every so often elsewhere."""

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.progress
import rich.text

from glm4v_jax.console.answer_writer import COMPILING, printable

_PERIOD = 10.0
"""Seconds between two plain lines."""


class Progress:
    """Counts prompts and tokens and shows them on standard error."""

    def __init__(self, total: int, done: int, things: str = "prompts"):
        """Begin.

        Args:
          total: prompts in all.
          done: of these, how many an earlier run has answered.
          things: what a person calls them.
        """
        self._total, self._done, self._things = total, done, things
        self._timed = 0
        self._tokens = 0
        self._told = time.perf_counter()
        # Of the first prompt to be done: until then programs are compiled, which says nothing of what follows.
        self._first: float | None = None
        self._bar: rich.progress.Progress | None = None
        self._task: Any = None

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the bar is on the screen."""
        console = rich.console.Console(file=sys.stderr)
        if not console.is_terminal:
            yield
            return
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[rates]}"),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=console) as bar:
            self._bar = bar
            self._task = bar.add_task(self._things, total=self._total, completed=self._done, rates=COMPILING)
            try:
                yield
            finally:
                self._bar = None

    def add(self, tokens: int) -> None:
        """Another prompt is done, and so many tokens were made for it."""
        self._done += 1
        now = time.perf_counter()
        if self._first is None:
            self._first = now
        else:
            self._timed += 1
            self._tokens += tokens
        rates = self._rates(now - self._first)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rates=rates)
        elif now - self._told >= _PERIOD:
            self._told = now
            print(f"{self._done}/{self._total} {self._things}{', ' * bool(rates)}{rates}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """Says something beside the figures."""
        if self._bar is not None:
            self._bar.console.print(rich.text.Text(printable(line)), soft_wrap=True)
        else:
            print(printable(line), file=sys.stderr, flush=True)

    def _rates(self, seconds: float) -> str:
        if not self._timed or not seconds:
            return ""
        left = datetime.timedelta(seconds=round(seconds / self._timed * (self._total - self._done)))
        return f"{self._timed / seconds:.2f} {self._things}/s, {self._tokens / seconds:.1f} tokens/s, {left} left"
