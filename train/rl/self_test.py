"""The test that every verifier passes before a job starts: one that pays for wrong answers would ruin the training.

For the problems of its domain it must give each reference reward 1; and reward 0 to nothing, to the reference twice,
and to another problem's different answer, on at least 95 % of them. Kinds that pay for a part of an answer must pay
less than all of it for another one.
"""

from collections.abc import Sequence
from typing import NamedTuple

from eval.metrics import Reference
from glm4v_jax.errors import ConfigError, DataError
from train.rl.judging import Judges, Task
from train.rl.rules import GRADED
from train.rl.verifiers import Verifier

_RIGHT = 0.95
_TESTED = 1000
"""Problems of a domain whose wrong answers are tried; those that a judge is asked about take a while."""


class Example(NamedTuple):
    """A problem's domain, reference and place in the data."""

    domain: str
    item: Reference
    source: str


def self_test(judges: Judges, examples: Sequence[Example]) -> None:
    """Test the verifiers, by domain, on the references of a job.

    DataError if a verifier cannot read a reference, or does not find it right; ConfigError if it pays for wrong
    answers. Both name the domain and the row.
    """
    by_domain: dict[str, list[Example]] = {}
    for example in examples:
        by_domain.setdefault(example.domain, []).append(example)
    for domain, some in by_domain.items():
        verifier = judges.verifiers[domain]
        texts = [_reference_text(verifier, example) for example in some]
        rewards = judges.score([Task(domain, text, example.item) for text, example in zip(texts, some, strict=True)])
        for example, text, reward in zip(some, texts, rewards, strict=True):
            if reward.value != 1:
                raise DataError(
                    f"{example.source}: domain {domain!r}: found reward {reward.value:g} ({reward.reason}) for "
                    f"the reference, {text!r:.200}; expected 1"
                )
        _check_wrong(judges, domain, some, texts)


def _reference_text(verifier: Verifier, example: Example) -> str:
    try:
        verifier.check(example.item)
        return verifier.reference_text(example.item)
    except DataError as error:
        raise DataError(f"{example.source}: domain {example.domain!r}: {error}") from error


def _check_wrong(judges: Judges, domain: str, examples: Sequence[Example], texts: Sequence[str]) -> None:
    """Check that wrong answers to some problems are not paid for."""
    step = max(1, len(examples) // _TESTED)
    numbers = range(0, len(examples), step)
    is_graded = judges.verifiers[domain].config.kind in GRADED
    others = _others(examples, texts)
    wrong: dict[str, list[tuple[int, str]]] = {
        "an empty answer": [(number, "") for number in numbers],
        "the right answer twice": [(number, texts[number] * 2) for number in numbers],
        "the answer of another problem": [
            (number, other) for number in numbers if (other := others[number]) is not None
        ],
    }
    for name, answers in wrong.items():
        rewards = judges.score([Task(domain, text, examples[number].item) for number, text in answers])
        limit = 1.0 if is_graded and name == "the answer of another problem" else 0.0
        paid = [
            (number, text, reward)
            for (number, text), reward in zip(answers, rewards, strict=True)
            if reward.value and reward.value >= limit
        ]
        if len(paid) > (1 - _RIGHT) * len(answers):
            number, text, reward = paid[0]
            raise ConfigError(
                f"rl.verifiers.{domain}: found a reward of {reward.value:g} for {name} on {len(paid):,} of "
                f"{len(answers):,} rows, the first {examples[number].source}, {text!r:.200}; expected 0 on at "
                f"least {_RIGHT:.0%}"
            )


def _others(examples: Sequence[Example], texts: Sequence[str]) -> list[str | None]:
    """Return for each problem the right answer of the next one that has another; None where all have the same."""
    found: list[str | None] = [None] * len(texts)
    following: str | None = next((text for text in texts if text != texts[-1]), None)
    for number in range(len(texts) - 1, -1, -1):
        after = texts[(number + 1) % len(texts)]
        following = after if after != texts[number] else following
        found[number] = following
    return found
