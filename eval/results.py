"""What became of every item: its answer, what was understood of it, and its score; a line of JSON each."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from eval.data.items import Item
from eval.metrics import Metric, Score
from glm4v_jax.errors import DataError
from glm4v_jax.files import replacing, to_json
from glm4v_jax.generate.text.thinking import parse

Category = Literal["scored", "parse_failure", "no_answer", "truncated", "error"]
"""Why an item has the score it has, one for each item. "scored": something was understood. The others score 0:
"no_answer", there is nothing behind the thought; "truncated", it was cut off before anything was understood;
"parse_failure", what is there is no answer of the kind asked for; "error", the prompt could not be made."""

_CUT = ("length", "repetition")
"""Why an answer that had not ended did: `glm4v_jax.generate.completion.FinishReason`."""


@dataclasses.dataclass(frozen=True)
class Result:
    """An item with its answer.

    Attributes:
      id, question, group: of the item; where its group says what its `cluster` is, it has none.
      reference: what it was compared with.
      output: the whole text of the model; empty where there is an error.
      parsed: what the metric understood of it; None where it understood nothing.
      score: from 0 to 1.
      parts: further numbers of the metric; where there is an error, those of saying nothing.
      category: see there.
      is_truncated: whether it was cut off, as the tokens were used up or as it went in circles, whatever was
        understood of it.
      is_forced: whether its thought was closed because the budget was used up.
      prompt_tokens, new_tokens: how many there are.
      error: what was wrong with the prompt.
      cluster: the same for items that an interval draws together, see `eval.metrics.metric.Cluster`; None where it is
        drawn alone.
      prompt: of what was asked, in short: equal for the same texts, with equal pictures and videos at equal places.
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
    is_forced: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 0
    error: str | None = None
    cluster: str | None = None
    prompt: str | None = None


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
    with replacing(path) as aside, aside.open("wb") as file:
        for result in results:
            file.write(encoded(dataclasses.asdict(result)) + b"\n")


def read_results(path: Path) -> list[Result]:
    """Read them again.

    Raises:
      DataError: it is no such file.
    """
    results = []
    try:
        # As bytes, which end lines at "\n" alone: texts may have other characters that end lines.
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    results.append(Result(**json.loads(line)))
                except (ValueError, TypeError) as error:
                    found = f"{path}:{number}: found no result of a run ({error})"
                    raise DataError(f"{found}; expected one a line") from error
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; expected the results of a run") from None
    return results


def encoded(value: Any, **options: Any) -> bytes:
    """As JSON in UTF-8, with escapes if there is text that UTF-8 cannot hold, such as half a pair of surrogates."""
    try:
        return to_json(value, ensure_ascii=False, **options).encode()
    except UnicodeEncodeError:
        return to_json(value, **options).encode()


def digest_of(value: Any) -> str:
    """In short, what JSON holds of a value, whatever the order of its fields."""
    return hashlib.blake2b(to_json(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Id -> line of a file of answers."""
    with path.open(encoding="utf-8") as file:
        return {line["id"]: line for line in map(json.loads, file)}


def _reference(item: Item) -> Mapping[str, Any]:
    return item.reference if item.group is None else {**item.reference, "group": item.group}


def _result(item: Item, answer: Mapping[str, Any], metric: Metric) -> Result:
    error = answer.get("error")
    text = "" if error is not None else answer["text"]
    is_truncated = error is None and answer["finish_reason"] in _CUT
    score = metric.score(text, _reference(item))
    category: Category = "scored"
    if error is not None:
        category = "error"
    elif score.parsed is None:
        category = "truncated" if is_truncated else "parse_failure" if parse(text).answer else "no_answer"
    return Result(
        id=item.id,
        question=item.question,
        group=None if metric.cluster == "group" else item.group,
        reference=item.reference,
        output=text,
        parsed=score.parsed,
        score=float(score.value),
        parts=dict(score.parts),
        category=category,
        is_truncated=is_truncated,
        is_forced=answer.get("is_forced", False),
        prompt_tokens=0 if error is not None else answer["prompt_tokens"],
        new_tokens=0 if error is not None else answer["new_tokens"],
        error=error,
        cluster=_cluster(item, metric),
        prompt=digest_of({**item.asked, "content": _content(item)}),
    )


def _cluster(item: Item, metric: Metric) -> str | None:
    if metric.cluster == "group":
        return item.group
    media = [part for part in _content(item) if part.get("type") in ("image", "video")]
    return digest_of(media) if media and metric.cluster == "media" else None


def _content(item: Item) -> list[dict[str, Any]]:
    """The parts of what is asked; of files what is in them, wherever they are."""
    return [
        {name: value for name, value in part.items() if name not in ("path", "url") or "digest" not in part}
        for part in item.asked.get("content", ())
    ]
