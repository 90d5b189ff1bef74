"""Write a run as one page: its figures, and its items with images, boxes, output, and what was parsed of it.

The page is one file that loads no other and nothing of the web. What a model wrote, and what data contain, is shown as
text: the template escapes everything, and the page's own policy allows no script but the one of this package.
"""

import base64
import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from eval.compare import RIGHT
from eval.data.items import Item
from eval.report.thumbnails import ShownMedia, show
from eval.results import ItemResult
from glm4v_jax.errors import DataError, counted
from glm4v_jax.files import replacing, to_json
from glm4v_jax.generate.text.boxes import SCALE
from glm4v_jax.generate.text.thinking import ANSWER, END_THINK, parse
from glm4v_jax.inputs.media.quiet import without_size_warnings
from glm4v_jax.inputs.media.threads import map_threads

LIMIT = 500
"""Items on a page, by default."""

CATEGORIES: Mapping[str, str] = {
    "parse_failure": "not parsed",
    "no_answer": "no answer",
    "truncated": "cut off, not parsed",
    "error": "error",
}
"""Labels of `eval.results.Category`; "scored" needs none."""

_ARM = 25
"""Half the size of a point's cross, of 1,000."""

_HERE = Path(__file__).parent
_IN_HEAD = (
    "score", "task", "metric", "mean", "interval", "confidence", "count", "clusters", "parts", "groups", "rates",
    "truncated_share",
)  # fmt: skip
"""Fields of a summary that the page's head describes; the others are shown as they are."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A box, or a point, over an image, which are from 0 to 1000 along each axis.

    A point is the centre of a cross of this size. `kind` is "reference" or "predicted".
    """

    kind: str
    left: float
    top: float
    width: float
    height: float
    is_point: bool = False


@dataclasses.dataclass(frozen=True)
class ItemCard:
    """An item as the page shows it.

    Attributes:
      result: of the item.
      is_right: whether its score is at least `RIGHT`.
      verdict: "right" or "wrong", or why nothing was parsed.
      media: its images and videos.
      marks: boxes and points over its only image.
      thought, answer: the two parts of the output, with their tags.
      parsed, reference: as text.
      order: its number in the data.
    """

    result: ItemResult
    is_right: bool
    verdict: str
    media: Sequence[ShownMedia]
    marks: Sequence[Mark]
    thought: str
    answer: str
    parsed: str | None
    reference: Mapping[str, str]
    order: int


def write_report(
    items: Sequence[Item], results: Sequence[ItemResult], summary: Mapping[str, Any], path: Path, limit: int = LIMIT
) -> None:
    """Write the page of a run, complete or not at all; items and results are in the same order.

    It has at most `limit` items, those with the lowest scores; the others are counted.

    Raises:
      DataError: the results are not those of the items, or the limit is negative.
      OSError: the file cannot be written.
    """
    if [item.id for item in items] != [result.id for result in results]:
        raise DataError(
            f"results: found {len(results)} of other items; expected those of the {counted(len(items), 'item')} in "
            "their order"
        )
    if limit < 0:
        raise DataError(f"limit: found {limit}; expected at least 0")
    by_score = sorted(range(len(results)), key=lambda index: (results[index].score, index))
    chosen = sorted(by_score[:limit])
    with without_size_warnings():
        cards = map_threads(functools.partial(_card, items, results), chosen)
    script, style = (_HERE.joinpath(name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    page = _template().stream(
        summary=summary,
        cards=cards,
        counts=_counts([results[index] for index in chosen]),
        groups=sorted({card.result.group for card in cards if card.result.group is not None}),
        skipped=_counts([results[index] for index in by_score[limit:]]),
        has_marks=any(card.marks for card in cards),
        right=RIGHT,
        categories=CATEGORIES,
        about={name: _as_words(value) for name, value in summary.items() if value is not None and name not in _IN_HEAD},
        script=markupsafe.Markup(script),
        style=markupsafe.Markup(style),
        script_hash=_digest(script),
        style_hash=_digest(style),
    )
    # A tokenizer can produce unpaired surrogates, which UTF-8 cannot hold.
    with replacing(path) as aside:
        page.dump(str(aside), encoding="utf-8", errors="backslashreplace")


def _card(items: Sequence[Item], results: Sequence[ItemResult], index: int) -> ItemCard:
    result, media = results[index], show(items[index].messages)
    is_right = result.score >= RIGHT
    thought, answer = split_thought(result.output)
    return ItemCard(
        result=result,
        is_right=is_right,
        verdict=CATEGORIES.get(result.category, "right" if is_right else "wrong"),
        media=media,
        marks=_marks(result, media),
        thought=thought,
        answer=answer,
        parsed=None if result.parsed is None else _as_text(result.parsed),
        reference={name: _as_text(value) for name, value in result.reference.items()},
        order=index,
    )


def split_thought(output: str) -> tuple[str, str]:
    """Split an output into the thought, which the page folds, and the rest, both with their tags.

    >>> split_thought("<think>Hm.</think><answer>7</answer>")
    ('<think>Hm.</think>', '<answer>7</answer>')
    """
    parsed = parse(output)
    if parsed.thought is None:
        return "", output
    if END_THINK in output:
        end = output.index(END_THINK) + len(END_THINK)
    else:
        end = output.find(ANSWER) if ANSWER in output else len(output)
    return output[:end], output[end:]


def _counts(results: Iterable[ItemResult]) -> Counter[str]:
    """The number of items that every choice of the page's filter shows."""
    counts: Counter[str] = Counter()
    for result in results:
        counts["all"] += 1
        counts["right" if result.score >= RIGHT else "wrong"] += 1
        counts["cut"] += result.is_truncated
        if result.category != "scored":
            counts[result.category] += 1
    return counts


def _marks(result: ItemResult, media: Sequence[ShownMedia]) -> list[Mark]:
    """The boxes of a task that asks for them, over its only image.

    What metrics of such tasks parse are boxes or points in pixels, one or a list: the marks are what was scored, on
    whatever scale it was written.
    """
    expected = result.reference.get("boxes")
    if expected is None or len(media) != 1 or media[0].kind != "image" or not media[0].thumbnails:
        return []
    size = (result.reference.get("width") or media[0].size[0], result.reference.get("height") or media[0].size[1])
    parsed = result.parsed if isinstance(result.parsed, list) else []
    found = [place for place in (parsed, *parsed) if _is_place(place)]
    return [_mark("reference", box, size) for box in expected] + [_mark("predicted", place, size) for place in found]


def _is_place(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) in (2, 4) and all(isinstance(n, int | float) for n in value)


def _mark(kind: str, place: Sequence[float], size: tuple[float, float]) -> Mark:
    """Make the mark of two corners of a box, or of a point, in pixels of an image of this size (width, height)."""
    coordinates = [value / size[axis % 2] * SCALE for axis, value in enumerate(place)]
    if len(place) == 2:
        x, y = coordinates
        return Mark(kind, x - _ARM, y - _ARM, 2 * _ARM, 2 * _ARM, is_point=True)
    left, right = sorted(coordinates[::2])
    top, bottom = sorted(coordinates[1::2])
    return Mark(kind, left, top, right - left, bottom - top)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value, ensure_ascii=False, default=str)


def _as_words(value: Any) -> str:
    """Like `_as_text`, but objects without JSON's quotes and braces."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_as_text(field)}" for name, field in value.items()) or "none"
    return _as_text(value)


def _digest(text: str) -> str:
    """The digest of a script or a style, in the syntax of the page's policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")
