"""VQA accuracy: values worked out from its definition, and the quirks of its normalisation."""

import pytest

from eval.metrics import METRICS
from eval.metrics.vqa import normalized


def value(name, text, answers):
    return METRICS[name].score(text, {"answers": answers}).value


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_answers_are_left_out_one_at_a_time(matches, expected):
    # With m equal answers of ten: m times min(1, (m - 1) / 3) and 10 - m times min(1, m / 3), by ten.
    answers = ["cat"] * matches + [f"dog {index}" for index in range(10 - matches)]
    assert value("vqa_accuracy", "Cat", answers) == pytest.approx(expected)


@pytest.mark.parametrize(("answers", "expected"), [(["cat"], 1), (["dog", "cat", "cat"], 1), (["dog"], 0)])
def test_one_equal_answer_of_few_is_enough(answers, expected):
    assert value("vqa_accuracy", "the cat", answers) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Dog", "dog"), ("two dogs", "2 dogs"), ("none", "0"), ("dont", "don't"), ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"), ("red/blue", "red blue"), ("red, blue", "red blue"), ("x-rays", "x rays"),
        ("1,000 x-rays", "1000 xrays"), ("3.5", "3.5"), ("U.S.A.", "usa"),
        ("5.", "5"),  # the misspelt lookbehind
        ("." * 33, "."),  # the count that is a flag: the 33rd full stop stays
        ("dog's, cat?", "dog's cat"),
    ],
)  # fmt: skip
def test_normalisation(text, expected):
    assert normalized(text) == expected


def test_harnesses_normalise_in_other_ways():
    assert normalized("5.", is_repaired=True) == "5."
    assert normalized("dog's, cat?", is_eval_ai=True) == "dog 's cat"
    ten = ["5"] * 10
    assert value("vqa_accuracy", "5.", ten) == 1
    assert value("vqa_accuracy-vlmevalkit", "5.", ten) == 0
    assert value("vqa_accuracy-lmms", "5?", ten) == 1
