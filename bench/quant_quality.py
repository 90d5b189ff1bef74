"""What quantised weights cost in quality: the packaged tiny model in int8 and int4 beside itself in float32.

    python -m bench.quant_quality [--prompts N] [--items N]

Two measurements on held-out digits, everything quantised as `--quantize` does. With the right answers given, the
distributions of their tokens are compared with those of float32: Kullback-Leibler divergence, and how often the most
likely token is the same. And the model's own answers are scored as `glm4v eval` scores them.

Prints tables; writes `bench/results/quant_quality.json`; exits with status 1 if an aim is missed.
"""

import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import report
from eval.metrics import METRICS
from eval.read_items import read_items
from eval.results import score_items
from eval.summary import summarize
from eval.tasks import TASKS
from glm4v_jax import Engine, Glm4vForConditionalGeneration, Glm4vProcessor
from glm4v_jax.generate.completion import completion_fields
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import Linear
from glm4v_jax.model.params import linears, sizes
from glm4v_jax.tiny import TINY_CHECKPOINT
from glm4v_jax.tiny.digits import TASKS as KINDS
from glm4v_jax.tiny.digits import Example, held_out

SCHEMES = ("int8", "int4")
AGREEMENT = {"int8": 0.99, "int4": 0.95}
"""How often the most likely token is to be that of float32."""
MOST_KL = {"int8": 5e-4}
EVALUATED = ("digits-vqa", "digits-grounding", "digits-motion")
PROMPTS, ITEMS = 240, 120
_BATCH, _SLOTS, _NEW_TOKENS = 24, 16, 48


def load(scheme: str | None, **options: Any) -> Glm4vForConditionalGeneration:
    """The packaged model, quantised as `--quantize` does."""
    options = {"dtype": "float32", "quantize": scheme} | options
    return Glm4vForConditionalGeneration.from_pretrained(TINY_CHECKPOINT, **options)


