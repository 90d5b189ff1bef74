"""A task's items through the engine: answers into a file that a later run goes on with, then scores and summary."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.items import Item
from eval.metrics import METRICS
from eval.results import Result, read_answers, score_items, write_results
from eval.summary import summarize, write_summary
from eval.tasks import Task
from glm4v_jax.commands.batch import Batch
from glm4v_jax.commands.rows import Row

if TYPE_CHECKING:
    from glm4v_jax.commands.options import ModelOptions
    from glm4v_jax.generate.config import GenerationConfig
    from glm4v_jax.inputs.processor import Glm4vProcessor

ANSWERS, RESULTS, SUMMARY, REPORT = "answers.jsonl", "results.jsonl", "summary.json", "report.html"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of a task: the results in the items' order, and the summary."""

    results: list[Result]
    summary: dict[str, Any]


def answer(
    items: Sequence[Item],
    out: Path,
    config: "GenerationConfig",
    options: "ModelOptions",
    processor: "Glm4vProcessor",
    *,
    num_slots: int,
    restart: bool = False,
) -> None:
    """Answer what is not answered yet, longest prompts not sorted: each answer is written as it is completed.

    Args:
      items: of a task.
      out: directory of the run.
      config: how to answer; the seed of an item's draws is made of its id and the config's.
      options: which model, and where.
      processor: of the model.
      num_slots: how many items are answered at a time.
      restart: begin anew.

    Raises:
      Glm4vError, OSError: see `Batch.run`. What is wrong with an item is in its line.
    """
    rows = [Row(item.id, item.messages, item.asked, place=item.place) for item in items]
    Batch(rows, str(out / ANSWERS), config, options, num_slots, field="id", things="items").run(
        processor, restart=restart
    )


def score(items: Sequence[Item], task: Task, out: Path, about: Mapping[str, Any], seed: int = 0) -> Outcome:
    """Score the answers of a run, and write results and summary beside them; needs no model.

    Args:
      items: of the task.
      task: for its metric.
      out: directory of the run.
      about: what the summary says of the run besides: model, options.
      seed: of the bootstrap.

    Raises:
      DataError: answers are missing.
    """
    metric = METRICS[task.metric]
    results = score_items(items, read_answers(out / ANSWERS), metric)
    figures = summarize(items, results, metric, seed)
    summary = {
        "score": figures.pop("score"),
        "task": task.name,
        "metric": task.metric,
        **figures,
        "items": digest_of(items),
        **about,
        "versions": {name: _version(name) for name in ("glm4v_jax", "jax")},
    }
    write_results(results, out / RESULTS)
    write_summary(summary, out / SUMMARY)
    return Outcome(results, summary)


def digest_of(items: Sequence[Item]) -> str:
    """Of what is asked and expected, in short: equal for the same questions in the same order."""
    text = json.dumps([(item.id, item.asked, item.reference) for item in items], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"
