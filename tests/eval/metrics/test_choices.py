"""Multiple choice: letters by the rules as they are written down, MMBench's rotations and Video-MME's buckets."""

import pytest

from eval.metrics import METRICS
from eval.metrics.choices import extract, infer
from eval.metrics.metric import Score
from eval.tasks import find_task
from glm4v_jax.errors import DataError

OPTIONS = {"A": "red", "B": "dark red", "C": "three cats", "D": "13"}
CHOICE = {"options": OPTIONS, "answer": "B"}
BOXED = "<think>A or C</think><answer>So <|begin_of_box|>B<|end_of_box|>"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(B).", "B"), ("I am sure that it is B", "B"), ("B or C", None), ("The answer is C, not B", "C"),
        ("B because I have seen it there", None),  # too far from the end
        ("It is 13", "D"),
        ("dark red", None),  # "red" is a part of it
        ("three cats" + " and more" * 20, None), ("Z", None), ("Cannot determine the answer, B", None),
        ("A dog runs", "A"),  # an English "A" is a letter here
        ("a dark red", None), ("red", "A"),
    ],
)  # fmt: skip
def test_rules_of_vlmevalkit(answer, letter):
    assert infer(answer, OPTIONS) == letter


# Made by `extract_mcq_answer` of lmms-eval, lmms_eval/tasks/_task_utils/mcq_extract.py of 2026-08-06, with A to D.
LMMS = {
    "A blue car.": "A", "Answer: B. A blue car, not A.": "A", "Both A and B are possible, but B": "B",
    "It is not A. It is B": "B", "A man drives a blue car, so the answer is B": "A", "Definitely two dogs": "D",
    "b": None, "B": "B", "(C)": "C", "The answer is C, not B": "B", "I choose Door B": "B",
    "C) Two dogs or D) nothing": "C", "Either (A) or B.": "B", "see A: red and B: blue, as said": "B",
    "D is wrong, it must be that of C": "D", "答案是C": "C", "nothing": None, "...": None,
    "The best option is the Car": "C", "Dogs, so b": "D", "Two Dogs and BMWs": "B", "answer is unclear": None,
}  # fmt: skip


@pytest.mark.parametrize(("answer", "letter"), LMMS.items())
def test_rules_of_lmms_eval(answer, letter):
    assert extract(answer) == letter
    assert METRICS[find_task("videomme@lmms-eval").metric].score(answer, CHOICE).parsed == letter


@pytest.mark.parametrize(
    ("name", "text", "value", "letter"),
    [
        ("mcq", BOXED, 1, "B"), ("mcq", "C", 0, "C"), ("mcq", "None of them", 0, None), ("mcq", "dark red", 1, "B"),
        ("mcq-vlmevalkit", "dark red", 0, None), ("mcq-vlmevalkit", BOXED, 1, "B"),
        ("videomme", "Dogs, so B", 1, "B"), ("videomme-vlmevalkit", "The best answer is B", 1, "B"),
        ("videomme-vlmevalkit", "Dogs, so B", 0, "D"), ("videomme-vlmevalkit", "nothing", 0, None),
    ],
)  # fmt: skip
def test_values_and_letters(name, text, value, letter):
    assert METRICS[name].score(text, CHOICE) == (value, letter, {})


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"answer": "B"}, "options: found nothing"),
        ({"answer": "E", "options": OPTIONS}, "answer: found 'E'; expected one of A, B, C, D"),
        ({"answer": "B", "options": "red"}, "options: found 'red'"),
    ],
)
def test_invalid_references_are_errors(reference, message):
    with pytest.raises(DataError, match=message):
        METRICS["mcq"].score("B", reference)


def test_a_question_is_right_if_all_its_rotations_are():
    rotations = {1: [1, 1, 1, 1], 2: [1, 0, 1, 1], 3: [1, 1]}
    scores = [(CHOICE | {"group": g}, Score(float(of), "B")) for g, values in rotations.items() for of in values]
    scores.append((CHOICE, Score(0.0, None)))
    assert METRICS["mmbench"].aggregate(scores) == pytest.approx({"score": 0.5, "rotations": 9 / 11, "incomplete": 0.5})


def test_figures_by_bucket():
    rows = [("short", "Sports", False, 1.0), ("short", "Sports", True, 0.0), ("long", "Law", True, 1.0)]
    scores = [
        ({"duration": duration, "domain": domain, "subtitles": subtitles}, Score(of, "A"))
        for duration, domain, subtitles, of in rows
    ]
    assert METRICS["videomme"].aggregate(scores) == {
        "score": pytest.approx(2 / 3),
        "duration/long": 1.0, "duration/short": 0.5, "domain/Law": 1.0, "domain/Sports": 0.5,
        "subtitles/False": 1.0, "subtitles/True": 0.5, "duration, subtitles/long, with": 1.0,
        "duration, subtitles/short, with": 0.0, "duration, subtitles/short, without": 1.0,
    }  # fmt: skip
