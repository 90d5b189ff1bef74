"""Points: whether a click lands on what it should (ScreenSpot).

Fields: "boxes" [[x1, y1, x2, y2]], the element in pixels of the screenshot, "width", "height"; "data_type" ("text" or
"icon") and "data_source" ("ios", "android", "macos", "windows", or a web page's) for the figures by platform.
"""

import functools
import math
import re

from eval.metrics.metric import UNPARSED, Item, Metric, Score, Scores, by_group, mean, only_box_of, size_of
from eval.parse_answer import LIMITS, Point, Scale, answer_text, boxes, points, to_pixels

FIELDS = ("boxes", "width", "height")

_NUMBER = r"([0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
_NAMED = re.compile(rf"\bx[\"']?\s*+[=:]\s*+{_NUMBER}\s*+[,;]\s*+[\"']?y[\"']?\s*+[=:]\s*+{_NUMBER}", re.IGNORECASE)
_PLATFORMS = (("ios", "mobile"), ("android", "mobile"), ("macos", "desktop"), ("windows", "desktop"))


def click(text: str, scale: Scale = "thousand") -> Point | None:
    """Where an answer clicks, on its own scale: the centre of its first box, else its first point, else its "x=, y=".

    None where it names none of them.
    """
    if (found := boxes(text, scale)) is not None:
        x1, y1, x2, y2 = found[0]
        return (x1 + x2) / 2, (y1 + y2) / 2
    if (given := points(text, scale)) is not None:
        return given[0]
    match = _NAMED.search(answer_text(text) or "")
    if match is None:
        return None
    x, y = float(match[1]), float(match[2])
    return (x, y) if max(x, y) <= LIMITS[scale] and math.isfinite(max(x, y)) else None


def screenspot(text: str, item: Item, scale: Scale = "thousand") -> Score:
    """1 where the click is within the element's box, its edges included.

    VLMEvalKit, whose annotations are (x, y, width, height), takes x + width - 1 for the right edge; what an item's box
    says is for the one who makes the items.

    Raises:
        DataError: the item has not one box, or no size.
    """
    (x1, y1, x2, y2), (width, height) = only_box_of(item), size_of(item)
    place = click(text, scale)
    if place is None:
        return UNPARSED
    ((x, y),) = to_pixels([place], width, height, scale)
    return Score(float(x1 <= x <= x2 and y1 <= y <= y2), [x, y])


def aggregate_screenspot(scores: Scores) -> dict[str, float]:
    """Share of hits as "score"; then by platform and kind of element, as lmms-eval groups them."""
    return {**mean(scores), **by_group(scores, platform_and_kind, "group")}


def platform_and_kind(item: Item) -> str | None:
    """The group of an item ("mobile-text", "web-icon"), its platform told from the source as lmms-eval does it."""
    source, kind = item.get("data_source"), item.get("data_type")
    if source is None or kind is None:
        return None
    platform = next((platform for name, platform in _PLATFORMS if name in str(source).lower()), "web")
    return f"{platform}-{kind}"


_SOURCE = "ScreenSpot (arXiv 2401.10935); VLMEvalKit vlmeval/dataset/GUI/screenspot.py, lmms-eval tasks/screenspot"

METRICS = (
    Metric("screenspot", screenspot, aggregate_screenspot, f"{_SOURCE}; thousandths", FIELDS, "media"),
    Metric(
        "screenspot-unit",
        functools.partial(screenspot, scale="unit"),
        aggregate_screenspot,
        f"{_SOURCE}; shares from 0 to 1",
        FIELDS,
        "media",
    ),
    Metric(
        "screenspot-pixel",
        functools.partial(screenspot, scale="pixel"),
        aggregate_screenspot,
        f"{_SOURCE}; pixels, as VLMEvalKit takes numbers above 1",
        FIELDS,
        "media",
    ),
)
