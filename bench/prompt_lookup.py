"""Tokens a second with prompt lookup and without, where the answer copies its prompt.

    python -m bench.prompt_lookup

The model's size and arithmetic are real, its weights random, but for those that make it generate a given token after
each token, whatever came before: so what it answers is known, and how much of it a prompt holds can be chosen. Greedy,
one request at a time, both ways in turns, without prefill. The tokens must be equal. Writes
`bench/results/prompt_lookup.json`; exits with status 1 if a target is missed.
"""

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from bench import models, report, turns
from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.generate.device_steps import Variant
from glm4v_jax.generate.prefill_chunks import Start
from glm4v_jax.generate.slots import Slots
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.model.runtime import Runtime

PROMPT_TOKENS, NEW_TOKENS, DRAFT, ROUNDS = 400, 192, 7, 3
WRONG = {"copy": 0.0, "copy of a text with every 10th token changed": 0.1, "nothing to copy": 1.0}
"""Case -> the fraction of the prompt that is not what the model answers."""
AIMS = {"copy": 1.5, "nothing to copy": 0.9}


def make_case(successors: np.ndarray, wrong: float, rng: np.random.Generator) -> list[int]:
    """A prompt: a text that the model would write, but for a fraction of its tokens; then the text's first again."""
    text = [int(rng.integers(len(successors)))]
    while len(text) < PROMPT_TOKENS - 1:
        text.append(int(successors[text[-1]]))
    changed = [1 + i for i in range(len(text) - 1) if int((i + 1) * wrong) > int(i * wrong)]
    others = rng.integers(0, len(successors), len(changed)).tolist()
    prompt = np.array([*text, text[0]])
    prompt[changed] = others
    return prompt.tolist()


def generate(runtime: Runtime, prompt: list[int], draft: int | None, new_tokens: int) -> tuple[list[int], float, float]:
    """The tokens, seconds from the first to the last, and tokens a decode step."""
    slots = Slots(runtime, variant=Variant(draft=draft))
    config = GenerationConfig(eos_token_id=())
    first = np.asarray(slots.start({0: Start(Prompt.of_text(prompt), config, new_tokens)}).tokens)
    tokens, begun = first.tolist(), time.perf_counter()
    while len(tokens) < new_tokens:
        chosen, counts, _ = slots.read(slots.decode())
        tokens += chosen.tokens[0, : counts[0]].tolist()
    return tokens, time.perf_counter() - begun, slots.stats.busy_steps / slots.stats.slot_steps


def compare(
    runtime: Runtime, successors: np.ndarray, *, new_tokens: int = NEW_TOKENS, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Every case both ways, in turns; the first round is not counted, which compiles."""
    lines = []
    for case, wrong in WRONG.items():
        prompt = make_case(successors, wrong, np.random.default_rng(0))
        sides: dict[int | None, list[tuple[list[int], float, float]]] = {None: [], DRAFT: []}
        for _ in range(rounds + 1):
            for draft, runs in sides.items():
                runs.append(generate(runtime, prompt, draft, new_tokens))
        answers = [tokens for runs in sides.values() for tokens, *_ in runs]
        seconds = {draft: [seconds for _, seconds, _ in runs[1:]] for draft, runs in sides.items()}
        ratios = [plain / looked_up for plain, looked_up in zip(*seconds.values(), strict=True)]
        judged = turns.judge(ratios, AIMS.get(case))
        speeds = {draft: (new_tokens - 1) / statistics.median(found) for draft, found in seconds.items()}
        equal = all(answer == answers[0] for answer in answers)
        lines.append(
            {
                "case": case,
                "new_tokens": new_tokens,
                "copied_tokens": sum(token in prompt for token in answers[0]),
                "tokens_equal": equal,
                "plain_tokens_per_second": speeds[None],
                "tokens_per_second": speeds[DRAFT],
                "tokens_per_step": sides[DRAFT][0][2],
                **judged,
                "passed": equal and judged["passed"],
            }
        )
    return lines


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """Every case."""
    rows = [
        (
            line["case"], line["copied_tokens"], f"{line['plain_tokens_per_second']:.1f}",
            f"{line['tokens_per_second']:.1f}", f"{line['tokens_per_step']:.2f}",
            "yes" if line["tokens_equal"] else "NO", *report.judged(line),
        )
        for line in figures["lines"]
    ]  # fmt: skip
    title = f"{NEW_TOKENS} new tokens after {PROMPT_TOKENS}, drafts of {figures['draft']}, one request at a time"
    columns = ("answer", "copied", "plain tokens/s", "tokens/s", "tokens a step", "equal", "ratio", "target", "")
    return [report.Table(title, columns, rows)]


def main() -> int:
    """Measure, print, write; 1 if a target is missed."""
    report.parser("bench.prompt_lookup", __doc__).parse_args()
    size = models.INFERENCE["text_config"]["vocab_size"]
    # One cycle through the whole vocabulary: an answer never repeats itself.
    order = np.random.default_rng(0).permutation(size)
    successors = np.empty_like(order)
    successors[order] = np.roll(order, -1)
    with tempfile.TemporaryDirectory(prefix="glm4v_jax_lookup_") as name:
        path = models.write_checkpoint(pathlib.Path(name), models.INFERENCE, successors=successors)
        lines = compare(load_runtime(path), successors)
    figures = {
        "machine": report.machine_facts("jax", "numpy"),
        "parameters": models.num_parameters(models.INFERENCE),
        "draft": DRAFT,
        "lines": lines,
        "passed": all(line["passed"] for line in lines),
    }
    return report.finish("prompt_lookup", figures, *tables(figures))


if __name__ == "__main__":
    sys.exit(main())
