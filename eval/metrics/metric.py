"""What a metric is, and what all of them need: fields of the reference row, the mean, and means by group."""

import dataclasses
import math
import numbers
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from eval.parse_answer import Box, by_letter
from glm4v_jax.errors import DataError

Item = Mapping[str, Any]
"""A reference row; `eval.metrics` lists its fields."""


class Score(NamedTuple):
    """What one answer is worth.

    value: from 0 to 1, more is better.
    parsed: what was understood, as JSON can hold it; None where nothing was: a category of its own, of value 0.
    parts: further numbers, such as an IoU.
    """

    value: float
    parsed: Any
    parts: Mapping[str, float] = {}


UNPARSED = Score(0.0, None)

Scores = Sequence[tuple[Item, Score]]

Cluster = Literal["item", "media", "group"]
"""What is independent of one another, and so drawn as a whole for an interval: each item; all items about the same
pictures and videos; all of the same "group"."""


def mean_terms(scores: Scores) -> tuple[float, float]:
    """`Metric.terms` of a mean over items: the sum of the values, and how many there are."""
    return math.fsum(score.value for _, score in scores), float(len(scores))


def question_terms(scores: Scores) -> tuple[float, float]:
    """`Metric.terms` where a cluster is one question, which is right if all its items are."""
    return min(score.value for _, score in scores), 1.0


@dataclasses.dataclass(frozen=True)
class Metric:
    """A way to score answers.

    Attributes:
        name: in `METRICS`.
        score: (all that was generated, item) -> Score; raises DataError for a broken item, never for an answer.
        aggregate: figures over all items, "score" first, the one that is published; shares from 0 to 1. Raises
            DataError where there are no items.
        source: where its definition stands.
        fields: that an item must have; "answer" may be "answers" instead.
        cluster: what the score's interval draws.
        terms: (items of one cluster) -> numerator and denominator, whose sums over all clusters make the score: their
            ratio, down to 0; 1 where there is nothing to divide by. So an interval needs no `aggregate` for each draw.
    """

    name: str
    score: Callable[[str, Item], Score]
    aggregate: Callable[[Scores], Mapping[str, float]]
    source: str
    fields: tuple[str, ...] = ("answer",)
    cluster: Cluster = "item"
    terms: Callable[[Scores], tuple[float, float]] = mean_terms

    def check(self, item: Item) -> None:
        """Look whether an item has what `score` needs, before a model is asked.

        Raises:
            DataError: a field is missing or not what it should be.
        """
        for field in self.fields:
            _READERS.get(field, required)(item, field)
        # Fields that only some kinds of items need; every metric reads the item before the text.
        self.score("", item)


def required(item: Item, field: str) -> Any:
    """A field that must be there.

    Raises:
        DataError: it is not.
    """
    if item.get(field) is None:
        there = ", ".join(sorted(key for key in item if item[key] is not None))
        raise DataError(f"{field}: missing in the item, which has: {there or 'nothing'}")
    return item[field]


def answers_of(item: Item, _: str = "answer") -> list[str]:
    """The right answers: "answers", or else the one in "answer", as strings.

    Raises:
        DataError: there is none.
    """
    if item.get("answers") is not None:
        found = item["answers"]
        if isinstance(found, str) or not isinstance(found, Sequence) or not found:
            raise DataError(f"answers: found {found!r}, expected a list of at least one")
        return [str(answer) for answer in found]
    return [str(required(item, "answer"))]


def options_of(item: Item, field: str = "options") -> dict[str, str]:
    """Letter -> text of the options; a sequence of texts is A, B, C, ...

    Raises:
        DataError: there are none.
    """
    found = required(item, field)
    if isinstance(found, str) or not isinstance(found, Mapping | Sequence) or not found:
        raise DataError(f"{field}: found {found!r}, expected letters with their texts, or a list of texts")
    return by_letter(found)


def letter_of(item: Item, options: Mapping[str, str]) -> str:
    """The letter of the right option, which "answer" gives.

    Raises:
        DataError: it is not one of the options.
    """
    letter = str(required(item, "answer")).strip()
    if letter not in options:
        raise DataError(f"answer: found {letter!r}, expected one of {', '.join(options)}")
    return letter


def boxes_of(item: Item, field: str = "boxes") -> list[Box]:
    """The boxes (x1, y1, x2, y2) in pixels; there may be none.

    Raises:
        DataError: the field is missing, or one of them is not four finite numbers with its corners in order.
    """
    boxes = []
    for box in required(item, field):
        try:
            x1, y1, x2, y2 = (float(value) for value in box)
        except (TypeError, ValueError):
            raise DataError(f"{field}: found {box!r}, expected four numbers x1, y1, x2, y2") from None
        if not (math.isfinite(x1 + y1 + x2 + y2) and x1 <= x2 and y1 <= y2):
            raise DataError(f"{field}: found {box!r}, expected x1 <= x2 and y1 <= y2, finite")
        boxes.append((x1, y1, x2, y2))
    return boxes


def only_box_of(item: Item) -> Box:
    """The one box (x1, y1, x2, y2) in pixels.

    Raises:
        DataError: as `boxes_of` does, or there are none or several.
    """
    boxes = boxes_of(item)
    if len(boxes) != 1:
        raise DataError(f"boxes: found {len(boxes)}, expected the one that is asked for")
    return boxes[0]


def size_of(item: Item) -> tuple[float, float]:
    """Width and height of the original picture, in pixels.

    Raises:
        DataError: one is missing or not positive.
    """
    return _side(item, "width"), _side(item, "height")


def _side(item: Item, field: str) -> float:
    found = required(item, field)
    if isinstance(found, bool) or not isinstance(found, numbers.Real) or not 0 < float(found) < math.inf:
        raise DataError(f"{field}: found {found!r}, expected a positive number of pixels")
    return float(found)


_READERS: Mapping[str, Callable[[Item, str], Any]] = {
    "answer": answers_of,
    "options": options_of,
    "boxes": boxes_of,
    "width": _side,
    "height": _side,
}


def mean_of(values: Sequence[float]) -> float:
    """The mean.

    Raises:
        DataError: of nothing.
    """
    if not values:
        raise DataError("scores: found none to take the mean of; expected at least one")
    return statistics.fmean(values)


def mean(scores: Scores) -> dict[str, float]:
    """The mean value as "score".

    Raises:
        DataError: there are no scores.
    """
    return {"score": mean_of([score.value for _, score in scores])}


def mean_part(scores: Scores, part: str) -> float:
    """The mean of a part, 0 where a score has none."""
    return mean_of([score.parts.get(part, 0.0) for _, score in scores])


def by_group(scores: Scores, field: str | Callable[[Item], str | None], prefix: str) -> dict[str, float]:
    """Mean values by a field of the items, or by what a function says of them, as "prefix/group", in order of names.

    Items without one are left out, so nothing is in the result where none has one; nor where all have the same one,
    whose mean is that of all.
    """
    groups: dict[str, list[float]] = {}
    for item, score in scores:
        name = item.get(field) if isinstance(field, str) else field(item)
        if name is not None:
            groups.setdefault(str(name), []).append(score.value)
    if len(groups) == 1 and len(next(iter(groups.values()))) == len(scores):
        return {}
    return {f"{prefix}/{name}": statistics.fmean(groups[name]) for name in sorted(groups)}
