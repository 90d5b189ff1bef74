"""MathVista: values worked out from its definition."""

import pytest

from eval.metrics import METRICS
from eval.metrics.metric import Score
from glm4v_jax.errors import DataError

INTEGER = {"answer": "3", "answer_type": "integer", "type": "free_form"}
FLOAT = {"answer": "1.2", "answer_type": "float", "precision": 1.0, "type": "free_form"}
CHOICE = {"answer": "1/2", "options": ["1/3", "1/2"], "type": "multi_choice", "answer_type": "text"}


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("3", INTEGER, 1), ("3.9", INTEGER, 1), ("<|begin_of_box|>3 apples<|end_of_box|>", INTEGER, 1),
        ("4", INTEGER, 0), ("1.23", FLOAT, 1), ("1.2 m", FLOAT, 1), ("1.26", FLOAT, 0),
        ("1", FLOAT | {"answer": "1.00", "precision": 2}, 1), ("(B) 1/2", CHOICE, 1), ("1/2", CHOICE, 1),
        ("A", CHOICE, 0), ("[1, 2]", {"answer": "[1, 2]", "answer_type": "list"}, 1), ("Yes", {"answer": "yes"}, 1),
    ],
)  # fmt: skip
def test_values(text, reference, expected):
    assert METRICS["mathvista"].score(text, reference).value == expected


@pytest.mark.parametrize(
    ("name", "text", "reference", "score"),
    [
        ("mathvista", "three", INTEGER, (0.0, None, {})),
        ("mathvista", "12", CHOICE, (0.0, None, {})),
        ("mathvista", "2 or 3", INTEGER, (0.0, None, {})),
        ("mathvista-official", "three", INTEGER, (0.0, None, {})),
        ("mathvista-official", "3 apples", INTEGER, (0.0, None, {})),
        # It rounds what was answered, but not what is right.
        ("mathvista-official", "1.5", FLOAT | {"answer": "1.50", "precision": 2}, (0.0, "1.5", {})),
        # One edit from "1/2", two from "1/3".
        ("mathvista-official", "12", CHOICE, (1.0, "1/2", {})),
    ],
)
def test_the_official_way_takes_the_nearest_option_and_no_units(name, text, reference, score):
    assert METRICS[name].score(text, reference) == score


def test_floats_need_a_precision():
    with pytest.raises(DataError, match="precision: found nothing"):
        METRICS["mathvista"].check(FLOAT | {"precision": None})


def test_figures_by_task_and_skill():
    rows = [("VQA", ["logic", "algebra"], 1.0), ("FQA", ["logic"], 0.0)]
    scores = [({"task": task, "skills": skills}, Score(of, "x")) for task, skills, of in rows]
    assert METRICS["mathvista"].aggregate(scores) == {
        "score": 0.5, "task/FQA": 0.0, "task/VQA": 1.0, "skill/algebra": 1.0, "skill/logic": 0.5,
    }  # fmt: skip
