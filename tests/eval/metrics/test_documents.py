"""Edit distance and TEDS of documents, as OmniDocBench has them."""

import random

import jiwer
import pytest

from eval.metrics import METRICS
from eval.read_items import read_items
from eval.tasks import TASKS, find_task
from glm4v_jax.config.presets import PRESETS
from glm4v_jax.errors import DataError


@pytest.mark.parametrize(
    ("name", "answer", "expected", "value"),
    [
        ("edit_distance", "kitten", "sitting", 1 - 3 / 7),
        ("edit_distance", "abc", "ABC", 0),
        ("edit_distance", "<think>x</think><answer>a b</answer>", "a  b", 3 / 4),
        ("edit_distance", r"\boxed{a}", r"\boxed{a}", 1),
        ("edit_distance-omnidocbench", "Total:\n12.50 EUR!", "Total 1250, EUR", 1),
        ("edit_distance-omnidocbench", "发票，12", "发票 13", 3 / 4),
        ("formula_edit_distance", r"\[ \mathrm{X}\,= \left( A \right) \]", r"x\,=(a)", 1 - 2 / 9),
        ("formula_edit_distance", r"$$\begin{aligned} a \tag{1} \end{aligned}$$", "a", 1),
    ],
)
def test_edit_distances_worked_out_by_hand(name, answer, expected, value):
    assert METRICS[name].score(answer, {"answer": expected}).value == pytest.approx(value)


def test_edits_equal_those_of_jiwer():
    rng = random.Random(0)
    for _ in range(200):
        answer, expected = ("".join(rng.choices("abc中", k=rng.randrange(1, 9))) for _ in range(2))
        score = METRICS["edit_distance"].score(answer, {"answer": expected})
        edits = jiwer.cer(expected, answer) * len(expected)
        assert score.parts["edits"] == pytest.approx(edits)
        assert score.value == pytest.approx(1 - edits / max(len(answer), len(expected)))


def test_figures_are_means_of_items_and_of_all_edits():
    metric = METRICS["edit_distance"]
    pairs = [("abcd", "abcx"), ("a", "b"), ("", "abc")]
    scores = [({"answer": expected}, metric.score(answer, {"answer": expected})) for answer, expected in pairs]
    figures = metric.aggregate(scores)
    assert figures == pytest.approx({"score": 0.25, "edit_distance": 0.75, "whole": 5 / 8})


def test_the_best_of_several_tables_counts():
    one, other = ("<table><tr><td>1</td></tr></table>", "<table><tr><td>2</td><td>3</td></tr></table>")
    score = METRICS["teds"].score(other, {"answers": [one, other]})
    assert score.value == score.parts["structure"] == 1
    figures = METRICS["teds"].aggregate([({}, score), ({}, METRICS["teds"].score(other, {"answer": one}))])
    assert figures == pytest.approx({"score": (1 + (1 - 2 / 3)) / 2, "structure": (1 + 2 / 3) / 2})


def test_a_reference_without_a_table_is_an_error():
    with pytest.raises(DataError, match=r"answer: found '\| a \|'; expected a table in HTML"):
        METRICS["teds"].check({"answer": "| a |"})


def test_tasks_need_no_question_and_ask_as_glm_ocr_is_asked(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "https://example.com/page.png", "answer": "Invoice"}\n')
    for name, prompt in {"ocr-text@cer": "Text", "ocr-text": "Text", "ocr-formula": "Formula"}.items():
        (item,) = read_items(find_task(name), [tmp_path])
        assert item.question == f"{prompt} Recognition:" and len(item.images) == 1
    assert all(PRESETS[TASKS[f"ocr-{kind}"].preset].options["repetition_penalty"] == 1.1 for kind in ("text", "table"))


def test_digits_are_read_as_text():
    pytest.importorskip("sklearn")
    task = find_task("digits-vqa@ocr")
    (item,) = read_items(task, limit=1)
    text = f"<think>One digit.</think><answer><|begin_of_box|>{item.reference['answer']}<|end_of_box|></answer>"
    assert METRICS[task.metric].score(text, item.reference).value == 1
