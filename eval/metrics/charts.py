"""Charts: relaxed accuracy of ChartQA and ChartQAPro.

Fields: "answer", or "answers" of which the best counts; ChartQA: "type" ("human_test", "augmented_test"); ChartQAPro:
"answer" a text or "[a, b]", "year" "YES" or "NO", or a list of them, one an element; "type" ("Factoid", "Multi Choice",
"Conversational", "Fact Checking", "Hypothetical").
"""

import ast
import math
import re
import warnings

from eval.metrics.metric import UNPARSED, Metric, Reference, Score, answers_of, best_match, mean_by
from eval.metrics.text import anls_of, as_number
from eval.parse_answer import final_answer

TOLERANCE = 0.05

_EXACT_TYPES = ("Fact Checking", "Multi Choice")
_LONGEST_LIST = 10_000
_WORD = re.compile(r"(?<!['\w])\w['\w]*+")


def is_relaxed_equal(answer: str, target: str, tolerance: float = TOLERANCE) -> bool:
    """Compare two texts by ChartQA's rule (arXiv 2203.10244, section 5.1; pix2struct/metrics.py).

    A number may be off by 5 % of the target, or another `tolerance`, and a per cent sign divides by 100; texts are
    equal but for case. As in all harnesses a target of 0 is compared as text, and "1,000" is not a number.

    >>> is_relaxed_equal("104", "100"), is_relaxed_equal("106", "100")
    (True, False)
    """
    value, expected = _percent(answer), _percent(target)
    if value is not None and expected:
        return abs(value - expected) / abs(expected) <= tolerance
    return answer.lower() == target.lower()


def _percent(text: str) -> float | None:
    is_percent = text.endswith("%")
    value = as_number(text.rstrip("%") if is_percent else text)
    return value / 100 if is_percent and value is not None else value


def relaxed_accuracy(text: str, reference: Reference) -> Score:
    """Score 1 where the final answer `is_relaxed_equal` to a right one."""
    return best_match(text, reference, is_relaxed_equal)


def chartqapro(text: str, reference: Reference, is_exact: bool = True, is_literal: bool = False) -> Score:
    """Score the mean over the elements of the longer of two lists; one that the other lacks gives 0.

    An element that is a year has to be equal; two numbers may differ by 5 % of the target (0 only equals 0), without
    their per cent signs; else ANLS with the strict boundary, lower case.

    Args:
        text: all that was generated.
        reference: of the item.
        is_exact: whether fact checking and multiple choice have to be equal, as the paper says (arXiv 2504.05506).
            VLMEvalKit's call leaves that out.
        is_literal: whether only what Python reads as a list is one, as in VLMEvalKit, which first puts quotation marks
            around every word of a target: "[a b, c]" is "ab" and "c". Else anything in square brackets is.
    """
    target = answers_of(reference)[0].strip(".").strip("\n")
    answer = final_answer(text)
    if answer is None:
        return UNPARSED
    given = answer.strip(".").strip("\n")
    if is_literal:
        expected = _literal_elements(_quoted(target)) or _literal_elements(target) or [target]
        found = _literal_elements(given) or [given]
    else:
        expected, found = _elements(target), _elements(given)
    years = _years(reference, len(expected))
    must_equal = is_exact and reference.get("type") in _EXACT_TYPES
    values = [
        _element_score(one, other, is_year or must_equal)
        for one, other, is_year in zip(expected, found, years, strict=False)
    ]
    return Score(math.fsum(values) / max(len(expected), len(found)), found)


def _years(reference: Reference, count: int) -> list[bool]:
    flags = reference.get("year")
    if flags is None:
        flags = ["NO"]
    elif isinstance(flags, str):
        flags = [flags]
    if reference.get("type") == "Conversational":
        flags = flags[-1:]
    flags = list(flags) or ["NO"]
    if len(flags) < count:
        flags = flags * count
    return [str(flag).upper() == "YES" for flag in flags[:count]]


def _element_score(target: str, answer: str, is_exact: bool) -> float:
    if is_exact:
        return float(target.strip().lower() == answer.strip().lower())
    target, answer = (element.strip().strip("%").strip() for element in (target, answer))
    expected, value = as_number(target), as_number(answer)
    if expected is not None and value is not None:
        if expected == 0:
            return float(value == 0)
        return float(abs(value - expected) / abs(expected) <= TOLERANCE)
    return anls_of(answer, target)


def _elements(text: str) -> list[str]:
    """The elements of "[a, 'b, c']", without their quotes; else the text as the only one."""
    inner = text.strip()
    if not (inner.startswith("[") and inner.endswith("]") and len(inner) > 2):
        return [text]
    elements, quote = [""], ""
    for character in inner[1:-1]:
        # An apostrophe within a word is not a quotation mark.
        if quote and character == quote:
            quote = ""
        elif not quote and character in "'\"" and not elements[-1].strip():
            quote = character
        elif not quote and character == ",":
            elements.append("")
        else:
            elements[-1] += character
    return [element.strip(" '\"") for element in elements]


def _quoted(text: str) -> str:
    inner = text.strip()
    return _WORD.sub(r"'\g<0>'", inner) if inner.startswith("[") and inner.endswith("]") else text


def _literal_elements(text: str) -> list[str]:
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            # Reads literals and runs nothing; bounded because nesting takes stack and memory.
            found = ast.literal_eval(text) if len(text) <= _LONGEST_LIST else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = None
    return [str(element).strip(" '") for element in found] if isinstance(found, list) else []


_CHARTQAPRO = "ChartQAPro (arXiv 2504.05506); VLMEvalKit vlmeval/dataset/utils/chartqapro.py"

_PRO = Metric(
    "chartqapro", chartqapro, mean_by(type="type"), f"{_CHARTQAPRO}; exact where the paper says so", cluster="media"
)

METRICS = (
    Metric(
        "relaxed_accuracy",
        relaxed_accuracy,
        mean_by(type="type"),
        "ChartQA (arXiv 2203.10244, 5.1); pix2struct/metrics.py; the same in lmms-eval and VLMEvalKit",
        cluster="media",
    ),
    _PRO,
    _PRO.variant(
        "chartqapro-vlmevalkit",
        f"{_CHARTQAPRO} as it is called: never exact but for years",
        is_exact=False,
        is_literal=True,
    ),
)
