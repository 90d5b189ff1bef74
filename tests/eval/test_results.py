"""From answers to results and figures: errors, texts that were cut off, clusters, and what files can hold."""

import statistics

import pytest
from scipy import stats

from eval.data.items import Item
from eval.metrics import METRICS
from eval.results import read_results, score_items, write_results
from eval.summary import read_summary, summarize, write_summary
from glm4v_jax.errors import DataError


def item(name, reference, group=None, content=()):
    parts = [*content, {"type": "text", "text": "What?"}]
    return Item(name, [{"role": "user", "content": parts}], reference, {"content": parts}, group)


def answer(text, finish_reason="stop"):
    return {"text": text, "finish_reason": finish_reason, "prompt_tokens": 5, "new_tokens": 3}


def run(metric, items, answers):
    results = score_items(
        items, {item.id: answer for item, answer in zip(items, answers, strict=True)}, METRICS[metric]
    )
    return results, summarize(items, results, METRICS[metric])


@pytest.mark.parametrize("metric", ["cer", "wer"])
def test_an_error_scores_as_an_empty_answer(metric):
    items = [item("a", {"answer": "one two"}), item("b", {"answer": "three four five six"})]
    results, summary = run(metric, items, [answer("one two"), {"error": "no such file"}])
    _, empty = run(metric, items, [answer("one two"), answer("")])
    assert results[1].category == "error" and results[1].error == "no such file"
    assert results[1].parts["error_rate"] == 1 and results[1].parts["edits"] == results[1].parts["length"] > 0
    length = {"cer": (7, 19), "wer": (2, 4)}[metric]
    assert summary["score"] == pytest.approx(length[0] / sum(length)) == empty["score"]
    assert summary["rates"]["error"] == 0.5 and summary["parts"]["mean_error_rate"] == 0.5


def test_boxes_of_an_error_are_missed():
    box = {"boxes": [[0, 0, 50, 50]], "width": 100, "height": 100}
    _, summary = run("multi_box", [item("a", box), item("b", box)], [answer("[[0,0,500,500]]"), {"error": "no"}])
    assert summary["parts"]["recall"] == 0.5 and summary["parts"]["precision"] == 1


def test_categories_add_up_and_truncated_texts_are_counted_besides():
    items = [item(str(number), {"answer": "3", "answer_type": "integer"}) for number in range(6)]
    answers = [
        answer("3"), answer("3 or", "length"), answer("<think>1, 2,", "length"),
        answer("<think>1, 1, 1,", "repetition"), answer("<think>Hm.</think>"), answer("three"),
    ]  # fmt: skip
    results, summary = run("mathvista", items, answers)
    assert [result.category for result in results] == [
        "scored", "scored", "truncated", "truncated", "no_answer", "parse_failure",
    ]  # fmt: skip
    assert [result.is_truncated for result in results] == [False, True, True, True, False, False]
    rates = {"parse_failure": 1 / 6, "no_answer": 1 / 6, "truncated": 2 / 6, "error": 0}
    assert summary["rates"] == rates and summary["truncated_share"] == 0.5
    assert "unparsed" not in summary["parts"] and "truncated" not in summary


def test_rotations_of_a_question_are_one_cluster_and_no_group():
    options = {"options": {"A": "x", "B": "y"}, "answer": "A"}
    items = [item(f"{question}-{turn}", options, f"q{question}") for question in range(40) for turn in range(4)]
    # Every other question is right, all its rotations; of the others one is wrong.
    answers = [answer("B" if question % 2 and not turn else "A") for question in range(40) for turn in range(4)]
    results, summary = run("mmbench", items, answers)
    assert (summary["score"], summary["mean"], summary["parts"]["rotations"]) == (0.5, 0.875, 0.875)
    assert (summary["count"], summary["clusters"], summary["groups"]) == (160, 40, {})
    assert {result.group for result in results} == {None}
    # Draws have Binomial(40, 1/2) right questions, whose quantiles are 4 standard errors of 10,000 draws from the next.
    assert summary["interval"] == [0.35, 0.65] == (stats.binom.ppf([0.025, 0.975], 40, 0.5) / 40).tolist()


