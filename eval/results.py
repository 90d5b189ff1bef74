"""The files of a run, and the result of every item: its answer, what was parsed of it, and its score."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from eval.data.items import Item
from eval.metrics import Metric, Reference, Score
from glm4v_jax.errors import DataError, counted, not_there
from glm4v_jax.files import replacing, to_json
from glm4v_jax.generate.text.thinking import parse

ANSWERS = "answers.jsonl"
"""What the model wrote, one line per item, in the order of completion."""
RESULTS = "results.jsonl"
"""An `ItemResult` per line, in the order of the data."""
SUMMARY = "summary.json"
"""The figures, see `eval.summary`; beside the directories of several tasks, their scores."""
REPORT = "report.html"
"""All of these as a page, see `eval.report.report`."""

Category = Literal["scored", "parse_failure", "no_answer", "truncated", "error"]
"""Why an item has its score, exactly one per item. "scored": an answer was parsed. The others score 0: "no_answer",
nothing follows the thought; "truncated", the text was cut off before an answer could be parsed; "parse_failure", the
text has no answer of the expected kind; "error", the prompt could not be prepared."""

_CUT = ("length", "repetition")
"""Values of `glm4v_jax.generate.completion.FinishReason` for a text that was cut off."""


@dataclasses.dataclass(frozen=True)
class ItemResult:
    """An item with its answer.

    Attributes:
      id, question, group: of the item; no group where it defines the item's `cluster`.
      reference: what the answer was compared with.
      output: the whole text of the model; empty after an error.
      parsed: what the metric parsed of it; None where nothing could be.
      score: from 0 to 1.
      parts: further numbers of the metric; after an error, those of an empty text.
      category: see `Category`.
      is_truncated: whether the text was cut off, by the limit of tokens or a repetition, parsed or not.
      is_forced: whether the thought was closed because its budget was used up.
      prompt_tokens, new_tokens: counts.
      error: why the prompt could not be prepared.
      cluster: equal for items that an interval resamples together, see `eval.metrics.metric.Cluster`; None for an item
        that is resampled alone.
      prompt: digest of the prompt: equal for equal texts with equal images and videos at equal positions.
    """

    id: str
    question: str
    group: str | None
    reference: Reference
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


def score_items(items: Sequence[Item], answers: Mapping[str, Mapping[str, Any]], metric: Metric) -> list[ItemResult]:
    """Score the answers of a run, id -> line of its file; DataError for an item with neither answer nor error."""
    if missing := [item.id for item in items if item.id not in answers]:
        raise DataError(
            f"answers: found none for {counted(len(missing), 'item')}, such as {missing[0]!r}; expected all"
        )
    return [_result(item, answers[item.id], metric) for item in items]


def scores_of(items: Sequence[Item], results: Sequence[ItemResult]) -> list[tuple[Reference, Score]]:
    """Return the arguments of a metric's `aggregate`."""
    return [
        (_with_group(item), Score(result.score, result.parsed, result.parts))
        for item, result in zip(items, results, strict=True)
    ]


def write_results(results: Iterable[ItemResult], path: Path) -> None:
    """Write a file of results, complete or not at all."""
    with replacing(path) as aside, aside.open("wb") as file:
        for result in results:
            file.write(encoded(dataclasses.asdict(result)) + b"\n")


def read_results(path: Path) -> list[ItemResult]:
    """Read a file of results; DataError if the file does not exist, or a line is not a result."""
    results = []
    try:
        # As bytes, which end lines at "\n" alone: texts may have other characters that end lines.
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    results.append(ItemResult(**json.loads(line)))
                except (ValueError, TypeError) as error:
                    found = f"{path}:{number}: found an invalid result ({error})"
                    raise DataError(f"{found}; expected the result of an item") from error
    except FileNotFoundError:
        raise DataError(not_there(path, "the results of a run")) from None
    return results


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file of answers: id -> line."""
    with path.open(encoding="utf-8") as file:
        return {line["id"]: line for line in map(json.loads, file)}


def encoded(value: Any, **options: Any) -> bytes:
    """Encode a value as JSON in UTF-8, with escapes for text that UTF-8 cannot hold, such as unpaired surrogates."""
    try:
        return to_json(value, ensure_ascii=False, **options).encode()
    except UnicodeEncodeError:
        return to_json(value, **options).encode()


def digest_of(value: Any) -> str:
    """Digest the JSON of a value, whatever the order of its fields."""
    return hashlib.blake2b(to_json(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _with_group(item: Item) -> Reference:
    return item.reference if item.group is None else {**item.reference, "group": item.group}


def _result(item: Item, answer: Mapping[str, Any], metric: Metric) -> ItemResult:
    error = answer.get("error")
    text = "" if error is not None else answer["text"]
    is_truncated = error is None and answer["finish_reason"] in _CUT
    score = metric.score(text, _with_group(item))
    category: Category = "scored"
    if error is not None:
        category = "error"
    elif score.parsed is None:
        category = "truncated" if is_truncated else "parse_failure" if parse(text).answer else "no_answer"
    return ItemResult(
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
        prompt_tokens=answer.get("prompt_tokens", 0),
        new_tokens=answer.get("new_tokens", 0),
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
    """The parts of the prompt; files by their content, not by their place."""
    return [
        {name: value for name, value in part.items() if name not in ("path", "url") or "digest" not in part}
        for part in item.asked.get("content", ())
    ]
