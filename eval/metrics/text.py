"""Texts: equality, ANLS with either boundary, and character and word error rates.

Fields: "answer", or "answers", of which the best counts.
"""

from eval.metrics import levenshtein
from eval.metrics.metric import Metric, Reference, Score, Scores, answers_of, best_match, mean, mean_of
from eval.parse_answer import final_answer

THRESHOLD = 0.5


def folded(text: str) -> str:
    """Return a text without differences of case and whitespace."""
    return " ".join(text.split()).casefold()


def as_number(text: str) -> float | None:
    """Return the number that a whole text is in Python's notation; None where it is not one."""
    try:
        return float(text)
    except ValueError:
        return None


def exact_match(text: str, reference: Reference) -> Score:
    """Score 1 where the final answer is the right one but for case and whitespace; the latter may have tags and a box.

    >>> exact_match("<think>Six?</think><answer>Seven</answer>", {"answer": "seven"})
    Score(value=1.0, parsed='Seven', parts={})
    """
    return best_match(text, reference, lambda answer, one: folded(answer) == folded(final_answer(one) or one))


def anls_of(answer: str, expected: str, is_inclusive: bool = False, is_raw: bool = False) -> float:
    """Normalised Levenshtein similarity 1 - NL with its threshold; case and runs of whitespace do not count.

    Args:
        answer, expected: plain texts.
        is_inclusive: whether NL = 0.5 gives 0.5 (the harnesses, `anls_star`), or 0 (the formula, `anls`).
        is_raw: whether the distance is divided by the length in capitals with all whitespace (the harnesses: "ß" is
            two characters, "ﬁ" too), or by that of what is compared.
    """
    plain, other = (" ".join(string.lower().split()) for string in (answer, expected))
    length = max(len(answer.upper()), len(expected.upper())) if is_raw else max(len(plain), len(other))
    distance = levenshtein.distance(plain, other) / length if length else 0.0
    return 1 - distance if distance < THRESHOLD or (is_inclusive and distance == THRESHOLD) else 0.0


def anls(text: str, reference: Reference, is_inclusive: bool = False, is_raw: bool = False) -> Score:
    """Score the best `anls_of` over the right answers."""
    return best_match(text, reference, lambda answer, one: anls_of(answer, one, is_inclusive, is_raw))


def similarity(text: str, reference: Reference) -> Score:
    """Score 1 less Levenshtein distance by the longer length, without whitespace: the model's own reward for OCR."""
    return best_match(
        text,
        reference,
        lambda answer, one: levenshtein.normalized_similarity("".join(answer.split()), "".join(one.split())),
    )


def error_rate(text: str, reference: Reference, is_of_words: bool = False) -> Score:
    """Score 1 less the error rate, down to 0; the rate itself, which may be above 1, is among the parts.

    Case counts; runs of whitespace are one space. Of several right answers the one with the lowest rate counts. Parts:
    "error_rate", "edits", "length" of the right answer in characters or words.
    """
    expected = [_units(answer, is_of_words) for answer in answers_of(reference)]
    answer = final_answer(text)
    # An empty answer has deleted everything.
    units = _units(answer or "", is_of_words)
    edits, length = min(((levenshtein.distance(units, one), len(one)) for one in expected), key=_rate)
    rate = _rate((edits, length))
    parts = {"error_rate": rate, "edits": float(edits), "length": float(length)}
    return Score(0.0, None, parts) if answer is None else Score(max(0.0, 1 - rate), answer, parts)


def aggregate_error_rate(scores: Scores) -> dict[str, float]:
    """Return 1 less "error_rate", all edits by all lengths, as "score", down to 0; and the mean rate of items."""
    rate = _rate(_edits_and_length(scores))
    by_item = mean_of([score.parts.get("error_rate", 1.0) for _, score in scores])
    return {"score": max(0.0, 1 - rate), "error_rate": rate, "mean_error_rate": by_item}


def error_rate_terms(scores: Scores) -> tuple[float, float]:
    """`Metric.terms` of the rate over all: the length less the edits, which may be below 0, and the length."""
    edits, length = _edits_and_length(scores)
    return length - edits, length


def _edits_and_length(scores: Scores) -> tuple[float, float]:
    edits, length = (sum(score.parts.get(part, 0.0) for _, score in scores) for part in ("edits", "length"))
    return edits, length


def _units(text: str, is_of_words: bool) -> str | list[str]:
    words = text.split()
    return words if is_of_words else " ".join(words)


def _rate(edits_and_length: tuple[float, float]) -> float:
    edits, length = edits_and_length
    return edits / max(length, 1)


_SOURCE = "ANLS of ST-VQA (arXiv 1905.13648), DocVQA, InfoVQA"
_ANLS = Metric(
    "anls", anls, mean, f"{_SOURCE}; NL = 0.5 gives 0, as the formula and the package anls say", cluster="media"
)
_CER = Metric(
    "cer",
    error_rate,
    aggregate_error_rate,
    "character error rate, Levenshtein / len(reference)",
    terms=error_rate_terms,
)

METRICS = (
    Metric("exact_match", exact_match, mean, "equality but for case and whitespace"),
    _ANLS,
    _ANLS.variant("anls-inclusive", f"{_SOURCE}; NL = 0.5 gives 0.5, as the package anls_star says", is_inclusive=True),
    _ANLS.variant(
        "anls-harness",
        f"{_SOURCE}; NL = 0.5 gives 0.5, raw lengths: lmms-eval api/metrics.py, VLMEvalKit dataset/utils/vqa_eval.py",
        is_inclusive=True,
        is_raw=True,
    ),
    _CER,
    _CER.variant("wer", "word error rate, Levenshtein over words / number of words of the reference", is_of_words=True),
    Metric("ocr_similarity", similarity, mean, "rule part of the OCR verifier of the model's reward system, no bounds"),
)
