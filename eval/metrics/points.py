"""Points: whether a click lands on what it should (ScreenSpot).

Fields: "boxes" [[x1, y1, x2, y2]], the element in pixels of the screenshot, "width", "height"; "data_type" ("text" or
"icon") and "data_source" ("ios", "android", "macos", "windows", or a web page's) for the figures by platform.
"""

import math
import re

from eval.metrics.boxes import SIGNED
from eval.metrics.metric import BOX_FIELDS, UNPARSED, Metric, Reference, Score, mean_by, only_box_of, size_of
from eval.metrics.text import as_number
from eval.parse_answer import LIMITS, Box, Point, Scale, answer_text, boxes, final_answer, points, to_pixels

_NUMBER = r"([0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
_NAMED = re.compile(rf"\bx[\"']?\s*+[=:]\s*+{_NUMBER}\s*+[,;]\s*+[\"']?y[\"']?\s*+[=:]\s*+{_NUMBER}", re.IGNORECASE)
_FOUR = re.compile(rf"[\[(]\s*+{SIGNED},\s*+{SIGNED},\s*+{SIGNED},\s*+{SIGNED}\s*+[\])]")
_X_AND_Y = re.compile(r"x=([\d.]++), y=([\d.]++)")
_PLATFORMS = (("ios", "mobile"), ("android", "mobile"), ("macos", "desktop"), ("windows", "desktop"))


def click(text: str, scale: Scale = "thousand") -> Point | None:
    """Return where an answer clicks, on its own scale; None where it names no place.

    It is the centre of the first box, else the first point, else what "x=, y=" says.

    >>> click("pyautogui.click(x=200, y=300)")
    (200.0, 300.0)
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


def screenspot(text: str, reference: Reference, scale: Scale = "thousand") -> Score:
    """Score 1 where the click is within the element's box, its edges included."""
    (x1, y1, x2, y2), (width, height) = only_box_of(reference), size_of(reference)
    place = click(text, scale)
    if place is None:
        return UNPARSED
    ((x, y),) = to_pixels([place], width, height, scale)
    return Score(float(x1 <= x <= x2 and y1 <= y <= y2), [x, y])


def screenspot_lmms(text: str, reference: Reference) -> Score:
    """Score as lmms-eval: the centre of the first four numbers in brackets, thousandths where one is above 1.

    Without such numbers the click is at the top left corner, which is wrong but for an element there.
    """
    match = _FOUR.search(final_answer(text) or "")
    x1, y1, x2, y2 = (float(value) for value in match.groups()) if match else [0.0] * 4
    divisor = 1000 if max(x1, y1, x2, y2) > 1 else 1
    place = (x1 / divisor + x2 / divisor) / 2, (y1 / divisor + y2 / divisor) / 2
    return _clicked(place, only_box_of(reference), size_of(reference), is_found=match is not None)


def screenspot_vlmevalkit(text: str, reference: Reference) -> Score:
    """Score as VLMEvalKit: "x=1, y=2" in pixels, or fractions where neither is above 1; the last pixel is the edge.

    Without such text the click is at the top left corner, which is wrong but for an element there.
    """
    (x1, y1, x2, y2), (width, height) = only_box_of(reference), size_of(reference)
    match = _X_AND_Y.search(final_answer(text) or "")
    x, y = (as_number(value) for value in match.groups()) if match else (0.0, 0.0)
    if x is None or y is None:
        return UNPARSED
    if x > 1 or y > 1:
        x, y = x / width, y / height
    # -1 stands for 0.
    x1, y1, x2, y2 = (0.0 if edge == -1 else edge for edge in (x1, y1, x2 - 1, y2 - 1))
    return _clicked((x, y), (x1, y1, x2, y2), (width, height), is_found=match is not None)


def _clicked(place: Point, box: Box, size: tuple[float, float], *, is_found: bool) -> Score:
    """Score a click in fractions on an element in pixels."""
    x1, y1, x2, y2 = (edge / size[axis % 2] for axis, edge in enumerate(box))
    x, y = place
    is_hit = x1 <= x <= x2 and y1 <= y <= y2
    if not is_hit and not (is_found and math.isfinite(x + y)):
        return UNPARSED
    return Score(float(is_hit), [x * size[0], y * size[1]])


def platform_and_kind(reference: Reference) -> str | None:
    """Return the group of an item ("mobile-text", "web-icon"), with the platform of its source as in lmms-eval."""
    source, kind = reference.get("data_source"), reference.get("data_type")
    if source is None or kind is None:
        return None
    platform = next((platform for name, platform in _PLATFORMS if name in str(source).lower()), "web")
    return f"{platform}-{kind}"


_SOURCE = "ScreenSpot (arXiv 2401.10935); VLMEvalKit vlmeval/dataset/GUI/screenspot.py, lmms-eval tasks/screenspot"

_THOUSANDTHS = Metric(
    "screenspot", screenspot, mean_by(group=platform_and_kind), f"{_SOURCE}; thousandths", BOX_FIELDS, "media"
)

METRICS = (
    _THOUSANDTHS,
    _THOUSANDTHS.variant("screenspot-unit", f"{_SOURCE}; fractions from 0 to 1", scale="unit"),
    _THOUSANDTHS.variant("screenspot-pixel", f"{_SOURCE}; pixels", scale="pixel"),
    Metric(
        "screenspot-lmms",
        screenspot_lmms,
        mean_by(group=platform_and_kind),
        "ScreenSpot (arXiv 2401.10935); lmms-eval tasks/screenspot/utils_rec.py, Center_ACC",
        BOX_FIELDS,
        "media",
    ),
    Metric(
        "screenspot-vlmevalkit",
        screenspot_vlmevalkit,
        mean_by(group=platform_and_kind),
        "ScreenSpot (arXiv 2401.10935); VLMEvalKit vlmeval/dataset/GUI/screenspot.py, evaluate_point",
        BOX_FIELDS,
        "media",
    ),
)
