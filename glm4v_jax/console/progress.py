"""What a person sees on standard error while a command works: a progress bar, or a spinner.

Off a terminal the bar becomes a plain line every ten seconds, and the spinner nothing.
"""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import rich.console
import rich.progress
import rich.text

from glm4v_jax.console.table import printable

if TYPE_CHECKING:
    from glm4v_jax.generate.engine import Engine
    from glm4v_jax.generate.offline.batch import BatchSummary, PromptBatch
    from glm4v_jax.inputs.processor import Glm4vProcessor

COMPILING = "compiling"
"""Shown until the first answer, or the first part of one, arrives."""
_PERIOD = 10.0
"""Seconds between two plain lines."""


class Progress:
    """Shows how much of a job is done, how fast it is, and how long the rest will take.

    The bar appears with the first `update`. Rates are measured from the first thing that gets done: what comes before
    it is compilation, which says nothing of the rest.

    >>> with Progress("reading", "rows") as progress:
    ...     progress.update(1, 2)
    ...     progress.update(2, 2)
    """

    def __init__(
        self,
        description: str,
        unit: str = "bytes",
        waiting: str = "",
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Set up; nothing is shown yet.

        Args:
          description: of the job, as "converting".
          unit: what is counted, in the plural; "bytes" are shown in kB, MB and GB.
          waiting: shown on a terminal until there is a rate.
          clock: seconds.
        """
        self._description, self._unit, self._waiting, self._clock = description, unit, waiting, clock
        self._initial: int | None = None
        self._first: tuple[int, float] | None = None
        self._tokens = 0
        self._printed = clock()
        self._bar: rich.progress.Progress | None = None
        self._task: Any = None
        self._console = rich.console.Console(stderr=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, done: int, total: int, tokens: int = 0) -> None:
        """Show how far the job is.

        Args:
          done: units so far, those of an earlier run included.
          total: units in all.
          tokens: generated since the last call.
        """
        now = self._clock()
        if self._initial is None:
            self._initial = done
        if self._first is not None:
            self._tokens += tokens
        elif done > self._initial:
            self._first = (done, now)
        figures = self._figures(done, total, now)
        if self._console.is_terminal:
            self._update_bar(done, total, figures)
        elif now - self._printed >= _PERIOD and done:
            self._printed = now
            self.log(f"{self._description}: {figures}")

    def log(self, line: str) -> None:
        """Print a line on standard error, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(rich.text.Text(printable(line)), soft_wrap=True)
        else:
            print(printable(line), file=sys.stderr, flush=True)

    def _update_bar(self, done: int, total: int, figures: str) -> None:
        if self._bar is None:
            columns = (
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.fields[figures]}"),
                rich.progress.TimeElapsedColumn(),
            )
            self._bar = rich.progress.Progress(*columns, console=self._console, transient=True, expand=True)
            self._task = self._bar.add_task(self._description, total=total, figures=figures)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, figures=figures)

    def _figures(self, done: int, total: int, now: float) -> str:
        parts = [f"{self._amount(done)} of {self._amount(total, unit=True)}"]
        first, since = self._first or (done, now)
        if done > first and now > since:
            rate = (done - first) / (now - since)
            parts.append(f"{self._amount(rate, unit=True)}/s")
            if self._tokens:
                parts.append(f"{self._tokens / (now - since):.1f} tokens/s")
            parts.append(f"{datetime.timedelta(seconds=round((total - done) / rate))} left")
        elif self._waiting and self._console.is_terminal:
            parts.append(self._waiting)
        return ", ".join(parts)

    def _amount(self, count: float, unit: bool = False) -> str:
        if self._unit == "bytes":
            return decimal_size(round(count))
        number = f"{count:,}" if isinstance(count, int) else f"{count:.2f}"
        return f"{number} {self._unit}" if unit else number


def run_batch(
    batch: "PromptBatch",
    processor: "Glm4vProcessor",
    load: Callable[[], "Engine"],
    *,
    restart: bool = False,
    debug: bool = False,
) -> "BatchSummary":
    """`PromptBatch.run` for a person: with a progress bar, and a summary at the end.

    Args:
      batch, processor, load, restart: see `PromptBatch.run`.
      debug: show what decoders log, too.
    """
    from glm4v_jax.inputs.media.quiet import quiet_ffmpeg, without_size_warnings

    quiet = contextlib.nullcontext() if debug else quiet_ffmpeg()
    with quiet, without_size_warnings(), Progress("answering", batch.things, COMPILING) as progress:
        summary = batch.run(processor, load, progress, restart=restart)
    print(summary, file=sys.stderr, flush=True)
    return summary


def decimal_size(nbytes: int) -> str:
    """Format a number of bytes in decimal units.

    >>> decimal_size(1_500_000_000)
    '1.50 GB'
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Show a spinner with a text on a terminal, while the body runs."""
    console = rich.console.Console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield
