"""What rows with a grammar cost the other rows of a batch.

    python -m bench.grammar

Eight rows of a model of real proportions with random weights, greedy: the tokens per second of rows without a grammar
beside others with one, against those of a batch without any; and the tokens per second of the rows with one. Writes
`bench/results/grammar.json`; exits with status 1 if a target is missed.
"""

import contextlib
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from bench import models, report, turns
from glm4v_jax.generate.engine import Engine
from glm4v_jax.generate.prompt_queue import PromptQueue
from glm4v_jax.generate.scheduler import Update, run
from glm4v_jax.generate.sequence import SequenceState

ROWS, NEW_TOKENS, ROUNDS = 8, 65, 3
WITH_GRAMMAR = (0, 1, 4, 7)
"""Rows with a grammar, of each case."""
AIMS = {1: 0.9}
GRAMMAR = {"regex": "([a-z]+ )+"}
"""Never complete, and with something to choose at every token."""


def rates(engine: Engine, constrained: int, new_tokens: int) -> tuple[float, float]:
    """Tokens per second of a row without a grammar, and of one of `constrained` with; 0 where there is none."""
    options: dict[str, Any] = dict(do_sample=False, eos_token_id=-1)
    free, bound = engine.config(max_new_tokens=new_tokens, **options), engine.config(max_new_tokens=1000, **options)
    configs = [bound.replace(**GRAMMAR)] * constrained + [free] * (ROWS - constrained)

    def prepare(index: int, text: str) -> SequenceState:
        return engine.new_sequence(engine.prompt(text), configs[index], index=index)

    counts, begun, seconds, running = [0] * ROWS, 0.0, 0.0, ROWS - constrained
    queue = PromptQueue([f"Question {row}" for row in range(ROWS)], prepare, ahead=ROWS)
    with (
        contextlib.closing(queue),
        engine.lend_slots(ROWS, free) as slots,
        contextlib.closing(run(slots, queue)) as updates,
    ):
        for update in updates:
            assert isinstance(update, Update)
            if begun:
                counts[update.sequence.index] += len(update.delta.tokens)
                seconds = time.perf_counter() - begun
            elif update.sequence.index == ROWS - 1:  # the last row's first tokens: all have begun
                begun = time.perf_counter()
            running -= update.delta.completion is not None
            if not running:
                break
    of_free, of_bound = sum(counts[constrained:]), sum(counts[:constrained])
    return of_free / (ROWS - constrained) / seconds, of_bound / max(constrained, 1) / seconds


def compare(engine: Engine, *, new_tokens: int = NEW_TOKENS, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Every case in turns; the first round is not counted, which compiles."""
    runs: dict[int, list[tuple[float, float]]] = {constrained: [] for constrained in WITH_GRAMMAR}
    for _ in range(rounds + 1):
        for constrained, found in runs.items():
            found.append(rates(engine, constrained, new_tokens))
    alone = [free for free, _ in runs[0][1:]]
    lines = []
    for constrained, found in runs.items():
        free, bound = (statistics.median(values) for values in zip(*found[1:], strict=True))
        ratios = [free / before for (free, _), before in zip(found[1:], alone, strict=True)]
        speeds = {"tokens_per_second": free, "tokens_per_second_with_grammar": bound}
        rows = {"with_grammar": constrained, "without": ROWS - constrained}
        lines.append(rows | speeds | turns.judge(ratios, AIMS.get(constrained)))
    return lines


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """Every case."""
    rows = [
        (
            line["with_grammar"], line["without"], f"{line['tokens_per_second']:.1f}",
            f"{line['tokens_per_second_with_grammar']:.1f}", *report.judged(line),
        )
        for line in figures["lines"]
    ]  # fmt: skip
    columns = ("with a grammar", "without", "tokens/s without", "tokens/s with", "beside 8 without", "target", "")
    return [report.Table(f"tokens per second of a row, of {figures['rows']} rows", columns, rows)]


def main() -> int:
    """Measure, print, write; 1 if a target is missed."""
    report.parser("bench.grammar", __doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="glm4v_jax_grammar_") as name:
        path = models.write_checkpoint(pathlib.Path(name), models.INFERENCE, processor=True)
        engine = Engine.from_pretrained(path, num_slots=ROWS)
        engine.reserve(2 * NEW_TOKENS)
        lines = compare(engine)
    figures = {
        "machine": report.machine_facts("jax", "numpy"),
        "parameters": models.num_parameters(models.INFERENCE),
        "rows": ROWS,
        "lines": lines,
        "passed": all(line["passed"] for line in lines),
    }
    return report.finish("grammar", figures, *tables(figures))


if __name__ == "__main__":
    sys.exit(main())
