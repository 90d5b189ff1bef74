"""Texts: equality, ANLS with either boundary, and character and word error rates.

Fields: "answer", or "answers", of which the best counts.
"""

import functools

from rapidfuzz.distance import Levenshtein

from eval.metrics.metric import UNPARSED, Item, Metric, Score, Scores, answers_of, mean, mean_of
from eval.parse_answer import final_answer

THRESHOLD = 0.5


def folded(text: str) -> str:
    """What `exact_match` compares: without differences of case and whitespace."""
    return " ".join(text.split()).casefold()


def exact_match(text: str, item: Item) -> Score:
    """1 where the final answer is that of the item but for case and whitespace; the item's may have tags and a box.

    Raises:
        DataError: the item has no answer.
    """
    gold = [folded(final_answer(answer) or answer) for answer in answers_of(item)]
    answer = final_answer(text)
    return UNPARSED if answer is None else Score(float(folded(answer) in gold), answer)


def anls_of(answer: str, gold: str, is_inclusive: bool = False, is_raw: bool = False) -> float:
    """Normalised Levenshtein similarity 1 - NL with its threshold; case and runs of whitespace do not count.

    Args:
        answer, gold: plain texts.
        is_inclusive: whether NL = 0.5 gives 0.5 (the harnesses, `anls_star`), or 0 (the formula, `anls`).
        is_raw: whether the distance is divided by the length with all whitespace (the harnesses), or without.
    """
    plain, expected = (" ".join(string.lower().split()) for string in (answer, gold))
    length = max(len(answer), len(gold)) if is_raw else max(len(plain), len(expected))
    distance = Levenshtein.distance(plain, expected) / length if length else 0.0
    return 1 - distance if distance < THRESHOLD or (is_inclusive and distance == THRESHOLD) else 0.0


def anls(text: str, item: Item, is_inclusive: bool = False, is_raw: bool = False) -> Score:
    """The best `anls_of` over the item's answers.

    Raises:
        DataError: the item has no answer.
    """
    gold = answers_of(item)
    answer = final_answer(text)
    if answer is None:
        return UNPARSED
    return Score(max(anls_of(answer, expected, is_inclusive, is_raw) for expected in gold), answer)


def error_rate(text: str, item: Item, is_of_words: bool = False) -> Score:
    """1 less the error rate, down to 0; the rate itself is among the parts, which may be above 1.

    Case counts; runs of whitespace are one space. Of several references the one with the lowest rate counts. Parts:
    "error_rate", "edits", "length" of the reference in characters or words.

    Raises:
        DataError: the item has no answer.
    """
    references = [_units(answer, is_of_words) for answer in answers_of(item)]
    answer = final_answer(text)
    # What says nothing has deleted all there is.
    units = _units(answer or "", is_of_words)
    measured = [(Levenshtein.distance(units, reference), len(reference)) for reference in references]
    edits, length = min(measured, key=_rate)
    rate = _rate((edits, length))
    parts = {"error_rate": rate, "edits": float(edits), "length": float(length)}
    return Score(0.0, None, parts) if answer is None else Score(max(0.0, 1 - rate), answer, parts)


def aggregate_error_rate(scores: Scores) -> dict[str, float]:
    """1 less "error_rate", all edits by the length of all references, as "score", down to 0; the mean rate of items."""
    edits, length = (sum(score.parts.get(part, 0.0) for _, score in scores) for part in ("edits", "length"))
    rate = _rate((edits, length))
    by_item = mean_of([score.parts.get("error_rate", 1.0) for _, score in scores])
    return {
        "score": max(0.0, 1 - rate),
        "error_rate": rate,
        "mean_error_rate": by_item,
    }


def error_rate_terms(scores: Scores) -> tuple[float, float]:
    """`Metric.terms` of the rate over all: the length without the edits, which may be below 0, and the length."""
    edits, length = (sum(score.parts.get(part, 0.0) for _, score in scores) for part in ("edits", "length"))
    return length - edits, length


def similarity(text: str, item: Item) -> Score:
    """1 less the Levenshtein distance by the longer length, without whitespace: the model's own reward for OCR.

    Raises:
        DataError: the item has no answer.
    """
    gold = ["".join(answer.split()) for answer in answers_of(item)]
    answer = final_answer(text)
    if answer is None:
        return UNPARSED
    plain = "".join(answer.split())
    return Score(max(Levenshtein.normalized_similarity(plain, expected) for expected in gold), answer)


def _units(text: str, is_of_words: bool) -> str | list[str]:
    words = text.split()
    return words if is_of_words else " ".join(words)


def _rate(edits_and_length: tuple[float, float]) -> float:
    edits, length = edits_and_length
    return edits / max(length, 1)


_ANLS = "ANLS of ST-VQA (arXiv 1905.13648), DocVQA, InfoVQA"

METRICS = (
    Metric("exact_match", exact_match, mean, "equality but for case and whitespace"),
    Metric("anls", anls, mean, f"{_ANLS}; NL = 0.5 gives 0, as the formula and the package anls say", cluster="media"),
    Metric(
        "anls-inclusive",
        functools.partial(anls, is_inclusive=True),
        mean,
        f"{_ANLS}; NL = 0.5 gives 0.5, as the package anls_star says",
        cluster="media",
    ),
    Metric(
        "anls-harness",
        functools.partial(anls, is_inclusive=True, is_raw=True),
        mean,
        f"{_ANLS}; NL = 0.5 gives 0.5 and raw lengths: lmms-eval api/metrics.py, VLMEvalKit dataset/utils/vqa_eval.py",
        cluster="media",
    ),
    Metric(
        "cer",
        error_rate,
        aggregate_error_rate,
        "character error rate, Levenshtein / len(reference)",
        terms=error_rate_terms,
    ),
    Metric(
        "wer",
        functools.partial(error_rate, is_of_words=True),
        aggregate_error_rate,
        "word error rate, Levenshtein over words / number of words of the reference",
        terms=error_rate_terms,
    ),
    Metric("ocr_similarity", similarity, mean, "rule part of the OCR verifier of the model's reward system, no bounds"),
)
