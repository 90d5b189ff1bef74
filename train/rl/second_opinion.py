"""What may take long, or never end, run by `judging.py` in a process of its own: math-verify, and a user's judge.

    python -m train.rl.second_opinion CONFIG

CONFIG is a `VerifierConfig` in JSON. The process writes "ready", then for every line `[answer, reference]` on its
standard input a line: the score, or the error as a text. The operating system ends it where an answer takes more CPU
time than `seconds`, whatever it is at, and where it takes more than 4 GiB of memory; its parent kills it by the clock.
"""

import contextlib
import importlib
import json
import signal
import sys
from collections.abc import Callable
from typing import Any

from eval.metrics import Reference
from eval.metrics.metric import answers_of
from train.rl.config import VerifierConfig

_MEMORY = 4 << 30


def math_verified(answer: str, item: Reference) -> float:
    """Return 1 where math-verify finds an answer equal to a right one; both are read as LaTeX, never as Python."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list[Any]:
        text = text.strip().strip("$")
        options = {"extraction_config": [LatexExtractionConfig()], "fallback_mode": "no_fallback"}
        return parse(f"${text}$", **options, parsing_timeout=None)[:1]

    found = read(answer)
    return float(any(bool(found) and verify(read(one), found, timeout_seconds=None) for one in answers_of(item)))


def opinions(config: VerifierConfig) -> list[Callable[[str, Reference], float]]:
    """Return the functions that a verifier asks, one after the other, until one finds an answer right.

    Raises:
      ImportError, AttributeError: math-verify is not installed; or there is no such judge.
    """
    found: list[Callable[[str, Reference], float]] = []
    if config.is_symbolic:
        importlib.import_module("math_verify")
        found.append(math_verified)
    if config.judge is not None:
        module, _, name = config.judge.partition(":")
        found.append(getattr(importlib.import_module(module), name))
    return found


def score(asked: list[Callable[[str, Reference], float]], answer: str, item: Reference) -> float | str:
    """Return the best score, or an error as a text."""
    best = 0.0
    for one in asked:
        try:
            value = one(answer, item)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:500]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            return f"found {value!r:.100}; expected a number from 0 to 1"
        best = max(best, float(value))
        if best == 1:
            break
    return best


def main(config: VerifierConfig) -> None:
    """Answer the lines of standard input, until it ends."""
    import logging

    logging.disable(logging.WARNING)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # judges may print
        asked = opinions(config)
        try:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        except (ImportError, OSError, ValueError):  # not on every system
            pass
        print("ready", file=out, flush=True)
        for line in sys.stdin:
            answer, item = json.loads(line)
            _limit_cpu(config.limit)
            found = score(asked, answer, item)
            _limit_cpu(0)
            print(json.dumps(found), file=out, flush=True)


def _limit_cpu(seconds: float) -> None:
    """Have the system end this process after this much CPU time: a Python handler would wait for C code to return."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main(VerifierConfig(**json.loads(sys.argv[1])))
