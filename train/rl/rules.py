"""What the verifiers compare, by kind: (answer, reference, options) -> score. The answer is the content of the box.

Every rule reads the reference first, and raises `DataError` where it is invalid; none raises for an answer. What cannot
be read has `parsed` None. The fields of references are those of `eval.metrics`:

- "answer", or "answers" of which the best counts: all kinds but grounding. Of `gui` an action: a call, or an object in
  JSON, with places in thousandths.
- "boxes", "width", "height": of grounding, and of the element that an action of `gui` is on.
- "options": of choice, where answers may have the text of an option.
"""

import math as mathematics
import re
from collections.abc import Callable, Mapping

from eval.metrics import Reference, Score, levenshtein
from eval.metrics.boxes import match_boxes
from eval.metrics.charts import is_relaxed_equal
from eval.metrics.metric import UNPARSED, answers_of, boxes_of, letter_of, options_of, size_of
from eval.metrics.text import as_number, folded
from eval.metrics.vqa import normalized
from eval.parse_answer import FULL_WIDTH, LONGEST_NUMBER, to_pixels
from glm4v_jax.generate.text.boxes import SCALE, find_boxes
from train.rl.actions import action_score, reference_action
from train.rl.config import DEFAULTS, Kind, VerifierConfig

Rule = Callable[[str, Reference, VerifierConfig], Score]

_MOST_BOXES = 300
_YEARS = range(1000, 3001)
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")

_DECORATION = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;:! ()\[\]]|\\(?:displaystyle|quad)(?![a-z])|\$|\s+")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm)\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\{?\\circ\}?|°")
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"([-+]?)(?:\\frac\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}|({_DECIMAL})(?:/({_DECIMAL}))?)"
    r"(?:[eE]([-+]?[0-9]{1,3})|(?:\\times|\\cdot|\*|×)10\^\{?([-+]?[0-9]{1,3})\}?)?(%?)"
)


def plain_math(text: str) -> str:
    r"""Return a formula without what does not change its meaning: spaces, `$`, `\left`, `\text{}`, degrees.

    >>> plain_math(r"$\left(1,\ \dfrac{1}{2}\right)$")
    '(1,\\frac{1}{2})'
    """
    text = text.translate({**FULL_WIDTH, 0x2212: "-"}).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _DEGREES.sub("", _DECORATION.sub("", _TEXT.sub(r"\1", text)).replace("\\%", "%"))
    return text.rstrip(".")


def number_at_start(text: str) -> tuple[float, str] | None:
    r"""Return the number that a plain formula begins with, and what follows it; None where there is none.

    >>> number_at_start(r"\frac{3}{4}"), number_at_start("1,250km"), number_at_start("50%"), number_at_start("x")
    ((0.75, ''), (1250.0, 'km'), (0.5, ''), None)
    """
    match = _NUMBER.match(text[:LONGEST_NUMBER])
    if match is None:
        return None
    sign, above, below, whole, divisor, exponent, power, percent = match.groups()
    over = float((below or divisor or "1").replace(",", ""))
    value = float(f"{sign}{(above or whole).replace(',', '')}e{exponent or power or 0}")
    if not over or not mathematics.isfinite(value / over):
        return None
    return value / over / (100 if percent else 1), text[match.end() :]


def math(answer: str, item: Reference, config: VerifierConfig) -> Score:
    """Score 1 where formulas are the same text, or both are numbers that differ by less than the tolerance."""
    expected = [plain_math(one) for one in answers_of(item)]
    found = plain_math(answer)
    if not found:
        return UNPARSED
    return Score(float(any(_is_equal(found, one, config) for one in expected)), found)


def _is_equal(found: str, expected: str, config: VerifierConfig) -> bool:
    if found == expected:
        return True
    first, second = number_at_start(found), number_at_start(expected)
    if first is None or second is None or first[1] or second[1]:
        return False
    return _is_near(first[0], second[0], config)


def _is_near(found: float, expected: float, config: VerifierConfig) -> bool:
    return abs(found - expected) / (abs(expected) + 1e-6) < tolerance_of(config)


def tolerance_of(config: VerifierConfig) -> float:
    """Return the tolerance of a verifier: its own, or that of its kind."""
    return DEFAULTS[config.kind] if config.tolerance is None else config.tolerance


def units(answer: str, item: Reference, config: VerifierConfig) -> Score:
    """Score as `math` without units; numbers with the same unit by the tolerance; other units cannot be compared."""
    expected = [plain_math(one) for one in answers_of(item)]
    found = plain_math(answer)
    if not found or found in expected:
        return Score(float(bool(found)), found) if found else UNPARSED
    first = number_at_start(found)
    for one in expected:
        second = number_at_start(one)
        if first and second and first[1] == second[1] and _is_near(first[0], second[0], config):
            return Score(1.0, found)
    is_comparable = first is not None and any((number_at_start(one) or (0, None))[1] == first[1] for one in expected)
    return Score(0.0, found) if is_comparable else UNPARSED


