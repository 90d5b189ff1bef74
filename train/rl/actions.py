"""Actions of an agent, and how near one is to another: its name, times each argument, times where it is.

An action is a call, `do(action="Tap", element=[500, 120])` or `left_click(start_box='[500,120]')`; or an object in JSON
or Python, `{"action_type": "CLICK", "box_2d": [[480, 100, 520, 140]]}`. They are read as literals and never evaluated.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from eval.metrics import Reference, Score, levenshtein
from eval.metrics.boxes import iou
from eval.metrics.metric import UNPARSED, only_box_of, required, size_of
from eval.metrics.text import folded
from glm4v_jax.errors import DataError
from glm4v_jax.generate.text.actions import find_action
from glm4v_jax.generate.text.boxes import SCALE

Place = tuple[float, ...]
"""(x, y) or (x1, y1, x2, y2), in thousandths."""

_LONGEST = 4000
_TEXTS = frozenset({"text", "message", "content", "query", "value"})
"""Arguments that are texts somebody types, of which a part may be right."""
_FENCE = re.compile(r"\s*```(?:json|python)?\s*(.*?)\s*```\s*", re.DOTALL)


def read_action(text: str) -> dict[str, Any] | None:
    """Return the arguments of an action, its name among them as ""; None where a text is none.

    >>> read_action("left_click(start_box='[500,120]')")
    {'': 'left_click', 'start_box': '[500,120]'}
    """
    if (fenced := _FENCE.fullmatch(text)) is not None:
        text = fenced[1]
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        return _read(text)


def _read(text: str) -> dict[str, Any] | None:
    if (action := find_action(text)) is not None:
        return {"": action.name, **action.arguments}
    try:
        if text.startswith("{"):
            found = _literal(text)
            return {str(key): value for key, value in found.items()} if isinstance(found, dict) and found else None
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
            return None
        arguments = {str(number): ast.literal_eval(one) for number, one in enumerate(call.args)}
        arguments |= {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
        return {"": ast.unparse(call.func), **arguments}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def reference_action(item: Reference) -> str:
    """Return the right action as text."""
    answer = required(item, "answer")
    return json.dumps(answer) if isinstance(answer, Mapping) else str(answer)


def action_score(answer: str, item: Reference, tolerance: float) -> Score:
    """Score an action against the right one.

    The product over all arguments, which have to have the same names: 1 for what is equal; of texts that are typed the
    longest common subsequence by the longer length; of two boxes their IoU; 1 for a point in the right box, or within
    `tolerance` of the right point, as a fraction of the screen. With "boxes", "width" and "height" the box in pixels
    stands for the only place of the right action.
    """
    expected = read_action(reference_action(item))
    if expected is None:
        raise DataError(f"answer: found {reference_action(item)!r}; expected an action, a call or an object")
    element = _element(item)
    found = read_action(answer)
    if found is None:
        return UNPARSED
    if found.keys() != expected.keys():
        return Score(0.0, answer)
    value = 1.0
    for name, right in expected.items():
        value *= _argument_score(name, found[name], right, element, tolerance)
    return Score(value, answer)


def _element(item: Reference) -> Place | None:
    if item.get("boxes") is None:
        return None
    size = size_of(item)
    return tuple(value / size[axis % 2] * SCALE for axis, value in enumerate(only_box_of(item)))


def _argument_score(name: str, found: Any, right: Any, element: Place | None, tolerance: float) -> float:
    place, target = _place(found), _place(right)
    if target is not None:
        return 0.0 if place is None else _place_score(place, element or target, tolerance)
    if isinstance(found, str) and isinstance(right, str):
        if folded(found) == folded(right):
            return 1.0
        return levenshtein.common_subsequence(found, right) if name.lower() in _TEXTS else 0.0
    return float(type(found) is type(right) and found == right)


def _place(value: Any) -> Place | None:
    """Return a place: two or four numbers of a size that places have, in a list, in a list of it, or in a text."""
    if isinstance(value, str) and value[:1] in "[(" and len(value) < 100:
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return None
    if isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], list | tuple):
        value = value[0]
    if not isinstance(value, list | tuple) or len(value) not in (2, 4):
        return None
    if not all(type(one) in (int, float) and -2 * SCALE <= one <= 2 * SCALE for one in value):
        return None
    return tuple(float(one) for one in value)


def _place_score(place: Place, target: Place, tolerance: float) -> float:
    if len(place) == 4 and len(target) == 4:
        return 1.0 if place == target else iou(place, target)
    x, y = _centre(place)
    if len(target) == 4:
        return float(target[0] <= x <= target[2] and target[1] <= y <= target[3])
    return float(((x - target[0]) ** 2 + (y - target[1]) ** 2) ** 0.5 <= tolerance * SCALE)


def _centre(place: Place) -> tuple[float, float]:
    return (place[0], place[1]) if len(place) == 2 else ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
