"""Scores of answers about digits, on answers of which the scores are known; baselines."""

import dataclasses

import pytest

from glm4v_jax.errors import DataError
from glm4v_jax.tiny.digits import TASKS, held_out
from tools.digit_scores import (
    Row,
    Scores,
    constant_box,
    is_in_format,
    majority_direction,
    nearest_neighbour,
    score,
    table,
)

pytest.importorskip("sklearn")


def said(example):
    """What the assistant should say, as a generation ends: at `</answer>`, which is not in its text."""
    return example.messages[-1]["content"][0]["text"].removesuffix("</answer>")


def boxed(text):
    return f"<think>So.</think><answer><|begin_of_box|>{text}<|end_of_box|>"


@pytest.mark.parametrize("task", TASKS)
def test_true_answers_score_in_full(task):
    truth = held_out(task)[:30]
    found = score([said(example) for example in truth], truth)
    assert (found.count, found.accuracy, found.format) == (30, 1.0, 1.0)
    assert found.mean_iou == (1.0 if task.startswith("grounding") else None)
    assert found.wrong_object == (0.0 if task == "grounding2" else None)


@pytest.mark.parametrize("task", ["reading", "motion"])
def test_invalid_answers_lower_the_accuracy(task):
    """Answers of the wrong example, of two boxes, and of none."""
    truth = held_out(task)[:40]
    other = next(e.answer for e in truth if e.answer != truth[0].answer)
    right = [said(example) for example in truth]
    assert score([boxed(other), *right[1:]], truth).accuracy == 39 / 40
    two = f"<think></think><answer><|begin_of_box|>{truth[0].answer}<|end_of_box|><|begin_of_box|>x<|end_of_box|>"
    for bad in (two, f"<think></think><answer>{truth[0].answer}", ""):
        found = score([bad, *right[1:]], truth)
        assert (found.accuracy, found.format) == (39 / 40, 39 / 40)


def test_boxes_of_the_other_digit_are_counted():
    truth = held_out("grounding2")[:8]
    answers = [boxed([list(example.boxes[index < 3])]) for index, example in enumerate(truth)]
    found = score(answers, truth)
    assert (found.accuracy, found.wrong_object, found.format) == (5 / 8, 3 / 8, 1.0)
    assert found.mean_iou == pytest.approx(5 / 8)


def test_grounding_takes_one_box_of_half_the_overlap():
    (example,) = held_out("grounding1")[:1]
    x1, y1, x2, y2 = example.boxes[0]
    half = (x1, y1, x1 + (x2 - x1) * 0.52, y2)
    less = (x1, y1, x1 + (x2 - x1) * 0.48, y2)
    assert score([boxed([list(half)])], [example]).accuracy == 1
    assert score([boxed([list(less)])], [example]).accuracy == 0
    twice = score([boxed([list(example.boxes[0])] * 2)], [example])
    assert (twice.accuracy, twice.mean_iou) == (0, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (boxed("7"), True),
        (boxed("7") + "</answer>", True),
        (boxed("7") + "</answer><|user|>", False),
        ("7", False),
        ("<think>So.</think><answer>7", False),
        ("<think>So.<answer><|begin_of_box|>7<|end_of_box|>", False),
        ("<think>So.</think>7<answer><|begin_of_box|>7<|end_of_box|>", False),
    ],
)
def test_an_answer_is_in_format_with_one_box(text, expected):
    assert is_in_format(text) is expected


@pytest.mark.slow
def test_only_the_nearest_neighbour_is_a_strong_baseline():
    """1-NN is hard to beat; a constant box and a constant direction are not."""
    assert nearest_neighbour() == 354 / 360  # of sums of integers
    for task in ("grounding1", "grounding2"):
        found = constant_box(task, held_out(task))
        assert 0.02 < found.accuracy < 0.25 and found.format == 1
    assert 0.2 < majority_direction(held_out("motion")).accuracy < 0.33


def test_a_table_has_a_line_per_row():
    scores = Scores(360, 0.9752, 1.0)
    two = dataclasses.replace(scores, wrong_object=0.25, mean_iou=0.6)
    rows = [Row("reading", scores, 0.95, 0.983), Row("two", two)]
    lines = table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    assert lines[2] == "| reading | 97.5% | 95.0% | 98.3% |  |  | 100.0% | 360 |"
    assert lines[3] == "| two | 97.5% |  |  | 25.0% | 0.60 | 100.0% | 360 |"


def test_answers_must_match_the_examples():
    truth = held_out("reading")[:2]
    for answers, examples in ((["7"], truth), ([], [])):
        with pytest.raises(DataError, match=f"answers: found {len(answers)}, expected one for each of {len(examples)}"):
            score(answers, examples)
