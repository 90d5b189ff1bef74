"""Boxes: RefCOCO's accuracy and mean IoU, and precision, recall and F1 where a phrase means several objects.

Fields: "boxes" [[x1, y1, x2, y2], ...] in pixels of the original image, "width", "height"; "split" of RefCOCO.
"""

import math
import re
from collections.abc import Sequence

from eval.metrics.metric import (
    BOX_FIELDS,
    UNPARSED,
    Metric,
    Reference,
    Score,
    Scores,
    boxes_of,
    by_group,
    mean,
    mean_part,
    only_box_of,
    size_of,
)
from eval.parse_answer import Scale, boxes, final_answer, to_pixels

IOU = 0.5
"""The least IoU at which a box counts as found."""

_FLOAT = r"[-+]?(?:[0-9]++(?:\.[0-9]++)?|\.[0-9]++)(?:[eE][-+]?[0-9]++)?"
_SEPARATOR = r"(?:\s*+,\s*+|\s++)"
_FOUR = re.compile(rf"\[\s*+({_FLOAT}){_SEPARATOR}({_FLOAT}){_SEPARATOR}({_FLOAT}){_SEPARATOR}({_FLOAT})\s*+\]")
SIGNED = r"(-?\d++(?:\.\d++)?)"
_FOUR_SIGNED = re.compile(rf"\[\s*+{SIGNED},\s*+{SIGNED},\s*+{SIGNED},\s*+{SIGNED}\s*+\]")


def iou(box: Sequence[float], other: Sequence[float]) -> float:
    """Return the intersection over union of two boxes (x1, y1, x2, y2); 0 where either is empty or reversed.

    >>> iou((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    areas = [max(b[2] - b[0], 0) * max(b[3] - b[1], 0) for b in (box, other)]
    if min(width, height, *areas) <= 0:
        return 0.0
    return width * height / (sum(areas) - width * height)


def refcoco(text: str, reference: Reference, scale: Scale = "thousand", is_only: bool = False) -> Score:
    """Score 1 where the first box of the answer, on `scale`, has an IoU of at least 0.5 with the only right one.

    Part "iou". `is_only`: an answer of several boxes is wrong, with an IoU of 0.
    """
    expected, (width, height) = only_box_of(reference), size_of(reference)
    found = boxes(text, scale)
    if found is None:
        return UNPARSED
    pixels = to_pixels(found, width, height, scale)
    overlap = iou(pixels[0], expected) if len(pixels) == 1 or not is_only else 0.0
    parsed = [list(box) for box in pixels] if is_only else list(pixels[0])
    return Score(float(overlap >= IOU), parsed, {"iou": overlap})


def refcoco_vlmevalkit(text: str, reference: Reference) -> Score:
    """Score as VLMEvalKit: the scale of the coordinates is guessed, and any four numbers are a box.

    In the final answer it takes the first four numbers in square brackets, else the first four numbers of all. If none
    is above 1.5 they are fractions, above 1000 thousandths, else pixels.
    """
    expected, size = only_box_of(reference), size_of(reference)
    answer = final_answer(text) or ""
    match = _FOUR.search(answer)
    values = [float(value) for value in (match.groups() if match else re.findall(_FLOAT, answer)[:4])]
    if len(values) < 4:
        return UNPARSED
    largest = max(abs(value) for value in values)
    factor = 1.0 if largest <= 1.5 else 1000.0 if largest <= 1000 else None
    if factor is not None:
        values = [value / factor * size[axis % 2] for axis, value in enumerate(values)]
    box = to_pixels([values], *size, scale="pixel")[0]
    overlap = iou(box, expected)
    return Score(float(overlap >= IOU), list(box), {"iou": overlap})


def refcoco_lmms(text: str, reference: Reference) -> Score:
    """Score as lmms-eval: the first four numbers in square brackets as fractions, neither clipped nor sorted."""
    expected, (width, height) = only_box_of(reference), size_of(reference)
    match = _FOUR_SIGNED.search(final_answer(text) or "")
    box = [float(value) * (height if axis % 2 else width) for axis, value in enumerate(match.groups() if match else ())]
    if not box or not math.isfinite(sum(map(abs, box))):
        return UNPARSED
    shared = max(0.0, min(box[2], expected[2]) - max(box[0], expected[0]))
    shared *= max(0.0, min(box[3], expected[3]) - max(box[1], expected[1]))
    areas = [(other[2] - other[0]) * (other[3] - other[1]) for other in (box, expected)]
    union = sum(areas) - shared
    overlap = shared / union if union else 0.0
    return Score(float(overlap >= IOU), box, {"iou": overlap})


def aggregate_refcoco(scores: Scores) -> dict[str, float]:
    """Return Acc@0.5 as "score"; "mean_iou"; of several splits each, and "macro", VLMEvalKit's "Average"."""
    splits = by_group(scores, "split", "split")
    macro = {"macro": sum(splits.values()) / len(splits)} if splits else {}
    return {**mean(scores), "mean_iou": mean_part(scores, "iou"), **macro, **splits}


