"""What a metric is, and what all of them share: fields of the reference, comparison with its answers, aggregates."""

import dataclasses
import functools
import math
import numbers
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from eval.parse_answer import Box, by_letter, final_answer
from glm4v_jax.errors import DataError

Reference = Mapping[str, Any]
"""What is known of the right answer of an item; `eval.metrics` lists the fields."""


class Score(NamedTuple):
    """The score of one answer.

    Attributes:
        value: from 0 to 1, more is better.
        parsed: what was parsed of the answer, as JSON can hold it; None where nothing could be, which has value 0.
        parts: further numbers, such as an IoU.
    """

    value: float
    parsed: Any
    parts: Mapping[str, float] = {}


UNPARSED = Score(0.0, None)

Scores = Sequence[tuple[Reference, Score]]

Cluster = Literal["item", "media", "group"]
"""What is independent of one another, and so resampled together for an interval: each item; all items about the same
images and videos; all of the same "group"."""


def mean_terms(scores: Scores) -> tuple[float, float]:
    """`Metric.terms` of a mean over items: the sum of the values, and their number."""
    return math.fsum(score.value for _, score in scores), float(len(scores))


def question_terms(scores: Scores) -> tuple[float, float]:
    """`Metric.terms` where a cluster is one question, which is right if all its items are."""
    return min(score.value for _, score in scores), 1.0


@dataclasses.dataclass(frozen=True)
class Metric:
    """A way to score answers.

    Attributes:
        name: in `METRICS`.
        score: (all that was generated, reference) -> Score; raises DataError for an invalid reference, never for an
            answer.
        aggregate: figures over all items, "score" first, the one that is published; fractions from 0 to 1. Raises
            DataError where there are no items.
        source: of its definition.
        fields: that a reference needs; "answer" may be "answers" instead.
        cluster: what the interval of the score resamples.
        terms: (items of one cluster) -> numerator and denominator, whose sums over all clusters make the score: their
            ratio, down to 0; 1 where the denominator is 0. So an interval needs no `aggregate` for each resample.
    """

    name: str
    score: Callable[[str, Reference], Score]
    aggregate: Callable[[Scores], Mapping[str, float]]
    source: str
    fields: tuple[str, ...] = ("answer",)
    cluster: Cluster = "item"
    terms: Callable[[Scores], tuple[float, float]] = mean_terms

    def variant(self, name: str, source: str, **arguments: Any) -> "Metric":
        """Return the metric with other keyword arguments of its `score`."""
        score = functools.partial(self.score, **arguments)
        return dataclasses.replace(self, name=name, source=source, score=score)

    def check(self, reference: Reference) -> None:
        """Check that a reference has what `score` needs, before a model is asked; else a DataError names the field."""
        for field in self.fields:
            _READERS.get(field, required)(reference, field)
        # Fields that only some kinds of items need; every metric reads the reference before the text.
        self.score("", reference)


def required(reference: Reference, field: str) -> Any:
    """Return a field that must be present; else raise a DataError."""
    if reference.get(field) is None:
        there = ", ".join(sorted(key for key in reference if reference[key] is not None))
        raise DataError(f"{field}: found nothing; expected the field beside {there or 'no other'}")
    return reference[field]


def answers_of(reference: Reference, _: str = "answer") -> list[str]:
    """Return the right answers as strings: "answers", or else the one in "answer"; raise DataError if there is none."""
    if reference.get("answers") is not None:
        found = reference["answers"]
        if isinstance(found, str) or not isinstance(found, Sequence) or not found:
            raise DataError(f"answers: found {found!r}; expected a list of at least one")
        return [str(answer) for answer in found]
    return [str(required(reference, "answer"))]


def options_of(reference: Reference, field: str = "options") -> dict[str, str]:
    """Return letter -> text of the options; a sequence of texts is A, B, C, ...; raise DataError if there are none."""
    found = required(reference, field)
    if isinstance(found, str) or not isinstance(found, Mapping | Sequence) or not found:
        raise DataError(f"{field}: found {found!r}; expected letters with their texts, or a list of texts")
    return by_letter(found)


def is_choice(reference: Reference, name: str) -> bool:
    """Return whether an item is multiple choice: its "type" is this name, or it has options and no type."""
    kind = reference.get("type")
    return bool(reference.get("options")) if kind is None else kind == name


def letter_of(reference: Reference, options: Mapping[str, str]) -> str:
    """Return the letter of the right option, which "answer" has; raise DataError if it is not one of the options."""
    letter = str(required(reference, "answer")).strip()
    if letter not in options:
        raise DataError(f"answer: found {letter!r}; expected one of {', '.join(options)}")
    return letter


