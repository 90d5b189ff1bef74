"""ChartQA and ChartQAPro: values worked out from their definitions."""

import random

import pytest

from eval.metrics import METRICS
from eval.metrics.metric import Score


def value(name, text, reference):
    return METRICS[name].score(text, reference).value


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("105", "100", 1), ("105.1", "100", 0), ("95", "100", 1), ("94.9", "100", 0), ("-10", "-10.4", 1),
        ("10", "-10", 0), ("0.5", "50%", 1), ("50%", "50", 0), ("52%", "50%", 1), ("Blue", "blue", 1),
        # As texts: a target of 0, and a number with a comma.
        ("0", "0", 1), ("0.0", "0", 0), ("1,000", "1000", 0), ("1,000", "1,000", 1), ("blue.", "blue", 0),
        ("<think>9</think><answer>It is <|begin_of_box|>104<|end_of_box|></answer>", "100", 1),
    ],
)  # fmt: skip
def test_relaxed_accuracy(text, answer, expected):
    assert value("relaxed_accuracy", text, {"answer": answer}) == expected


def test_relaxed_accuracy_allows_five_per_cent():
    rng = random.Random(0)
    for _ in range(1000):
        target, off = rng.choice([-1, 1]) * rng.uniform(0.01, 1e6), rng.uniform(-0.1, 0.1)
        if abs(abs(off) - 0.05) > 1e-6:
            expected = float(abs(off) < 0.05)
            assert value("relaxed_accuracy", repr(target * (1 + off)), {"answer": repr(target)}) == expected


def test_figures_of_questions_by_people_and_machines():
    rows = [("human_test", 1.0), ("human_test", 0.0), ("augmented_test", 1.0)]
    figures = METRICS["relaxed_accuracy"].aggregate([({"type": kind}, Score(of, "x")) for kind, of in rows])
    assert figures == {"score": pytest.approx(2 / 3), "type/augmented_test": 1.0, "type/human_test": 0.5}


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("104", {"answer": "100"}, 1), ("104%", {"answer": "100"}, 1),
        ("2004", {"answer": "2005", "year": ["NO"]}, 1), ("2004", {"answer": "2005", "year": ["YES"]}, 0),
        ("2005", {"answer": "2005", "year": "YES"}, 1),
        ("0", {"answer": "0"}, 1), ("0.1", {"answer": "0"}, 0),
        ("Blue.", {"answer": "blue"}, 1), ("abc", {"answer": "abcd"}, 0.75), ("ab", {"answer": "abcd"}, 0),
        ("[1, 'b']", {"answer": "[1, b]"}, 1), ("[1, b]", {"answer": "['1', 'b']"}, 1),
        ("1", {"answer": "[1, b]"}, 0.5), ("[1, b, c]", {"answer": "[1, b]"}, 2 / 3),
        ("[2004, 7]", {"answer": "[2005, 7]", "year": ["YES", "NO"]}, 0.5),
        ("[2004, 2005]", {"answer": "[2005, 2005]", "year": ["YES"]}, 0.5),
        ("2004", {"answer": "2005", "year": ["YES", "NO"], "type": "Conversational"}, 1),
        ("tru", {"answer": "true", "type": "Fact Checking"}, 0),
        ("True", {"answer": "true", "type": "Fact Checking"}, 1),
    ],
)  # fmt: skip
def test_chartqapro(text, reference, expected):
    assert value("chartqapro", text, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("tru", {"answer": "true", "type": "Fact Checking"}, 0.75),
        ("['1', 'b']", {"answer": "[1, b]"}, 1),
        # Not a list in Python's notation: one element against two.
        ("[1, b]", {"answer": "['1', 'b']"}, 0),
        ("['ab', 'c']", {"answer": "[a b, c]"}, 1),
    ],
)
def test_chartqapro_as_vlmevalkit_calls_it(text, reference, expected):
    assert value("chartqapro-vlmevalkit", text, reference) == pytest.approx(expected)
