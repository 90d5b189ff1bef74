"""Evaluation items a second here and through transformers 4.57.1's `generate`, side by side, on a CPU.

    python -m bench.eval [--rounds N] [--model DIR]

The same questions about images of digits, from messages to text, greedily: here through the engine's slots, where one
answer ends the next begins; there in batches of as many, padded on the left, each of which waits for its longest. Each
side is a process of its own with all cores, and they take turns; ratios are taken within a round. The model is the
package's tiny one, so much of what is measured is overhead; `bench.cpu_vs_torch` measures the speed of a larger one.

Prints a table; writes `bench/results/eval.json`; exits with status 1 if the answers differ or the aim is missed.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

from bench import reference, report, turns
from eval.data.items import Item
from eval.read_items import read_items
from eval.tasks import TASKS as ALL_TASKS
from glm4v_jax.tiny import TINY_CHECKPOINT

TASKS = ("digits-vqa", "digits-grounding")
COUNT, BATCH, NEW_TOKENS = 96, 8, 48
AIM = 2.0


def items_of(task: str, count: int) -> list[Item]:
    """The first items of a task whose data come with the package."""
    return read_items(ALL_TASKS[task], limit=count)


class Ours(turns.JaxSide):
    """The engine's slots."""

    packages = (*turns.JaxSide.packages, "pillow")

    def load(self, directory: str, batch: int) -> None:
        """Load the checkpoint, as `glm4v eval` does."""
        from glm4v_jax import Engine

        self._engine = Engine.from_pretrained(directory, num_slots=batch)

    def answer(self, of: str, count: int, new_tokens: int) -> dict[str, Any]:
        """The answers to a task's items, and the seconds from its messages to the last of them."""
        prompts = [item.messages for item in items_of(of, count)]
        self._engine.release()  # features of images that it has encoded before
        start = time.perf_counter()
        found = list(self._engine.generate_many(prompts, do_sample=False, max_new_tokens=new_tokens))
        seconds = time.perf_counter() - start
        ordered = sorted(found, key=lambda completion: completion.index)
        tokens = sum(len(completion.tokens) for completion in ordered)
        return {"seconds": seconds, "texts": [completion.text for completion in ordered], "tokens": tokens}


class Theirs(turns.TorchSide):
    """The reference's processor and `generate`, in batches of items as they come, with fused attention."""

    packages = (*turns.TorchSide.packages, "pillow")

    def load(self, directory: str, batch: int) -> None:
        """Load the checkpoint, for inference only."""
        import torch

        transformers = reference.import_transformers()
        self._batch = batch
        self._processor = transformers.AutoProcessor.from_pretrained(directory)
        self._processor.tokenizer.padding_side = "left"
        self._model = transformers.Glm4vForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def answer(self, of: str, count: int, new_tokens: int) -> dict[str, Any]:
        """The answers to a task's items, and the seconds from its messages to the last of them."""
        import torch

        messages = [item.messages for item in items_of(of, count)]
        texts: list[str] = []
        tokens = 0
        start = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, count, self._batch):
                inputs = self._processor.apply_chat_template(
                    messages[first : first + self._batch], add_generation_prompt=True, tokenize=True, padding=True,
                    return_dict=True, return_tensors="pt",
                )  # fmt: skip
                inputs.pop("token_type_ids", None)
                found = self._model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
                new = found[:, inputs["input_ids"].shape[1] :]
                tokens += new.numel()
                texts += self._processor.batch_decode(new, skip_special_tokens=False)
        return {"seconds": time.perf_counter() - start, "texts": texts, "tokens": tokens}


def answer_of(text: str) -> str:
    """What counts of a text: up to the token that ends it, which one side shows and the other does not."""
    return text.split("</answer>")[0].strip()


def compare(workers: turns.Workers, rounds: int, count: int = COUNT) -> list[dict[str, Any]]:
    """The figures of every task."""
    lines = []
    for task in TASKS:
        work = turns.TimedTask("answer", dict(of=task, count=count, new_tokens=NEW_TOKENS))
        (results,) = turns.measure(workers, [dict.fromkeys(workers, work)], rounds)
        pairs = zip(*(map(answer_of, results[-1][side]["texts"]) for side in ("ours", "theirs")), strict=True)
        same = sum(ours == theirs for ours, theirs in pairs)
        ours, theirs = ([one[side]["seconds"] for one in results] for side in ("ours", "theirs"))
        figures = turns.compare(ours, theirs, amount=count, aim=AIM)
        passed = same == count and figures["passed"]
        lines.append({"task": task, "items": count, "same_answers": same, **figures, "passed": passed})
    return lines


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """The comparisons."""
    rows = []
    for line in figures["lines"]:
        ratio, aim, verdict = report.judged(line)
        speeds = [f"{line[side]['median']:.1f}" for side in ("ours", "theirs")]
        rows.append((line["task"], *speeds, ratio, aim, f"{line['same_answers']} of {line['items']}", verdict))
    cores = figures["machine"]["ours"]["cores"]
    title = f"items/s, {COUNT} items, {figures['batch']} at a time, greedy, float32, {cores} cores"
    return [report.Table(title, ("", "this package", "transformers", "ratio", "aim", "same answers", ""), rows)]


def main() -> int:
    """Measure, print, write; 1 if answers differ or the aim is missed."""
    parser = report.parser("bench.eval", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side, in turns")
    parser.add_argument("--model", default=str(TINY_CHECKPOINT), help="checkpoint that answers")
    arguments = turns.parse(parser, Ours, Theirs)
    load = turns.load_average()
    with turns.start(turns.sides("bench.eval", arguments.threads)) as workers:
        for worker in workers.values():
            worker("load", directory=arguments.model, batch=BATCH)
        lines = compare(workers, arguments.rounds)
        facts = turns.facts(workers)
    figures = {
        "machine": facts, "rounds": arguments.rounds, "batch": BATCH, "load_before": load, "lines": lines,
        "passed": all(line["passed"] for line in lines),
    }  # fmt: skip
    return report.finish("eval", figures, *tables(figures))


if __name__ == "__main__":
    sys.exit(main())