def forced(processor: Glm4vProcessor, examples: Sequence[Example]) -> tuple[dict[str, Any], np.ndarray]:
    """Inputs of prompts with their right answers, and the positions whose next token is one of an answer, bool [B, T].

    The chat template is not asked for the answers: it removes the thoughts of earlier turns.
    """
    inputs = dict(
        processor.apply_chat_template(
            [example.prompt for example in examples], add_generation_prompt=True, tokenize=True, return_dict=True,
            padding=True, return_tensors="np",
        )
    )  # fmt: skip
    prompts = [ids[mask > 0] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    tokenizer = processor.tokenizer
    answers = [tokenizer(example.messages[1]["content"][0]["text"])["input_ids"] for example in examples]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = np.full((len(examples), length), tokenizer.pad_token_id)
    mask, is_counted = np.zeros_like(ids), np.zeros(ids.shape, bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end], mask[row, :end] = [*prompt, *answer], 1
        is_counted[row, len(prompt) - 1 : end - 1] = True
    pixels = {name: value for name, value in inputs.items() if name.startswith(("pixel_values", "image_", "video_"))}
    return {"input_ids": ids, "attention_mask": mask, **pixels}, is_counted


def log_probabilities(
    model: Glm4vForConditionalGeneration, batches: Sequence[tuple[dict[str, Any], np.ndarray]]
) -> np.ndarray:
    """float32 [N, V] of the N tokens of all answers."""
    found = []
    for inputs, is_counted in batches:
        logits = np.asarray(model(**inputs).logits)[is_counted]
        found.append(np.asarray(jax.nn.log_softmax(logits)))
    return np.concatenate(found)


def compare(exact: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How distributions [N, V] differ from exact ones, both as logarithms."""
    divergence = np.sum(np.exp(exact, dtype=np.float64) * (exact - other), axis=1)
    same = exact.argmax(axis=1) == other.argmax(axis=1)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "agreement": float(same.mean()),
        "tokens": len(exact),
    }


def batches_of(processor: Glm4vProcessor, prompts: int) -> list[tuple[dict[str, Any], np.ndarray]]:
    """The first prompts of every kind of digits, in batches that have all of them."""
    each = zip(*(held_out(kind)[: -(-prompts // len(KINDS))] for kind in KINDS), strict=True)
    examples = list(itertools.chain.from_iterable(each))[:prompts]
    return [forced(processor, examples[first : first + _BATCH]) for first in range(0, len(examples), _BATCH)]


def weight_error(exact: Glm4v, other: Glm4v) -> float:
    """Relative error of the decoder's kernels, as they are multiplied: root of squares' sums."""
    difference = total = 0.0
    quantized = linears(other)
    for path, found in linears(exact).items():
        if not path.startswith("language_model."):
            continue
        for linear, same in zip(found, quantized[path], strict=True):
            inputs, _ = sizes(linear)
            x = jnp.eye(math.prod(inputs)).reshape(1, -1, *inputs)
            kernel, rounded = (np.asarray(_apply(one, x), np.float64) for one in (linear, same))
            difference += float(np.square(kernel - rounded).sum())
            total += float(np.square(kernel).sum())
    return math.sqrt(difference / total)


@jax.jit
def _apply(linear: Linear, x: jax.Array) -> jax.Array:
    return linear(x)


def evaluate(model: Glm4vForConditionalGeneration, processor: Glm4vProcessor, task: str, count: int) -> dict[str, Any]:
    """The score of a task, with its interval, as `glm4v eval` computes them."""
    items, metric = read_items(TASKS[task], limit=count), METRICS[TASKS[task].metric]
    engine = Engine(model, processor, num_slots=_SLOTS)
    prompts = [item.messages for item in items]
    completions = engine.generate_many(prompts, do_sample=False, max_new_tokens=_NEW_TOKENS)
    answers = {items[done.index].id: completion_fields(done, processor.tokenizer) for done in completions}
    summary = summarize(items, score_items(items, answers, metric), metric)
    return {"score": summary["score"], "interval": summary["interval"], "count": summary["count"]}


def measure(prompts: int, items: int) -> list[dict[str, Any]]:
    """The figures of float32 and of every scheme."""
    processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    batches = batches_of(processor, prompts)
    exact = load(None)
    expected = log_probabilities(exact, batches)
    scores = {task: evaluate(exact, processor, task, items) for task in EVALUATED}
    lines: list[dict[str, Any]] = [{"scheme": "float32", "tasks": scores}]
    for scheme in SCHEMES:
        model = load(scheme)
        figures = compare(expected, log_probabilities(model, batches))
        with model.runtime.on_mesh():
            figures["weight_error"] = weight_error(exact.module, model.module)
        found = {task: evaluate(model, processor, task, items) for task in EVALUATED}
        within = [low <= found[task]["score"] <= high for task, (low, high) in _intervals(scores).items()]
        passed = is_good(scheme, figures) and (scheme != "int8" or all(within))
        lines.append({"scheme": scheme, **figures, "tasks": found, "passed": passed})
    return lines


def is_good(scheme: str, figures: dict[str, float]) -> bool:
    """Whether the tokens' distributions are as near to those of float32 as aimed at."""
    return figures["agreement"] >= AGREEMENT[scheme] and figures["kl_mean"] <= MOST_KL.get(scheme, math.inf)


def _intervals(scores: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    return {task: tuple(score["interval"]) for task, score in scores.items()}


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """Of the tokens, and of the tasks."""
    lines = figures["lines"]
    tokens = [
        (line["scheme"], f"{line['weight_error']:.2%}", f"{line['kl_mean']:.1e}", f"{line['kl_p99']:.1e}",
         f"{line['agreement']:.2%}", report.verdict(line["passed"]))
        for line in lines[1:]
    ]  # fmt: skip
    scores = [
        (line["scheme"], *("{score:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]".format_map(line["tasks"][task])
                           for task in EVALUATED))
        for line in lines
    ]  # fmt: skip
    return [
        report.Table(
            f"{lines[1]['tokens']} tokens of right answers, beside float32",
            ("", "weight error", "KL mean", "KL p99", "top-1 agreement", ""), tokens,
        ),
        report.Table(f"score of {lines[0]['tasks'][EVALUATED[0]]['count']} items", ("", *EVALUATED), scores),
    ]  # fmt: skip


def main() -> int:
    """Measure, print, write; 1 if an aim is missed."""
    parser = report.parser("bench.quant_quality", __doc__)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="with answers given, of all tasks together")
    parser.add_argument("--items", type=int, default=ITEMS, help="to answer, of each task")
    arguments = parser.parse_args()
    start = time.perf_counter()
    lines = measure(arguments.prompts, arguments.items)
    figures = {
        "machine": report.machine_facts("jax", "jaxlib"),
        "seconds": time.perf_counter() - start,
        "prompts": arguments.prompts,
        "lines": lines,
        "passed": all(line["passed"] for line in lines[1:]),
    }
    return report.finish("quant_quality", figures, *tables(figures))


if __name__ == "__main__":
    sys.exit(main())