def match_boxes(
    found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]], least: float = IOU
) -> list[tuple[int, int, float]]:
    """Pair boxes one to one, the pair of the highest IoU first, down to an IoU of `least`.

    Of equal pairs the one found first, then the one expected first, goes first.

    Returns:
        (index in `found`, index in `expected`, IoU) in the order of pairing.
    """
    pairs = [(iou(box, other), i, j) for i, box in enumerate(found) for j, other in enumerate(expected)]
    pairs = sorted((-overlap, i, j) for overlap, i, j in pairs if overlap >= least)
    matched: list[tuple[int, int, float]] = []
    used, taken = set[int](), set[int]()
    for negative, i, j in pairs:
        if i not in used and j not in taken:
            used.add(i)
            taken.add(j)
            matched.append((i, j, -negative))
    return matched


def multi_box(text: str, reference: Reference, scale: Scale = "thousand") -> Score:
    """Score the F1 of the boxes of the answer against the right ones, paired by `match_boxes`: our own definition.

    A box that is named twice counts as found once. Where nothing is to be found, any answer without boxes is right.
    Parts: "precision", "recall", "f1", and the counts "matched", "found", "expected".
    """
    expected, size = boxes_of(reference), size_of(reference)
    named = boxes(text, scale)
    if named is None and (expected or final_answer(text) is None):
        return Score(0.0, None, {"expected": float(len(expected))})
    found = to_pixels(named or [], *size, scale=scale)
    matched = len(match_boxes(found, expected))
    counts = {"matched": matched, "found": len(found), "expected": len(expected)}
    parts = {**_rates(**counts), **counts}
    return Score(parts["f1"], [list(box) for box in found], {name: float(part) for name, part in parts.items()})


def aggregate_multi_box(scores: Scores) -> dict[str, float]:
    """F1 over all boxes of all items (micro) as "score", its "precision" and "recall"; "macro_f1": mean F1 of items."""
    macro = mean(scores)
    matched, found = (sum(score.parts.get(part, 0.0) for _, score in scores) for part in ("matched", "found"))
    rates = _rates(matched, found, sum(len(boxes_of(reference)) for reference, _ in scores))
    return {
        "score": rates["f1"],
        "precision": rates["precision"],
        "recall": rates["recall"],
        "macro_f1": macro["score"],
    }


def multi_box_terms(scores: Scores) -> tuple[float, float]:
    """`Metric.terms` of the micro F1: twice the boxes matched, and all that were found or expected."""
    matched, found = (sum(score.parts.get(part, 0.0) for _, score in scores) for part in ("matched", "found"))
    return 2 * matched, found + sum(len(boxes_of(reference)) for reference, _ in scores)


def _rates(matched: float, found: float, expected: float) -> dict[str, float]:
    """Precision, recall and F1; 1 where nothing was to be found and nothing was."""
    if not found and not expected:
        return {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    return {
        "precision": matched / found if found else 0.0,
        "recall": matched / expected if expected else 0.0,
        "f1": 2 * matched / (found + expected),
    }


_REFCOCO = (
    "Acc@0.5 of referring expressions; VLMEvalKit vlmeval/dataset/refcoco.py, lmms-eval tasks/refcoco/utils_rec.py"
)

_THOUSANDTHS = Metric("refcoco", refcoco, aggregate_refcoco, f"{_REFCOCO}; thousandths", BOX_FIELDS, "media")

METRICS = (
    _THOUSANDTHS,
    _THOUSANDTHS.variant(
        "refcoco-unit", f"{_REFCOCO}; fractions from 0 to 1, for which lmms-eval's prompt asks", scale="unit"
    ),
    _THOUSANDTHS.variant("refcoco-pixel", f"{_REFCOCO}; pixels", scale="pixel"),
    Metric(
        "refcoco-lmms",
        refcoco_lmms,
        aggregate_refcoco,
        "lmms-eval tasks/refcoco/utils_rec.py, ACC@0.5",
        BOX_FIELDS,
        "media",
    ),
    Metric(
        "refcoco-vlmevalkit",
        refcoco_vlmevalkit,
        aggregate_refcoco,
        "VLMEvalKit vlmeval/dataset/refcoco.py, which guesses the scale",
        BOX_FIELDS,
        "media",
    ),
    _THOUSANDTHS.variant("box_iou", "Acc@0.5 where an answer of several boxes is wrong", is_only=True),
    Metric(
        "multi_box",
        multi_box,
        aggregate_multi_box,
        "ours: greedy one-to-one matching by IoU >= 0.5; precision, recall and F1 over all boxes",
        BOX_FIELDS,
        "media",
        multi_box_terms,
    ),
)