def boxes_of(reference: Reference, field: str = "boxes") -> list[Box]:
    """Return the boxes (x1, y1, x2, y2) in pixels; there may be none.

    Raises:
        DataError: the field is missing, or a box is not four finite numbers with its corners in order.
    """
    boxes = []
    for box in required(reference, field):
        try:
            x1, y1, x2, y2 = (float(value) for value in box)
        except (TypeError, ValueError):
            raise DataError(f"{field}: found {box!r}; expected four numbers x1, y1, x2, y2") from None
        if not (math.isfinite(x1 + y1 + x2 + y2) and x1 <= x2 and y1 <= y2):
            raise DataError(f"{field}: found {box!r}; expected x1 <= x2 and y1 <= y2, finite")
        boxes.append((x1, y1, x2, y2))
    return boxes


def only_box_of(reference: Reference) -> Box:
    """Return the only box (x1, y1, x2, y2) in pixels; raise DataError if there is not exactly one."""
    boxes = boxes_of(reference)
    if len(boxes) != 1:
        raise DataError(f"boxes: found {len(boxes)}; expected exactly one")
    return boxes[0]


BOX_FIELDS = ("boxes", "width", "height")
"""Fields of a reference with boxes: `boxes_of`, `size_of`."""


def size_of(reference: Reference) -> tuple[float, float]:
    """Return width and height of the original image in pixels; raise DataError if one is not above 0."""
    return _side(reference, "width"), _side(reference, "height")


def _side(reference: Reference, field: str) -> float:
    found = required(reference, field)
    if isinstance(found, bool) or not isinstance(found, numbers.Real) or not 0 < float(found) < math.inf:
        raise DataError(f"{field}: found {found!r}; expected a number of pixels above 0")
    return float(found)


_READERS: Mapping[str, Callable[[Reference, str], Any]] = {
    "answer": answers_of,
    "options": options_of,
    "boxes": boxes_of,
    "width": _side,
    "height": _side,
}


def best_match(
    text: str,
    reference: Reference,
    similarity: Callable[[str, str], float],
    read: Callable[[str], str | None] = final_answer,
) -> Score:
    """Score the answer of a text by its best similarity with one of the right answers, a number from 0 to 1.

    `read`: text -> answer; None where there is none.
    """
    expected = answers_of(reference)
    answer = read(text)
    if answer is None:
        return UNPARSED
    return Score(float(max(similarity(answer, one) for one in expected)), answer)


def mean_of(values: Sequence[float]) -> float:
    """Return the mean; raise DataError if there are no values."""
    if not values:
        raise DataError("scores: found none; expected at least one")
    return statistics.fmean(values)


def mean(scores: Scores) -> dict[str, float]:
    """Return the mean value as "score"; raise DataError if there are no scores."""
    return {"score": mean_of([score.value for _, score in scores])}


def mean_part(scores: Scores, part: str) -> float:
    """Return the mean of a part, 0 where a score has none."""
    return mean_of([score.parts.get(part, 0.0) for _, score in scores])


GroupOf = str | Callable[[Reference], str | None]
"""The field of a reference, or the function, that returns its group; None where it has none."""


def by_group(scores: Scores, group_of: GroupOf, prefix: str) -> dict[str, float]:
    """Return the mean values of groups as "prefix/group", in order of names.

    Items without a group are skipped, so the result is empty where none has one; also where all have the same one,
    whose mean is that of all.
    """
    groups: dict[str, list[float]] = {}
    for reference, score in scores:
        name = reference.get(group_of) if isinstance(group_of, str) else group_of(reference)
        if name is not None:
            groups.setdefault(str(name), []).append(score.value)
    if len(groups) == 1 and len(next(iter(groups.values()))) == len(scores):
        return {}
    return {f"{prefix}/{name}": statistics.fmean(groups[name]) for name in sorted(groups)}


def mean_by(**groups: GroupOf) -> Callable[[Scores], dict[str, float]]:
    """Make an aggregate: the mean as "score", then that of each group as "prefix/group", prefix by prefix.

    >>> mean_by(type="type")([({"type": "human"}, Score(1.0, "7")), ({"type": "augmented"}, Score(0.0, "8"))])
    {'score': 0.5, 'type/augmented': 0.0, 'type/human': 1.0}
    """
    return functools.partial(_mean_by, groups)


def _mean_by(groups: Mapping[str, GroupOf], scores: Scores) -> dict[str, float]:
    figures = mean(scores)
    for prefix, group_of in groups.items():
        figures |= by_group(scores, group_of, prefix)
    return figures
