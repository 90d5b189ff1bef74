"""OCRBench: values worked out from its definition."""

import pytest

from eval.metrics import METRICS
from eval.metrics.metric import Score


@pytest.mark.parametrize(
    ("name", "text", "reference", "expected"),
    [
        ("ocrbench", "It says STOP\nHERE.", {"answer": "stop here"}, 1),
        ("ocrbench", "no", {"answers": ["a", "No"]}, 1),
        ("ocrbench", "sto p", {"answer": "stop"}, 0),
        ("ocrbench", "<think>stop</think>go", {"answer": "stop"}, 0),
        ("ocrbench", "<answer>STOP <|begin_of_box|>sign<|end_of_box|></answer>", {"answer": "stop"}, 1),
        ("ocrbench", "x ^ 2\n+ Y", {"answer": "x^2+Y", "dataset": "HME100k"}, 1),
        ("ocrbench", "x^2+y", {"answer": "x^2+Y", "type": "Handwritten Mathematical Expression Recognition"}, 0),
        ("ocrbench", "ＡＢ１", {"answer": "ab1"}, 0),
        ("ocrbench-lmms", "ＡＢ１", {"answer": "ab1"}, 1),
    ],
)
def test_the_answer_contains_the_right_text(name, text, reference, expected):
    assert METRICS[name].score(text, reference).value == expected


def test_figures_by_group_and_type():
    rows = [("Regular Text Recognition", 1.0), ("Handwriting Recognition", 0.0), ("Doc-oriented VQA", 1.0)]
    figures = METRICS["ocrbench"].aggregate([({"type": kind}, Score(of, "x")) for kind, of in rows])
    assert figures["score"] == pytest.approx(2 / 3) and figures["points"] == 2
    assert figures["group/Text Recognition"] == 0.5 and figures["group/Doc-oriented VQA"] == 1
    assert figures["type/Handwriting Recognition"] == 0
