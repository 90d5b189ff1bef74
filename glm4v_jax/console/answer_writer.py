"""An answer on its way to a terminal, or to whatever else standard output is."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import rich.console
import rich.text

from glm4v_jax.console.progress import status
from glm4v_jax.console.table import printable
from glm4v_jax.generate.text.thinking import END_THINK, THINK, Kind

if TYPE_CHECKING:
    from glm4v_jax.generate.completion import Completion, Delta

STYLES = {Kind.TEXT: "", Kind.THOUGHT: "dim italic", Kind.ANSWER: "", Kind.BOX: "bold"}

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
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


def _is_new_section(last: Kind, kind: Kind) -> bool:
    """Whether a thought begins or ends here, with or without tags. A box belongs to the text around it."""
    return (kind is Kind.THOUGHT) != (last is Kind.THOUGHT) or (last is Kind.TEXT and kind is Kind.ANSWER)


def after_status(deltas: "Iterator[Delta]", text: str) -> "Iterator[Delta]":
    """Yield the same parts; until the first comes, show a spinner with a text."""
    with status(text):
        first = next(deltas, None)
    if first is not None:
        # Closed together with this generator: otherwise it would continue to generate tokens.
        with contextlib.closing(deltas):  # type: ignore[type-var]
            yield first
            yield from deltas


def rate_after_first(tokens: int, burst: int, seconds: float, first: float) -> float | None:
    """Tokens per second after the first part of an answer; before it, its prompt is run and programs are compiled.

    Args:
      tokens: of the answer.
      burst: of its first part.
      seconds: of the whole.
      first: seconds until the first part.

    Returns:
      None if the first part was all, or the rest came too soon after it to be measured.
    """
    is_slow = tokens > burst and seconds - first > _LEAST_SECONDS
    return (tokens - burst) / (seconds - first) if is_slow else None
