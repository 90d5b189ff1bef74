"""Two runs side by side: figures worked out by hand, errors, and what is printed."""

import dataclasses
import json

import numpy as np
import pytest

from eval.compare import compare, runs_in
from eval.compare_command import Compare
from eval.results import read_results
from glm4v_jax.console.program import run_program
from glm4v_jax.errors import DataError
from tests.eval.helpers_eval import item, result, write_run


def results(scores, names=None, **fields):
    names = names or [f"item-{index}" for index in range(len(scores))]
    return [
        result(item(name, f"Question {name}?"), f"<think>Hm.</think><answer>says {score}</answer>", score, **fields)
        for name, score in zip(names, scores, strict=True)
    ]


def run_command(*arguments):
    return run_program(
        {"compare": Compare}, ["compare", *map(str, arguments)], name="eval", prog="eval", description=""
    )


@pytest.fixture
def two(tmp_path):
    """Five of six items in both: one 0.25 higher, two equal, one lost, one gained."""
    names = ["a", "b", "c", "d", "e", "old"]
    first = write_run(tmp_path / "first", results([0.5, 1.0, 0.0, 1.0, 0.0, 1.0], names), model="models/a")
    names = ["new", "e", "d", "c", "b", "a"]
    second = write_run(tmp_path / "second", results([1.0, 1.0, 0.0, 0.0, 1.0, 0.75], names), model="models/b")
    return first, second


def test_items_are_matched_by_id_in_any_order(two):
    found = compare(*two)
    assert (found.task, found.metric, found.count) == ("digits-grounding", "box_iou", 5)
    assert (found.first.mean, found.second.mean) == (0.5, 0.55)
    assert found.difference.mean == pytest.approx(0.05)
    assert (found.first.only, found.second.only) == (["old"], ["new"])
    assert (found.higher, found.lower) == (2, 1)
    assert [flip.id for flip in found.lost] == ["d"] and [flip.id for flip in found.gained] == ["e"]
    flip = found.lost[0]
    assert (flip.question, flip.scores, flip.answers) == ("Question d?", (1.0, 0.0), ("says 1.0", "says 0.0"))
    assert found.first.categories == {"scored": 5}


def test_the_interval_is_that_of_paired_items(tmp_path):
    """Both runs vary from 0 to 1, and differ by 0.1 on half of the items: an unpaired interval would hold 0."""
    scores = np.linspace(0, 0.9, 200)
    better = scores + np.where(np.arange(200) % 2, 0.1, 0)
    found = compare(
        write_run(tmp_path / "a", results(scores.tolist())), write_run(tmp_path / "b", results(better.tolist()))
    )
    # The mean of N differences of deviation 0.05 has a standard error of 0.05 / sqrt(N); 1.96 of them each way.
    half = 1.96 * 0.05 / 200**0.5
    assert found.difference.mean == pytest.approx(0.05)
    assert found.difference.low == pytest.approx(0.05 - half, abs=0.1 * half)
    assert found.difference.high == pytest.approx(0.05 + half, abs=0.1 * half)


def test_a_run_is_equal_to_itself(two):
    found = compare(two[0], two[0])
    assert dataclasses.astuple(found.difference) == (0, 0, 0)
    assert (found.lost, found.gained, found.first.only, found.higher, found.lower) == ([], [], [], 0, 0)


def test_differences_by_group_and_counts_by_category(tmp_path):
    items = [item("a", group="one"), item("b", group="one"), item("c", group="two")]
    first = [result(of) for of in items]
    second = [result(items[0]), *(result(of, "", 0.0, None, "no_answer") for of in items[1:])]
    found = compare(write_run(tmp_path / "first", first), write_run(tmp_path / "second", second))
    assert {name: of.mean for name, of in found.groups.items()} == {"one": -0.5, "two": -1.0}
    assert found.second.categories == {"no_answer": 2, "scored": 1}
    assert found.lost[0].answers == ("7", None) and found.lost[0].categories == ("scored", "no_answer")


def test_prompts_that_differ_are_counted(tmp_path):
    """Other words, or the image elsewhere, which only the digest shows; older runs have none."""
    asked = [("What?", "1"), ("Who?", "1"), ("Why?", "1"), ("When?", None)]
    others = [("What is it?", "2"), ("Who?", "1"), ("Why?", "2"), ("When?", "1")]
    first, second = (
        write_run(tmp_path / name, [result(item(str(n), text), prompt=prompt) for n, (text, prompt) in enumerate(of)])
        for name, of in (("first", asked), ("second", others))
    )
    assert compare(first, second).asked_differently == 2


def test_variants_with_the_same_metric_are_compared_with_their_settings(tmp_path, capsys):
    failed = result(item("b"), "", 0.0, None, "error", error="no such file")
    first = write_run(tmp_path / "first", [result(item("a")), failed], task="chartqa", dtype="bfloat16")
    options = {"max_new_tokens": 64, "think_budget": 9}
    second = write_run(
        tmp_path / "second", [result(item("a")), result(item("b"))], task="chartqa@vlmevalkit", preset="bench",
        options=options,
    )  # fmt: skip
    found = compare(first, second)
    assert found.task == "chartqa, chartqa@vlmevalkit"
    assert found.settings == {
        "preset": ("greedy", "bench"), "dtype": ("bfloat16", "float32"), "think_budget": (None, 9),
    }  # fmt: skip
    assert run_command(first, second) == 0
    shown, errors = capsys.readouterr()
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "task chartqa chartqa@vlmevalkit" in lines
    settings = "preset greedy and bench; dtype bfloat16 and float32; think_budget none and 9"
    assert f"settings that differ: {settings}" in lines
    assert any("could not be prepared: 1 item of the first, 0 of the second" in line for line in lines)
    assert errors == ""


