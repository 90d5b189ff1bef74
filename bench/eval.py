"""Evaluation items a second here and through transformers 4.57.1's `generate`, side by side, on a CPU.

    python -m bench.eval [--rounds N] [--model DIR]

The same questions about pictures of digits, from messages to text, greedily: here through the engine's slots, where one
answer ends the next begins; there in batches of as many, padded on the left, each of which waits for its longest. Each
side is a process of its own with all cores, and they take turns; ratios are taken within a round. The model is the
package's tiny one, so much of what is measured is overhead: of a larger one `bench.cpu_vs_torch` tells the speed.

Prints a table; writes `bench/results/eval.json`; exits with status 1 if the answers differ or the aim is missed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from bench import report, turns
from bench.cpu_vs_torch import spread
from glm4v_jax.tiny import TINY_CHECKPOINT

TASKS = ("digits-vqa", "digits-grounding")
COUNT, BATCH, NEW_TOKENS = 96, 8, 48
AIM = 2.0

Workers = Mapping[str, Callable[..., Any]]


def said(text: str) -> str:
    """What counts of a text: up to the token that ends it, which one side shows and the other does not."""
    return text.split("</answer>")[0].strip()


def compare(workers: Workers, rounds: int, count: int = COUNT) -> list[dict[str, Any]]:
    """The figures of every task, after one round for warming up."""
    lines = []
    for task in TASKS:
        times: list[dict[str, float]] = []
        texts: dict[str, list[str]] = {}
        for number in range(rounds + 1):
            found = {
                side: worker("answer", of=task, count=count, new_tokens=NEW_TOKENS) for side, worker in workers.items()
            }
            texts = {side: [said(text) for text in one["texts"]] for side, one in found.items()}
            if number:
                times.append({side: one["seconds"] for side, one in found.items()})
        same = sum(a == b for a, b in zip(texts["ours"], texts["theirs"], strict=True))
        ratio = spread([one["theirs"] / one["ours"] for one in times])
        lines.append({
            "task": task,
            "items": count,
            "same_answers": same,
            **{side: spread([count / one[side] for one in times]) for side in workers},
            "ratio": ratio,
            "aim": AIM,
            "passed": same == count and ratio["median"] >= AIM,
        })  # fmt: skip
    return lines


def rows(lines: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lines of the table."""
    return [
        (
            line["task"], f"{line['ours']['median']:.1f}", f"{line['theirs']['median']:.1f}",
            "{median:.2f} [{min:.2f}, {max:.2f}]".format(**line["ratio"]), f"{line['aim']:.1f}",
            f"{line['same_answers']} of {line['items']}", report.verdict(line["passed"]),
        )
        for line in lines
    ]  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.eval")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=str(TINY_CHECKPOINT))
    arguments = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    threads = os.cpu_count() or 1
    with (
        turns.Worker("ours", sys.executable, "bench.eval_ours", threads) as ours,
        turns.Worker("theirs", sys.executable, "bench.eval_theirs", threads) as theirs,
    ):
        workers = {"ours": ours, "theirs": theirs}
        for worker in workers.values():
            worker("load", directory=arguments.model, batch=BATCH)
        lines = compare(workers, arguments.rounds)
        facts = {side: worker("facts") for side, worker in workers.items()}
    title = f"items/s, {COUNT} items, {BATCH} at a time, greedy, float32, {threads} cores"
    columns = ("", "ours", "transformers", "ratio", "aim", "same answers", "")
    report.console().print(report.table(title, columns, rows(lines)))
    figures = {
        "machine": facts, "rounds": arguments.rounds, "batch": BATCH, "load_before": load, "lines": lines,
        "passed": all(line["passed"] for line in lines),
    }  # fmt: skip
    path = report.write_result("eval", figures)
    print(path)
    sys.exit(0 if figures["passed"] else 1)


if __name__ == "__main__":
    main()
