"""What a person sees on standard error while a command works: a progress bar, or a spinner.

Off a terminal the bar becomes a plain line every ten seconds, and the spinner nothing.
"""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import rich.console
import rich.progress
import rich.text

from glm4v_jax.console.table import printable
from glm4v_jax.files import decimal_size

if TYPE_CHECKING:
    from glm4v_jax.generate.engine import Engine
    from glm4v_jax.generate.offline.batch import BatchSummary, PromptBatch
    from glm4v_jax.inputs.processor import Glm4vProcessor

_PERIOD = 10.0
"""Seconds between two plain lines."""


def seldom(log: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that logs how far a job is: at most one line in ten seconds, the first ten seconds from now."""
    logged = time.perf_counter()

    def log_seldom(line: str) -> None:
        nonlocal logged
        if (now := time.perf_counter()) - logged > _PERIOD:
            logged = now
            log(line)

    return log_seldom


class Progress:
    """Shows how much of a job is done, how fast it is, and how long the rest will take.

    The bar appears with the first `update`. Rates are measured from the first thing that gets done, and without the
    time for compilation, which says nothing of the rest.

    >>> with Progress("reading", "rows") as progress:
    ...     progress.update(1, 2)
    ...     progress.update(2, 2)
    """

    def __init__(
        self,
        description: str,
        unit: str = "bytes",
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Set up, to count units such as "bytes", which are shown in kB, MB and GB; nothing is shown yet."""
        self._description, self._unit, self._clock = description, unit, clock
        self._doing = ""
        self._initial: int | None = None
        self._last = 0, 0
        self._first: tuple[int, float, float] | None = None
        self._compiled = 0.0
        self._tokens = 0
        self._printed = clock()
        self._bar: rich.progress.Progress | None = None
        self._task: Any = None
        self._console = rich.console.Console(stderr=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, done: int, total: int, tokens: int = 0, compiled: float = 0.0) -> None:
        """Show how far the job is: `done` of `total` units, those of an earlier run included.

        `tokens` were generated since the last call, `compiled` seconds went into compilation so far.
        """
        now = self._clock()
        self._last, self._compiled, self._doing = (done, total), compiled, ""
        if self._initial is None:
            self._initial = done
        if self._first is not None:
            self._tokens += tokens
        elif done > self._initial:
            self._first = (done, now, compiled)
        figures = self._figures(done, total, now)
        if self._console.is_terminal:
            self._update_bar(done, total, figures)
        elif now - self._printed >= _PERIOD and done:
            self._printed = now
            self.log(f"{self._description}: {figures}")

    def doing(self, text: str) -> None:
        """Show on a terminal what the job is waiting for, until the next `update`."""
        self._doing = text
        if self._bar is not None:
            self._update_bar(*self._last, self._figures(*self._last, self._clock()))
            self._bar.refresh()

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
        first, since, compiled = self._first or (done, now, self._compiled)
        seconds = now - since - (self._compiled - compiled)
        if done > first and seconds > 0:
            rate = (done - first) / seconds
            parts.append(f"{self._amount(rate, unit=True)}/s")
            if self._tokens:
                parts.append(f"{self._tokens / seconds:.1f} tokens/s")
            parts.append(f"{datetime.timedelta(seconds=round((total - done) / rate))} left")
        if self._doing:
            parts.append(self._doing)
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
    verbose: bool = False,
) -> "BatchSummary":
    """`PromptBatch.run` for a person: with a progress bar, and a summary at the end.

    Args:
      batch, processor, load, restart: see `PromptBatch.run`.
      verbose: show what decoders log, too.
    """
    from glm4v_jax.inputs.media.quiet import quiet_ffmpeg, without_size_warnings

    quiet = contextlib.nullcontext() if verbose else quiet_ffmpeg()
    stack = contextlib.ExitStack()
    with quiet, without_size_warnings(), Progress("answering", batch.things) as progress, stack:

        def loaded() -> "Engine":
            engine = load()  # which imports JAX
            from glm4v_jax.devices.compilation_cache import compiling
            from glm4v_jax.generate.warmup import programs

            stack.enter_context(compiling(Programs(programs(), progress.doing)))
            return engine

        summary = batch.run(processor, loaded, progress, restart=restart)
    print(summary, file=sys.stderr, flush=True)
    return summary


@contextlib.contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with a text on a terminal, while the body runs; it may call what this yields with another text."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(text) as shown:
        yield shown.update


class Programs:
    """Counts programs as XLA compiles them.

    >>> shown = []
    >>> note = Programs({"encode": "vision encoder", "prefill": "prefill"}, shown.append, "generating")
    >>> for name in ("prefill", None, "broadcast", None):
    ...     note(name)
    >>> shown
    ['compiling 1 of 2: prefill', 'generating']
    """

    def __init__(self, expected: Mapping[str, str], show: Callable[[str], None], otherwise: str = ""):
        """Expect these: name of a jitted function -> what to call it; others are small, and not counted.

        `show` is called with a text when the compilation of one begins, and with `otherwise` when it has ended.
        """
        self._expected, self._show, self._otherwise = expected, show, otherwise
        self._begun, self._is_shown = 0, False

    def __call__(self, name: str | None) -> None:
        """Note that the compilation of a function begins; or ends, with None."""
        if name is None and self._is_shown:
            self._is_shown = False
            self._show(self._otherwise)
        elif name is not None and name in self._expected:
            self._is_shown = True
            self._begun += 1
            # A function may be compiled for several shapes.
            self._show(f"compiling {self._begun} of {max(self._begun, len(self._expected))}: {self._expected[name]}")
