"""MMMU by the official rules, without their random guess."""

import pytest

from eval.metrics import METRICS
from eval.metrics.metric import Score
from eval.metrics.mmmu import chosen, open_readings
from eval.tasks import find_task
from glm4v_jax.errors import DataError

OPTIONS = {"A": "red", "B": "dark red", "C": "three cats", "D": "13"}
CHOICE = {"options": OPTIONS, "answer": "B"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(B) dark red", "B"), ("A is wrong, (B) is right", "B"), ("(A) or (C)", "C"), ("I take B", "B"),
        ("C or B", "B"), ("It is B. That is all", "B"), ("I see three cats in the picture", "C"),
        ("I see three cats", None),  # five words or fewer
        ("The last named is red, not 13 of them", "D"), ("", None), ("no", None),
    ],
)  # fmt: skip
def test_letters_are_read_in_the_order_of_forms(answer, letter):
    assert chosen(answer, OPTIONS) == letter


def test_nothing_is_guessed():
    assert {METRICS["mmmu"].score("I do not know", CHOICE)[:2] for _ in range(20)} == {(0.0, None)}


@pytest.mark.parametrize(
    ("answer", "readings"),
    [
        ("12.346", {12.35}), ("So the answer is 12", {12.0}), ("x = 3.14159", {3.14}), ("a", {" a", "a "}),
        # The official expressions find 234 and 3 as well.
        ("It is 1,234 dollars.", {"1,234 dollars", 1234.0, 234.0}), ("It is 2e3", {2000.0, 3.0}),
        ("The result is blue\nand so on", {"blue", "on"}),
    ],
)  # fmt: skip
def test_readings_of_open_answers(answer, readings):
    assert open_readings(answer) == readings


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The answer is 12.344", "12.34", 1), ("The answer is 12.346", "12.34", 0),
        ("It is a sapphire blue", "Sapphire", 1), ("about 1,000", "1000", 1),
        ("<think>3</think><answer>So <|begin_of_box|>$5<|end_of_box|>", "5", 1),
        # A single letter has to stand alone on one side.
        ("the cat", "a", 0), ("a cat", "a", 1),
    ],
)  # fmt: skip
def test_open_answers(text, answer, expected):
    assert METRICS["mmmu"].score(text, {"answer": answer, "type": "open"}).value == expected
    assert METRICS["mmmu"].score(text, {"answers": ["six", answer]}).value == expected


# Made by `can_infer` of VLMEvalKit, vlmeval/utils/matching_util.py of 2026-08-18, with the options that `MMMU_preproc`
# of vlmeval/dataset/utils/multiple_choice.py gives an open question.
@pytest.mark.parametrize(
    ("text", "answers", "letter", "value"),
    [
        ("It is 12.5 CM.", ["12.5 cm"], "A", 1), ("about 12 or so", ["12"], "A", 1), ("Other answers", ["12"], "B", 0),
        ("The answer is A", ["blue"], "A", 1), ("B", ["blue"], "B", 0), ("no idea", ["blue"], None, 0),
        ("E", ["E"], "A", 0),  # a capital letter is taken for the letter of the right option
        ("12", ["12", "twelve"], None, 0),  # the option is the list
    ],
)  # fmt: skip
def test_open_questions_of_vlmevalkit(text, answers, letter, value):
    name = find_task("mmmu@vlmevalkit").metric
    assert METRICS[name].score(text, {"answers": answers, "type": "open"}) == (value, letter, {})


def test_letters_of_vlmevalkit_are_those_of_its_multiple_choice():
    for text in ("B", "(B) dark red", "A is wrong, (B) is right", "It is 13", "B because I have seen it there", ""):
        score = METRICS["mmmu-vlmevalkit"].score(text, CHOICE)
        assert score == METRICS["mcq-vlmevalkit"].score(text, CHOICE)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"answer": "B", "type": "multiple-choice"}, "options: found nothing"),
        (CHOICE | {"answer": "red"}, "answer: found 'red'"),
    ],
)
def test_invalid_references_are_errors(reference, message):
    with pytest.raises(DataError, match=message):
        METRICS["mmmu"].check(reference)


def test_figures_by_domain_and_subject():
    rows = [
        ({"id": "validation_Accounting_1"}, 1.0), ({"id": "validation_Accounting_2"}, 0.0),
        ({"subject": "Basic Medical Science"}, 1.0), ({"id": "dev_Art_Theory_12"}, 1.0), ({"id": "x"}, 0.0),
    ]  # fmt: skip
    assert METRICS["mmmu"].aggregate([(reference, Score(of, "x")) for reference, of in rows]) == {
        "score": 0.6,
        "domain/Art and Design": 1.0, "domain/Business": 0.5, "domain/Health and Medicine": 1.0,
        "subject/Accounting": 0.5, "subject/Art_Theory": 1.0, "subject/Basic_Medical_Science": 1.0,
    }  # fmt: skip
