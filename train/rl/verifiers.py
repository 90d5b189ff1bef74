"""Rewards of answers, by domain: rules alone, deterministic, and total: any text has a reward from 0 to 1.

Before a rule compares anything, the whole text is read. Its reward is 0 where it is a loop; where it has long parts in
Chinese and in English; where no answer follows its thought; and where the answer has no box, or more than one: models
that are paid for a list of answers write lists. Nothing is paid for the format alone.

The gates are those of the model's own reward system (zai-org/GLM-V, glmv_reward). Nothing here evaluates what a model
wrote; what may take long is asked in another process, see `judging.py`.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from eval.metrics import Reference, Score
from eval.parse_answer import LATEX_BOX, final_answer
from glm4v_jax.config.thinking import THINKING, ThinkingFormat
from glm4v_jax.generate.text.thinking import BOX, END_BOX, ThinkingParser
from train.rl.config import VerifierConfig
from train.rl.rules import RULES, reference_answer

Reason = Literal[
    "right", "partly", "wrong", "unreadable", "no answer", "no box", "several boxes", "loop", "mixed languages",
    "failed", "timed out",
]  # fmt: skip
"""Why an answer has its reward."""

UNREADABLE: frozenset[Reason] = frozenset({"unreadable", "no answer", "no box", "several boxes"})
"""Answers that could not be compared; counted apart from wrong ones."""
FAILURES: frozenset[Reason] = frozenset({"failed", "timed out"})
"""Answers that a verifier could not score, by no fault of the answer."""

_WINDOW, _TIMES = 50, 10
_CHINESE, _WORD = re.compile("[\u4e00-\u9fff]"), re.compile("[A-Za-z]+")


class Reward(NamedTuple):
    """The reward of one answer, from 0 to 1; `parsed` is what was compared, as JSON, None where nothing could be."""

    value: float
    parsed: Any
    reason: Reason

    @classmethod
    def of(cls, score: Score) -> "Reward":
        """Return the reward that a rule's score is."""
        if score.parsed is None:
            return cls(0.0, None, "unreadable")
        return cls(score.value, score.parsed, "right" if score.value == 1 else "partly" if score.value > 0 else "wrong")


@dataclasses.dataclass(frozen=True)
class Verifier:
    """What a domain's answers are scored with, by a rule of `train.rl.rules`: a pure and total function.

    >>> verifier = Verifier(VerifierConfig(kind="counting"))
    >>> verifier.score("<think>…</think><answer>I see <|begin_of_box|>3<|end_of_box|>.</answer>", {"answer": 3})
    Reward(value=1.0, parsed='3', reason='right')
    >>> verifier.score("<answer><|begin_of_box|>3<|end_of_box|> or <|begin_of_box|>4<|end_of_box|>", {"answer": 3})
    Reward(value=0.0, parsed=None, reason='several boxes')

    Attributes:
      config: of the domain.
      thinking: how the model writes thoughts.
    """

    config: VerifierConfig
    thinking: ThinkingFormat = THINKING["tagged"]

    def score(self, text: str, item: Reference) -> Reward:
        """Return the reward of a text, by the rule alone; DataError for an invalid reference, never for a text."""
        answer = self.answer(text)
        return answer if isinstance(answer, Reward) else self.compare(answer, item)

    def compare(self, answer: str, item: Reference) -> Reward:
        """Return the reward of an answer that `answer` has read."""
        return Reward.of(RULES[self.config.kind](answer, item, self.config))

    def answer(self, text: str) -> str | Reward:
        """Return what of a text is compared, or the reward of one that is not."""
        parser = ThinkingParser(self.thinking)
        parser.push(text)
        parser.finish()
        answer = parser.parsed().answer
        if is_loop(text):
            return Reward(0.0, None, "loop")
        if self.config.one_language and is_mixed(text):
            return Reward(0.0, None, "mixed languages")
        if not answer or (parser.is_thought_open and parser.has_tags):
            return Reward(0.0, None, "no answer")
        tagged = parser.answer_with_boxes()
        opened, closed, latex = tagged.count(BOX), tagged.count(END_BOX), answer.count(LATEX_BOX)
        if max(opened, closed, latex) > 1:
            return Reward(0.0, None, "several boxes")
        if opened != closed or tagged.find(BOX) > tagged.find(END_BOX) or (self.config.boxed and not opened + latex):
            return Reward(0.0, None, "no box")
        content = final_answer(parser.parsed().boxed[0] if opened else answer)
        return content or Reward(0.0, None, "no answer")

    def check(self, item: Reference) -> None:
        """Raise `DataError` for a reference that the rule cannot compare with."""
        RULES[self.config.kind]("?", item, self.config)

    def reference_text(self, item: Reference) -> str:
        """Return the reference as a model would answer it."""
        return f"<think></think><answer>{BOX}{reference_answer(self.config.kind, item)}{END_BOX}</answer>"

    @property
    def is_asked_further(self) -> bool:
        """Whether an answer that the rule does not find right is compared further, in another process."""
        return self.config.is_symbolic or self.config.judge is not None


