"""Answers on their way to a person's screen, or to whatever else standard output is."""

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

# Seconds; of answers that came at once there is nothing to measure between two bursts.
_LEAST_SECONDS = 0.1


class AnswerWriter:
    """Writes an answer to standard output while it is made.

    On a terminal that knows styles thoughts are dim and boxed answers bold, and the tags that say so are left out.
    Elsewhere the text goes out as the model wrote it, with its tags.
    """

    def __init__(self) -> None:
        console = rich.console.Console(highlight=False)
        self._console = console if console.is_terminal and console.color_system is not None else None
        self._last: Kind | None = None
        self._is_at_start = True
        self._began_as_text = False

    def show(self, delta: "Delta") -> None:
        """Writes a piece, and does not keep it."""
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
            # Wrapped by the terminal and not by rich, which sees pieces and no lines.
            self._console.print(rich.text.Text(printable(text), style=STYLES[kind]), end="", soft_wrap=True)

    def end(self, completion: "Completion | None") -> None:
        """Ends the line; says so if what was shown as text turned out to be a thought."""
        if self._console is None:
            self._write_plainly("\n")
            return
        self._console.print()
        has_thought = completion is not None and completion.parsed.is_thought_closed and bool(completion.thought)
        if has_thought and self._began_as_text and completion is not None and THINK not in completion.text:
            self._console.print(f"(what came before {END_THINK} was the thought: it had no opening tag)", style="dim")

    @staticmethod
    def _write_plainly(text: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


def _is_new_section(last: Kind, kind: Kind) -> bool:
    """Whether a thought begins or ends here, with or without its tags. A box is part of what is around it."""
    return (kind is Kind.THOUGHT) != (last is Kind.THOUGHT) or (last is Kind.TEXT and kind is Kind.ANSWER)


def after_status(deltas: "Iterator[Delta]", text: str) -> "Iterator[Delta]":
    """The same pieces; until the first comes, a person is told what is going on."""
    with status(text):
        first = next(deltas, None)
    if first is not None:
        # Closed with this one: a generator that only waits for its end would go on making tokens.
        with contextlib.closing(deltas):  # type: ignore[type-var]
            yield first
            yield from deltas


def rate_after_first(tokens: int, burst: int, seconds: float, first: float) -> float | None:
    """Tokens a second behind the first piece of an answer, before which its prompt is run and programs are compiled.

    Args:
      tokens: of the answer.
      burst: of its first piece.
      seconds: of the whole.
      first: seconds until the first piece came.

    Returns:
      None where the first piece was all, or the rest came too soon behind it to be measured.
    """
    is_slow = tokens > burst and seconds - first > _LEAST_SECONDS
    return (tokens - burst) / (seconds - first) if is_slow else None
