"""A run as one page: its figures, and its items with pictures, boxes, what was said, and what was understood.

The page is one file that asks for no other and nothing of the net. What a model wrote, and what data say, is shown as
text: the template escapes everything, and the page's own policy lets no script run but the one of this package.
"""

import base64
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from eval.compare import RIGHT
from eval.data.items import Item
from eval.report.thumbnails import Shown, show
from eval.results import Result
from glm4v_jax.errors import DataError
from glm4v_jax.files import replacing, to_json
from glm4v_jax.generate.text.boxes import SCALE
from glm4v_jax.generate.text.thinking import ANSWER, END_THINK, parse
from glm4v_jax.inputs.media.quiet import unsuspected_pictures
from glm4v_jax.inputs.media.threads import map_threads

LIMIT = 500
"""Items on a page, unless said otherwise."""

CATEGORIES: Mapping[str, str] = {
    "parse_failure": "not understood",
    "no_answer": "no answer",
    "truncated": "cut off, not understood",
    "error": "error",
}
"""Names of `eval.results.Category` for a person; "scored" needs none."""

_ARM = 25
"""Of a point's cross, of 1,000."""

_HERE = Path(__file__).parent
_ASIDE = (
    "score", "task", "metric", "mean", "interval", "confidence", "count", "clusters", "parts", "groups", "rates",
    "truncated_share",
)  # fmt: skip
"""What of a summary the page's head says in words; the rest is shown as it is."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A box, or a point, over a picture.

    Attributes:
      kind: "reference" or "predicted".
      left, top, width, height: from 0 to 1000 along each axis; a point is in the middle of a cross of this size.
      is_point: which of the two.
    """

    kind: str
    left: float
    top: float
    width: float
    height: float
    is_point: bool = False


@dataclasses.dataclass(frozen=True)
class Card:
    """An item as the page shows it.

    Attributes:
      result: of the item.
      is_right: whether its score is `RIGHT` at least.
      verdict: that in a word, or why nothing was understood.
      shown: its pictures and videos.
      marks: boxes and points over its only picture.
      thought, said: the output in two, with its tags.
      understood, reference: as text.
      order: its number in the data.
    """

    result: Result
    is_right: bool
    verdict: str
    shown: Sequence[Shown]
    marks: Sequence[Mark]
    thought: str
    said: str
    understood: str | None
    reference: Mapping[str, str]
    order: int


def write_report(
    items: Sequence[Item], results: Sequence[Result], summary: Mapping[str, Any], path: Path, limit: int = LIMIT
) -> None:
    """Write the page of a run, complete or not at all.

    Args:
      items, results: in the same order.
      summary: of the run; see `eval.summary.summarize`.
      path: of the file.
      limit: how many items are on it at most. Failures go before what is right, lower scores before higher ones; those
        that are left out are counted on the page.

    Raises:
      DataError: items and results are not of each other, or the limit is negative.
      OSError: the file cannot be written.
    """
    if [item.id for item in items] != [result.id for result in results]:
        raise DataError(f"results: found {len(results)} that are not those of the {len(items)} items in their order")
    if limit < 0:
        raise DataError(f"limit: found {limit}, expected at least 0")
    chosen = _choose(results, limit)
    with unsuspected_pictures():
        cards = map_threads(_Maker(items, results), chosen)
    script, style = (_HERE.joinpath(name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    page = _template().stream(
        summary=summary,
        cards=cards,
        counts=_counts([results[index] for index in chosen]),
        groups=sorted({card.result.group for card in cards if card.result.group is not None}),
        left_out=_left_out(results, chosen),
        has_marks=any(card.marks for card in cards),
        right=RIGHT,
        categories=CATEGORIES,
        about={name: _as_words(value) for name, value in summary.items() if value is not None and name not in _ASIDE},
        script=markupsafe.Markup(script),
        style=markupsafe.Markup(style),
        script_hash=_digest(script),
        style_hash=_digest(style),
    )
    # A tokenizer can put together text that is no Unicode; the page is to be written all the same.
    with replacing(path) as aside:
        page.dump(str(aside), encoding="utf-8", errors="backslashreplace")


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Index of an item -> its card."""

    items: Sequence[Item]
    results: Sequence[Result]

    def __call__(self, index: int) -> Card:
        result, shown = self.results[index], show(self.items[index].messages)
        is_right = result.score >= RIGHT
        thought, said = split_thought(result.output)
        return Card(
            result=result,
            is_right=is_right,
            verdict=CATEGORIES.get(result.category, "right" if is_right else "wrong"),
            shown=shown,
            marks=_marks(result, shown),
            thought=thought,
            said=said,
            understood=None if result.parsed is None else _as_text(result.parsed),
            reference={name: _as_text(value) for name, value in result.reference.items()},
            order=index,
        )


def split_thought(output: str) -> tuple[str, str]:
    """What is to be folded of an output, and what is to be seen at once; with all tags, nothing is lost."""
    parsed = parse(output)
    if parsed.thought is None:
        return "", output
    if END_THINK in output:
        end = output.index(END_THINK) + len(END_THINK)
    else:
        end = output.find(ANSWER) if ANSWER in output else len(output)
    return output[:end], output[end:]


def _choose(results: Sequence[Result], limit: int) -> list[int]:
    """Indices of the items on the page, in the data's order."""
    failures_first = sorted(range(len(results)), key=lambda index: (results[index].score, index))
    return sorted(failures_first[:limit])


def _counts(results: Iterable[Result]) -> Counter[str]:
    """How many items every choice of the page's filter shows."""
    counts: Counter[str] = Counter()
    for result in results:
        counts["all"] += 1
        counts["right" if result.score >= RIGHT else "wrong"] += 1
        counts["cut"] += result.is_truncated
        if result.category != "scored":
            counts[result.category] += 1
    return counts


def _left_out(results: Sequence[Result], chosen: Sequence[int]) -> Counter[str]:
    shown = set(chosen)
    return _counts(result for index, result in enumerate(results) if index not in shown)


def _marks(result: Result, shown: Sequence[Shown]) -> list[Mark]:
    """Boxes of a task that asks for them, over the one picture that they can be meant for.

    What metrics of such tasks understand are boxes or points in pixels, one or a list: drawn is what was scored, on
    whatever scale it was written.
    """
    expected = result.reference.get("boxes")
    if expected is None or len(shown) != 1 or shown[0].kind != "picture" or not shown[0].thumbnails:
        return []
    size = (result.reference.get("width") or shown[0].size[0], result.reference.get("height") or shown[0].size[1])
    understood = result.parsed if isinstance(result.parsed, list) else []
    found = [place for place in (understood, *understood) if _is_place(place)]
    return [_mark("reference", box, size) for box in expected] + [_mark("predicted", place, size) for place in found]


def _is_place(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) in (2, 4) and all(isinstance(n, int | float) for n in value)


def _mark(kind: str, place: Sequence[float], size: tuple[float, float]) -> Mark:
    """`place`: two corners of a box, or a point, in pixels of a picture of this size, width first."""
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
    """As `_as_text`, with an object's fields as a person writes them."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_as_text(field)}" for name, field in value.items()) or "none"
    return _as_text(value)


def _digest(text: str) -> str:
    """Of a script or a style, as the page's policy names it."""
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