def chart(answer: str, item: Reference, config: VerifierConfig) -> Score:
    """Score 1 where `is_relaxed_equal` to a right answer; two years, integers from 1000 to 3000, have to be equal.

    Thousands commas and dollar signs do not count.
    """
    expected = answers_of(item)
    found = _plain_number(answer)
    return Score(float(any(_is_chart_equal(answer, one, tolerance_of(config)) for one in expected)), found)


def _plain_number(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    bare = text.replace("$", "").replace(",", "").strip()
    return bare if as_number(bare.rstrip("%")) is not None else text


def _is_chart_equal(found: str, expected: str, tolerance: float) -> bool:
    first, second = _integer(found.strip()), _integer(expected.strip())
    if first in _YEARS and second in _YEARS:
        return first == second
    found, expected = _plain_number(found), _plain_number(expected)
    return is_relaxed_equal(found, expected, tolerance) or (as_number(found) == 0 and as_number(expected) == 0)


def _integer(text: str) -> int | None:
    return int(text) if _INTEGER.fullmatch(text) else None


def counting(answer: str, item: Reference, config: VerifierConfig) -> Score:
    """Score 1 where texts are equal but for case and whitespace, or both are the same integer."""
    del config
    expected = [folded(one) for one in answers_of(item)]
    found = folded(answer.translate(FULL_WIDTH)).rstrip(".")
    is_same = any(
        found == one or (_integer(found) is not None and _integer(found) == _integer(one)) for one in expected
    )
    return Score(float(is_same), found)


def ocr(answer: str, item: Reference, config: VerifierConfig) -> Score:
    """Score 1 less Levenshtein distance by the longer length, without whitespace."""
    del config
    expected = ["".join(one.split()) for one in answers_of(item)]
    found = "".join(answer.split())
    return Score(max(levenshtein.normalized_similarity(found, one) for one in expected), answer)


def vqa(answer: str, item: Reference, config: VerifierConfig) -> Score:
    """Score 1 where texts are equal, as they are or normalised as in VQA accuracy."""
    del config
    expected = [(folded(one), normalized(one)) for one in answers_of(item)]
    found = (folded(answer), normalized(answer))
    # An article alone is normalised to nothing.
    return Score(float(any(found[0] == one[0] or (found[1] and found[1] == one[1]) for one in expected)), found[0])


def grounding(answer: str, item: Reference, config: VerifierConfig) -> Score:
    """Score the boxes found, paired one to one by IoU, by the larger number of those named and those to be found."""
    expected, size = boxes_of(item), size_of(item)
    named = find_boxes(answer)
    if not named and expected:
        return UNPARSED
    if len(named) > _MOST_BOXES:
        return Score(0.0, len(named))
    found = to_pixels(named, *size)
    least = 0.5 if config.threshold is None else config.threshold
    most = max(len(found), len(expected))
    return Score(len(match_boxes(found, expected, least)) / most if most else 1.0, [list(box) for box in found])


def gui(answer: str, item: Reference, config: VerifierConfig) -> Score:
    """Score an action, see `train.rl.actions`."""
    return action_score(answer, item, tolerance_of(config))


def choice(answer: str, item: Reference, config: VerifierConfig) -> Score:
    """Score 1 for the right letter, with or without the text of its option, and nothing else in the box."""
    del config
    options = options_of(item) if item.get("options") else {}
    expected = letter_of(item, options) if options else answers_of(item)[0].strip()
    match = re.fullmatch(r"[\s(\[*$]*([A-Za-z])[\s)\].:*$]*(.*)", answer, re.DOTALL)
    by_text = {folded(text): letter for letter, text in options.items()}
    letter = match[1].upper() if match else None
    if match and match[2] and by_text.get(folded(match[2])) != letter:
        letter = None
    letter = letter or by_text.get(folded(answer))
    return UNPARSED if letter is None else Score(float(letter == expected.upper()), letter)


RULES: Mapping[Kind, Rule] = {
    "math": math,
    "units": units,
    "chart": chart,
    "counting": counting,
    "ocr": ocr,
    "vqa": vqa,
    "grounding": grounding,
    "gui": gui,
    "choice": choice,
    "video": vqa,
}

GRADED: frozenset[Kind] = frozenset({"ocr", "grounding", "gui"})
"""Kinds whose wrong answers may have a part of the reward."""


def reference_answer(kind: Kind, item: Reference) -> str:
    """Return the right answer as a model would write it into its box."""
    if kind == "gui":
        return reference_action(item)
    if kind != "grounding":
        return answers_of(item)[0]
    size = size_of(item)
    thousandths = [
        [round(value / size[axis % 2] * SCALE, 3) for axis, value in enumerate(box)] for box in boxes_of(item)
    ]
    return str(thousandths)
