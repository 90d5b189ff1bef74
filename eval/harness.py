"""A task's items through the engine: answers into a file that a later run goes on with, then scores and summary."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import glm4v_jax
from eval.data.items import Item
from eval.files import ANSWERS, REPORT, RESULTS, SUMMARY
from eval.metrics import METRICS
from eval.results import Result, digest_of, read_answers, score_items, write_results
from eval.summary import summarize, write_summary
from eval.tasks import Task
from glm4v_jax.generate.completion import completion_fields
from glm4v_jax.generate.offline.batch import Batch
from glm4v_jax.generate.offline.prompts import BatchPrompt

if TYPE_CHECKING:
    from glm4v_jax.config.generation import GenerationConfig
    from glm4v_jax.generate.completion import Completion
    from glm4v_jax.inputs.processor import Glm4vProcessor


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of a task: the results in the items' order, and the summary."""

    results: list[Result]
    summary: dict[str, Any]


def batch_of(
    items: Sequence[Item], out: Path, config: "GenerationConfig", model: str, dtype: str | None = None
) -> Batch:
    """The items as prompts, with the file of their answers.

    Args:
      items: of a task.
      out: directory of the run.
      config: how to answer; the seed of an item's draws is made of its id and the config's.
      model: directory of the checkpoint.
      dtype: the option for the weights.
    """
    prompts = [BatchPrompt(item.id, item.messages, item.asked, place=item.place) for item in items]
    # Answers to other items stay: a run over the first few does not undo one over all.
    return Batch(
        prompts,
        str(out / ANSWERS),
        config,
        model,
        dtype=dtype,
        name_field="id",
        answer_fields=_line,
        things="items",
        keep_others=True,
    )


def forget_scores(out: Path) -> None:
    """Remove what was made of earlier answers, before there are others."""
    for name in (RESULTS, SUMMARY, REPORT):
        (out / name).unlink(missing_ok=True)


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
        # Equal for the same questions in the same order.
        "items": digest_of([(item.id, item.asked, item.reference) for item in items]),
        **about,
        "versions": {"glm4v_jax": glm4v_jax.__version__, "jax": importlib.metadata.version("jax")},
    }
    write_results(results, out / RESULTS)
    write_summary(summary, out / SUMMARY)
    return Outcome(results, summary)


def _line(completion: "Completion", processor: "Glm4vProcessor") -> dict[str, Any]:
    return {**completion_fields(completion, processor.tokenizer), "seconds": round(completion.seconds, 3)}