def test_questions_about_one_image_are_one_cluster():
    box = {"boxes": [[0, 0, 50, 50]], "width": 100, "height": 100}
    images = [{"type": "image", "path": f"{number // 10}.png", "digest": f"{number // 20}"} for number in range(200)]
    items = [item(str(n), box, content=[image]) for n, image in enumerate(images)]
    answers = [answer("[[0,0,500,500]]" if n // 20 % 2 else "[[900,900,999,999]]") for n in range(200)]
    results, summary = run("refcoco", items, answers)
    # The same image under two names is one.
    assert summary["clusters"] == len({result.cluster for result in results}) == 10
    # The middle 95% of Binomial(10, 1/2), of images; of 200 items drawn alone it would be 0.43 to 0.57.
    assert summary["score"] == 0.5
    assert summary["interval"] == [0.2, 0.8] == (stats.binom.ppf([0.025, 0.975], 10, 0.5) / 10).tolist()
    assert run("box_iou", [item(str(n), box) for n in range(200)], answers)[1]["clusters"] == 200


@pytest.mark.parametrize("metric", ["exact_match", "cer"])
def test_equal_scores_have_wilsons_interval(metric):
    items = [item(str(n), {"answer": "one"}) for n in range(10)]
    low, high = run(metric, items, [answer("one")] * 10)[1]["interval"]
    # Wilson's ends are the shares p with (1 - p)^2 = z^2 p (1 - p) / 10.
    z = statistics.NormalDist().inv_cdf(0.975)
    assert low == pytest.approx(10 / (10 + z * z), abs=1e-12) and high == pytest.approx(1, abs=1e-12)


def test_groups_that_are_parts_are_not_repeated():
    def groups(metric, references, names):
        items = [item(str(n), of, name) for n, (of, name) in enumerate(zip(references, names, strict=True))]
        summary = run(metric, items, [answer("7"), *[answer("8")] * (len(items) - 1)])[1]
        return summary["parts"], list(summary["groups"])

    human, machine = ({"answer": "7", "type": kind} for kind in ("human", "augmented"))
    assert groups("relaxed_accuracy", [human, machine], ["human", "augmented"]) == (
        {"type/augmented": 0.0, "type/human": 1.0}, [],
    )  # fmt: skip
    assert groups("relaxed_accuracy", [human, human], ["human", "human"]) == ({}, [])
    assert groups("relaxed_accuracy", [human, machine], ["one", "two"])[1] == ["one", "two"]
    assert groups("exact_match", [human, machine], ["human", "augmented"]) == ({}, ["augmented", "human"])


def test_prompts_are_equal_if_texts_and_files_are():
    def prompt(*content, **more):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        of = Item("a", [{"role": "user", "content": "What?"}], {"answer": "7"}, {"content": parts, **more})
        return run("exact_match", [of], [answer("7")])[0][0].prompt

    here, there = ({"type": "image", "path": f"{folder}/a.png", "digest": "1"} for folder in ("here", "there"))
    address = {"type": "image", "url": "file:///here/a.png", "digest": "1"}
    assert prompt(here, "What?") == prompt(there, "What?") == prompt(address, "What?")
    others = [prompt("What?", here), prompt({**here, "digest": "2"}, "What?"), prompt(here, "What?", system="Hm.")]
    assert len({prompt(here, "What?"), *others}) == 4


@pytest.mark.parametrize("text", ["\u2028 \u2029 \x85 \x1c \r\n", "half a pair: \ud83d", "é"])
def test_any_text_can_be_written_and_read(tmp_path, text):
    items = [item("a", {"answer": text}, text), item("b", {"answer": "7"})]
    results, summary = run("exact_match", items, [answer(f"<answer>{text}</answer>"), answer("7")])
    write_results(results, tmp_path / "results.jsonl")
    assert read_results(tmp_path / "results.jsonl") == results
    write_summary(summary, tmp_path / "summary.json")
    assert read_summary(tmp_path) == summary
    assert ("é" in (tmp_path / "results.jsonl").read_text(encoding="utf-8")) == (text == "é")


@pytest.mark.parametrize("line", [b"{", b"5", b'{"id": "a"}', b'"\xff"', b""])
def test_an_invalid_line_is_an_error_with_its_number(tmp_path, line):
    results, _ = run("exact_match", [item("a", {"answer": "7"})], [answer("7")])
    write_results(results, tmp_path / "results.jsonl")
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match=r"results\.jsonl:2: found an invalid result"):
        read_results(tmp_path / "results.jsonl")