def test_items_of_one_cluster_are_resampled_together(tmp_path):
    """Ten images with ten questions each, all better or all worse: ten independent results, not a hundred."""
    scores = [float(index // 10 % 2) for index in range(100)]
    alone = [result(item(str(n)), score=score) for n, score in enumerate(scores)]
    together = [result(item(str(n)), score=score, cluster=str(n // 10)) for n, score in enumerate(scores)]
    zeros = write_run(tmp_path / "zeros", [result(item(str(n)), score=0.0) for n in range(100)])
    shifted = write_run(tmp_path / "base", [dataclasses.replace(of, score=0.0) for of in together])
    narrow, wide = (
        compare(base, write_run(tmp_path / "run", of)).difference for base, of in ((zeros, alone), (shifted, together))
    )
    assert narrow.mean == wide.mean == 0.5
    # Of a share of a half: 1.96 / 2 / sqrt(N) each way, sqrt(10) times as much.
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 / 2 / 10, abs=0.03)
    assert 2.5 < (wide.high - wide.low) / (narrow.high - narrow.low) < 3.8


def test_unpaired_surrogates_are_printed_as_escapes(tmp_path, capsys):
    of = result(item("a", "What?\u2028Who?"), "<answer>\ud83d</answer>")
    first, second = (
        write_run(tmp_path / name, [dataclasses.replace(of, score=s)]) for name, s in (("a", 1.0), ("b", 0.0))
    )
    assert read_results(first / "results.jsonl") == [of]
    assert "\\ud83d" in run_and_read(capsys, first, second, "--json")
    assert run_command(first, second) == 0


def run_and_read(capsys, *arguments):
    assert run_command(*arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "names", "reference", "message"),
    [
        ({"metric": "anls"}, "ab", "7", "metric: found 'box_iou' in .*first and 'anls' in .*second"),
        ({}, "cd", "7", r"found no common item \('a', 'b'; 'c', 'd'\); expected runs over the same data"),
        ({}, "ab", "8", r"found 2 of 2 common items with another reference, such as 'a' \(\{\"answer\": \"7\"\} and"),
        ({}, "aa", "7", r"second.results.jsonl: found 'a' more than once"),
    ],
)
def test_runs_of_other_metrics_or_data_are_errors(tmp_path, fields, names, reference, message):
    first = write_run(tmp_path / "first", [result(item(name)) for name in "ab"])
    others = [result(item(name, reference={"answer": reference})) for name in names]
    with pytest.raises(DataError, match=message):
        compare(first, write_run(tmp_path / "second", others, **fields))


def test_figures_and_flips_are_printed(two, capsys):
    assert run_command(*two) == 0
    shown, errors = capsys.readouterr()
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "model models/a models/b" in lines
    assert any(line.startswith("mean of the 5 common items 0.500 0.550 +0.050 (") for line in lines)
    assert any(line.endswith("right -> wrong 1, wrong -> right 1") for line in lines)
    assert "only in the first, not compared: 1 item: old" in lines
    assert "d Question d? 7 says 1.0 says 0.0" in lines and "e Question e? 7 says 0.0 says 1.0" in lines
    assert errors == ""


def test_control_sequences_of_a_model_are_escaped(tmp_path, capsys):
    bad = "\x1b[31m[bold]red[/bold]\x07"
    first = write_run(tmp_path / "first", [result(item("a", bad), f"<answer>{bad}</answer>")])
    second = write_run(tmp_path / "second", [result(item("a", bad), f"<answer>{bad}</answer>", 0.0)])
    assert run_command(first, second) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown and shown.count("[bold]red[/bold]") == 3


def test_json_has_all_flips(two, capsys):
    assert run_command(*two, "--json", "--show", "0") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["count"] == 5 and printed["difference"]["mean"] == pytest.approx(0.05)
    assert set(printed["difference"]) == {"mean", "low", "high"}
    assert [flip["id"] for flip in printed["gained"]] == ["e"] and printed["second"]["only"] == ["new"]


def test_runs_of_several_tasks_are_compared_task_by_task(tmp_path, capsys):
    for run, tasks in {"first": ("reading", "motion"), "second": ("reading", "motion", "more")}.items():
        for task in tasks:
            write_run(tmp_path / run / task, results([1.0, 0.0]), task=task)
        scores = json.dumps({"score": 0.5, "scores": dict.fromkeys(tasks, 0.5)})
        (tmp_path / run / "summary.json").write_text(scores)
    assert list(runs_in(tmp_path / "second")) == ["reading", "motion", "more"]
    assert run_command(tmp_path / "first", tmp_path / "second", "--json") == 0
    printed, errors = capsys.readouterr()
    assert list(json.loads(printed)) == ["reading", "motion"]
    assert errors == "eval: tasks of one run only, not compared: more\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none",), "none/summary.json: found no such file; expected the summary of a run"),
        (("second", "--right", "0"), "--right: found 0.0; expected a number above 0 and at most 1"),
        (("second", "--show", "-1"), "--show: found -1; expected an integer of at least 0"),
    ],
)
def test_errors_are_one_line(two, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(two[0].parent)
    assert run_command("first", *arguments) == 1
    assert capsys.readouterr().err == f"eval: error: {message}\n"
