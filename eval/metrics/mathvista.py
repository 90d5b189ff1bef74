"""MathVista: equality after normalisation to the kind of answer that is asked for.

Fields: "answer", the text of the right option, or a number or list as text; "type" ("multi_choice" or "free_form"),
"options" {letter: text} or list of texts; "answer_type" ("integer", "float", "list", "text"), "precision" (decimals of
a float); "task", "skills" for the figures by them.

The official pipeline has a language model extract the answer (evaluation/extract_answer.py); this model puts it in a
box, which `eval.parse_answer` reads.
"""

import functools
import math
import re

from eval.metrics import levenshtein
from eval.metrics.metric import (
    UNPARSED,
    Metric,
    Reference,
    Score,
    Scores,
    is_choice,
    mean,
    mean_by,
    options_of,
    required,
)
from eval.metrics.text import as_number, folded
from eval.parse_answer import choice, final_answer, number
from glm4v_jax.errors import DataError

_BRACKETED = re.compile(r"\(([a-zA-Z])\)")
_LONGEST = 10_000


def mathvista(text: str, reference: Reference, is_official: bool = False) -> Score:
    """Score 1 where the normalised answer is the right one.

    Multiple choice: the text of the option. Integers and floats: as texts, an integer truncated, a float rounded to the
    item's precision, so that "3.0" is 3. Others: as texts but for case and whitespace.

    `is_official`: numbers have to stand alone, texts are equal to the letter, and an answer that names no option is
    taken for the one most similar to it by Levenshtein distance, as evaluation/calculate_score.py does. Else a number
    may have its unit, and what names no option is unparsed.
    """
    gold = str(required(reference, "answer"))
    kind = reference.get("answer_type", "text")
    if is_choice(reference, "multi_choice"):
        options = options_of(reference)
        chosen = _similar_option(text, options) if is_official else _option(text, options)
        return UNPARSED if chosen is None else Score(float(chosen.strip() == gold.strip()), chosen)
    decimals = _decimals(reference) if kind == "float" else None
    answer = final_answer(text)
    if answer is None:
        return UNPARSED
    if kind not in ("integer", "float"):
        is_equal = answer == gold.strip() if is_official else folded(answer) == folded(gold)
        return Score(float(is_equal), answer)
    value = _float(answer) if is_official else number(text)
    if value is None:
        return UNPARSED
    written = _written(value, decimals)
    expected = None if is_official else _float(gold)
    return Score(float(written in (gold.strip(), None if expected is None else _written(expected, decimals))), written)


def _option(text: str, options: dict[str, str]) -> str | None:
    letter = choice(text, options)
    return None if letter is None else options[letter]


def _similar_option(text: str, options: dict[str, str]) -> str | None:
    answer = final_answer(text)
    if answer is None:
        return None
    match = _BRACKETED.search(answer)
    letter = match[1].upper() if match else answer
    if letter in options:
        return options[letter]
    return min(options.values(), key=functools.partial(levenshtein.distance, letter[:_LONGEST]))


def _float(text: str) -> float | None:
    value = as_number(text)
    return value if value is not None and math.isfinite(value) else None


def _decimals(reference: Reference) -> int:
    found = required(reference, "precision")
    try:
        return int(found)
    except (TypeError, ValueError):
        raise DataError(f"precision: found {found!r}; expected a number of decimals") from None


def _written(value: float, decimals: int | None) -> str:
    return str(int(value)) if decimals is None else str(round(value, decimals))


def aggregate_mathvista(scores: Scores) -> dict[str, float]:
    """Return the mean as "score"; then by "task" and by each of the "skills"."""
    figures = mean_by(task="task")(scores)
    for skill in sorted({str(skill) for reference, _ in scores for skill in reference.get("skills") or ()}):
        having = [pair for pair in scores if skill in (pair[0].get("skills") or ())]
        figures[f"skill/{skill}"] = mean(having)["score"]
    return figures


_SOURCE = "MathVista (arXiv 2310.02255), evaluation/calculate_score.py"

_MATHVISTA = Metric(
    "mathvista", mathvista, aggregate_mathvista, f"{_SOURCE}; the answer from the box, no nearest option"
)

METRICS = (
    _MATHVISTA,
    _MATHVISTA.variant("mathvista-official", f"{_SOURCE}; the nearest option where none is named", is_official=True),
)
