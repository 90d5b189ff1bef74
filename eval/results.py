"""What became of every item: its answer, what was understood of it, and its score; a line of JSON each."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from eval.items import Item
from eval.metrics import Metric, Score
from glm4v_jax.commands.console import replacing
from glm4v_jax.errors import DataError
from glm4v_jax.generate.thinking import parse

Category = Literal["scored", "parse_failure", "no_answer", "truncated", "error"]
"""Why an item has the score it has. "scored": something was understood. The others score 0 unless the metric says
otherwise: "no_answer", there is nothing behind the thought; "truncated", the tokens were used up before anything was
understood; "parse_failure", what is there is no answer of the kind asked for; "error", the prompt could not be made."""


@dataclasses.dataclass(frozen=True)
class Result:
    """An item with its answer.

    Attributes:
      id, question, group: of the item.
      reference: what it was compared with.
      output: the whole text of the model; empty where there is an error.
      parsed: what the metric understood of it; None where it understood nothing.
      score: from 0 to 1.
      parts: further numbers of the metric.
      category: see there.
      is_truncated: whether the tokens were used up, whatever was understood.
      prompt_tokens, new_tokens: how many there are.
      error: what was wrong with the prompt.
    """

    id: str
    question: str
    group: str | None
    reference: Mapping[str, Any]
    output: str
    parsed: Any
    score: float
    parts: Mapping[str, float]
    category: Category
    is_truncated: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 0
    error: str | None = None


def score_items(items: Sequence[Item], answers: Mapping[str, Mapping[str, Any]], metric: Metric) -> list[Result]:
    """Score the answers that a run has written.

    Args:
      items: of the task.
      answers: id -> line of the file of answers.
      metric: of the task.

    Raises:
      DataError: an item has neither an answer nor an error.
    """
    if missing := [item.id for item in items if item.id not in answers]:
        raise DataError(f"answers: found none for {len(missing)} items, such as {missing[0]!r}; expected all")
    return [_result(item, answers[item.id], metric) for item in items]


def scores_of(items: Sequence[Item], results: Sequence[Result]) -> list[tuple[Mapping[str, Any], Score]]:
    """What a metric's `aggregate` takes."""
    return [
        (_reference(item), Score(result.score, result.parsed, result.parts))
        for item, result in zip(items, results, strict=True)
    ]


def write_results(results: Iterable[Result], path: Path) -> None:
    """Write a file of them, complete or not at all."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps(dataclasses.asdict(result), ensure_ascii=False) + "\n")


def read_results(path: Path) -> list[Result]:
    """Read them again.

    Raises:
      DataError: it is no such file.
    """
    results = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; expected the results of a run") from None
    for number, line in enumerate(lines, 1):
        try:
            results.append(Result(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}:{number}: found no result of a run ({error}); expected one a line") from error
    return results


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Id -> line of a file of answers."""
    with path.open(encoding="utf-8") as file:
        return {line["id"]: line for line in map(json.loads, file)}


def _reference(item: Item) -> Mapping[str, Any]:
    return item.reference if item.group is None else {**item.reference, "group": item.group}


def _result(item: Item, answer: Mapping[str, Any], metric: Metric) -> Result:
    if "error" in answer:
        return Result(
            item.id, item.question, item.group, item.reference, "", None, 0.0, {}, "error", error=answer["error"]
        )
    text, is_truncated = answer["text"], answer["finish_reason"] == "length"
    score = metric.score(text, _reference(item))
    category: Category = "scored"
    if score.parsed is None:
        category = "truncated" if is_truncated else "parse_failure" if parse(text).answer else "no_answer"
    return Result(
        item.id, item.question, item.group, item.reference, text, score.parsed, float(score.value), dict(score.parts),
        category, is_truncated, answer["prompt_tokens"], answer["new_tokens"],
    )  # fmt: skip