def make_verifiers(
    configs: Mapping[str, VerifierConfig], thinking: ThinkingFormat = THINKING["tagged"]
) -> dict[str, Verifier]:
    """Return domain -> verifier, as a job says."""
    return {domain: Verifier(config, thinking) for domain, config in configs.items()}


def is_loop(text: str) -> bool:
    """Return whether some 50 characters stand in a text 10 times, not overlapping.

    >>> is_loop("I look at it once more, and once more it is a dog. " * 10), is_loop("=" * 120)
    (True, False)
    """
    if len(text) < _WINDOW * _TIMES:
        return False
    hashes = _window_hashes(text)
    found, counts = np.unique(hashes, return_counts=True)
    often = found[counts >= _TIMES]
    if not len(often):
        return False
    ends: dict[str, int] = {}
    times: collections.Counter[str] = collections.Counter()
    for start in np.flatnonzero(np.isin(hashes, often)).tolist():
        window = text[start : start + _WINDOW]
        if start >= ends.get(window, 0):
            ends[window] = start + _WINDOW
            times[window] += 1
            if times[window] == _TIMES:
                return True
    return False


def _window_hashes(text: str) -> np.ndarray:
    """Return the polynomial hash of each window of a text; equal windows have equal ones."""
    power = np.array([0x9E3779B97F4A7C15], np.uint64)  # of a window of `width`; an array overflows without a warning
    hashes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    total, covered, width = np.zeros_like(hashes), 0, 1
    while covered < _WINDOW:
        if _WINDOW & width:
            size = min(len(total), len(hashes) - covered)
            total = total[:size] * power + hashes[covered : covered + size]
            covered += width
        hashes = hashes[:-width] * power + hashes[width:]
        width, power = 2 * width, power * power
    return total


def is_mixed(text: str) -> bool:
    """Return whether a paragraph of a text is Chinese and another one English, both long.

    Chinese: at least 50 such characters, more than 80 % of it; English: at least 200 words, more than 70 % of it;
    whitespace does not count.
    """
    paragraphs = ["".join(paragraph.split()) for paragraph in text.splitlines()]
    if not any(_share(_CHINESE, paragraph, 50) > 0.8 for paragraph in paragraphs if len(paragraph) >= 50):
        return False
    return any(_share(_WORD, paragraph, 200) > 0.7 for paragraph in text.splitlines() if len(paragraph) >= 400)


def _share(pattern: re.Pattern[str], text: str, least: int) -> float:
    """Return the fraction of a text's characters in matches, whitespace left out; 0 for fewer than `least` matches."""
    matches: Iterable[str] = pattern.findall(text)
    lengths = [len(match) for match in matches]
    return sum(lengths) / len("".join(text.split())) if len(lengths) >= least else 0.0
