"""Noticing that a model has run into a loop."""

import math

from glm4v_jax.errors import GenerationError


class RepetitionGuard:
    """Notices that a text has become a loop: one piece of text over and over.

    A text loops once it ends in `times` copies of a piece of at least `window` characters, one right after another. So
    "ha" loops after 500 characters (the piece is 25 times "ha"), a paragraph of 120 characters when its tenth copy is
    complete. A ruler of "=" may be 499 long. Rows of a table, lines of code or the elements of a page that have much in
    common are not a loop, because what differs stands between what is equal.

    The numbers are those with which GLM-4.1V's reward system rejects an answer. Its rule counts equal windows of 50
    characters *anywhere* in the text, which suits a reward and not a stop: a page of HTML with ten cells of one style
    would be cut off. The price is that a loop with something new in every round is not noticed.

    Every character costs the same. A loop is looked for where the last `window` characters stood before; it is noticed
    some copies late if its piece has repetitions of that length within it.
    """

    def __init__(self, window: int = 50, times: int = 10) -> None:
        """Start with an empty text.

        Raises:
            GenerationError: `window` is below 1 or `times` below 2.
        """
        if window < 1:
            raise GenerationError(f"window: found {window}; expected at least 1 character")
        if times < 2:
            raise GenerationError(f"times: found {times}; expected at least 2")
        self._window = window
        self._times = times
        self._text: list[str] = []
        # Where windows ended, by their hashes. One in a few is enough to find a loop again, and keeps this small.
        self._stride = max(window // 4, 1)
        self._ends: dict[int, int] = {}
        self._period = 0
        self._equal = 0
        self._loops = False

    def push(self, text: str) -> bool:
        """Take the next piece of text and return whether the text loops, or has looped before."""
        tail = "".join(self._text[-self._window + 1 :]) if self._window > 1 else ""
        recent = tail + text
        for offset, character in enumerate(text, start=len(tail) + 1):
            if self._loops:
                break
            self._take(character, recent[max(offset - self._window, 0) : offset])
        return self._loops

    def _take(self, character: str, window: str) -> None:
        """Add a character, with which `window` ends."""
        text = self._text
        text.append(character)
        if self._period and text[-1 - self._period] == character:
            self._equal += 1
        else:
            self._period = self._equal = 0
        if len(window) < self._window:
            return
        key = hash(window)
        if not self._period and key in self._ends:
            self._adopt(len(text) - self._ends[key])
        if len(text) % self._stride == 0:
            self._ends[key] = len(text)
        if self._period:
            # The piece is as many periods as make up a window; the first period has nothing before it to be equal to.
            piece = self._period * math.ceil(self._window / self._period)
            self._loops = self._period + self._equal >= piece * self._times

    def _adopt(self, period: int) -> None:
        """Supposes a loop of `period` characters, and counts how far back it goes, within what sparse ends hide."""
        text = self._text
        limit = min(self._window + self._stride, len(text) - period)
        equal = 0
        while equal < limit and text[-1 - equal] == text[-1 - equal - period]:
            equal += 1
        self._period, self._equal = period, equal
