"""Levenshtein's distance, by rapidfuzz: imported with the first use, so that help of commands does not need it."""

from collections.abc import Sequence


def distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the number of insertions, deletions and substitutions that make one of the other."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(first, second)


def normalized_similarity(first: Sequence[str], second: Sequence[str]) -> float:
    """Return 1 less the distance by the longer length."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(first, second)
