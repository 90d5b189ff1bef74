"""An answer on its way to a terminal, or to whatever else standard output is."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import rich.console
import rich.text

from glm4v_jax.console.progress import Programs, status
from glm4v_jax.console.table import printable
from glm4v_jax.generate.text.thinking import END_THINK, THINK, Kind

if TYPE_CHECKING:
    from glm4v_jax.generate.completion import Completion, Counts, Delta

STYLES = {Kind.TEXT: "", Kind.THOUGHT: "dim italic", Kind.ANSWER: "", Kind.BOX: "bold"}

_SHOWN_COMPILE_SECONDS = 0.5
# Less is too little to measure.
_LEAST_SECONDS = 0.1


class AnswerWriter:
    """Writes an answer to standard output while it is generated.

    On a terminal with styles thoughts are dim, boxed answers bold, and tags hidden; elsewhere the text is written as
    the model generated it.
    """

    def __init__(self) -> None:
        console = rich.console.Console(highlight=False)
        self._console = console if console.is_terminal and console.color_system is not None else None
        self._last: Kind | None = None
        self._is_at_start = True
        self._began_as_text = False

    def show(self, delta: "Delta") -> None:
        """Write a part of the answer."""
        if self._console is None:
            self._write_plainly(delta.text)
            return
        for kind, text in delta.parts:
            if self._last is not None and _is_new_section(self._last, kind):
                text = "\n\n" + text.lstrip("\n")
            if self._is_at_start:
                text = text.lstrip("\n")
            self._is_at_start = self._is_at_start and not text
            self._began_as_text |= self._last is None and kind is Kind.TEXT
            self._last = kind
            # Wrapped by the terminal and not by rich, which does not see whole lines.
            self._console.print(rich.text.Text(printable(text), style=STYLES[kind]), end="", soft_wrap=True)

    def end(self, completion: "Completion | None") -> None:
        """End the line; note if what was shown as text turned out to be a thought."""
        if self._console is None:
            self._write_plainly("\n")
            return
        self._console.print()
        has_thought = completion is not None and completion.parsed.is_thought_closed and bool(completion.thought)
        if has_thought and self._began_as_text and completion is not None and THINK not in completion.text:
            self._console.print(f"(the text before {END_THINK} is a thought without an opening tag)", style="dim")

    @staticmethod
    def _write_plainly(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _is_new_section(last: Kind, kind: Kind) -> bool:
    """Whether a thought begins or ends here, with or without tags. A box belongs to the text around it."""
    return (kind is Kind.THOUGHT) != (last is Kind.THOUGHT) or (last is Kind.TEXT and kind is Kind.ANSWER)


def after_status(deltas: "Iterator[Delta]", programs: Mapping[str, str]) -> "Iterator[Delta]":
    """Yield the same parts; until the first comes, show a spinner, and which of the programs is compiled."""
    from glm4v_jax.devices.compilation_cache import compiling

    text = "generating"
    with status(text) as show, compiling(Programs(programs, show, text)):
        first = next(deltas, None)
    if first is not None:
        # Closed together with this generator: otherwise it would continue to generate tokens.
        with contextlib.closing(deltas):  # type: ignore[type-var]
            yield first
            yield from deltas


@dataclasses.dataclass(frozen=True)
class AnswerTimes:
    """Times of an answer.

    Attributes:
      seconds: from the question to the end.
      compiled: how many of these went into compilation; the other figures are without them.
      first: seconds until the first part, before which the prompt is run.
      rate: tokens per second after the first part; None if that was all, or the rest came too soon to be measured.
    """

    seconds: float
    compiled: float
    first: float
    rate: float | None


class Stopwatch:
    """Times an answer, from now on.

    Attributes:
      compiled: seconds of each program compiled so far, as `compile_times` collects them.
    """

    def __init__(self, compiled: Sequence[float] = (), clock: Callable[[], float] = time.perf_counter) -> None:
        self.compiled = compiled
        self.first = 0.0
        self._burst, self._clock, self._started = 0, clock, clock()

    def note(self, delta: "Delta") -> None:
        """Note a part of the answer."""
        if not self.first:
            self.first, self._burst = self._clock() - self._started - sum(self.compiled), len(delta.tokens)

    def stop(self, tokens: int) -> AnswerTimes:
        """The times of an answer of `tokens` tokens."""
        seconds, compiled = self._clock() - self._started, sum(self.compiled)
        after_first, rest = seconds - compiled - self.first, tokens - self._burst
        rate = rest / after_first if rest > 0 and after_first > _LEAST_SECONDS else None
        return AnswerTimes(seconds, compiled, self.first, rate)


def figures(completion: "Completion", counts: "Counts", times: AnswerTimes, reused: int = 0) -> str:
    """A line of counts of an answer's tokens and times; `reused` tokens of the prompt were in the KV cache."""
    cached = f" ({reused} from the cache)" if reused else ""
    kinds = f" ({counts})" if counts.thought else ""
    compiled = f" ({times.compiled:.1f} s compiling)" if times.compiled > _SHOWN_COMPILE_SECONDS else ""
    then = "" if times.rate is None else f", then {times.rate:.1f} tokens/s"
    stop = f" ({completion.stop_string!r})" if completion.stop_string is not None else ""
    reason = "stopped by you" if completion.finish_reason == "cancelled" else completion.finish_reason
    return (
        f"{completion.prompt_tokens} prompt tokens{cached}, {len(completion.tokens)} new{kinds} in "
        f"{times.seconds:.2f} s{compiled}, first after {times.first:.2f} s{then}, finish reason: {reason}{stop}"
    )
