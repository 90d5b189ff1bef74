"""Edit distances, by rapidfuzz: imported with the first use, so that help of commands does not need it."""

from collections.abc import Sequence


def distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the number of insertions, deletions and substitutions that make one of the other."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(first, second)


def normalized_similarity(first: Sequence[str], second: Sequence[str]) -> float:
    """Return 1 less the distance by the longer length."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(first, second)


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the length of the longest common subsequence by the longer length; 1 where both are empty."""
    from rapidfuzz.distance import LCSseq

    return LCSseq.normalized_similarity(first, second)
