"""Several tasks in one run, with a stand-in for the engine: their files and their joint summary."""

import json
import statistics

import pytest

from eval.commands import main
from eval.compare import runs_in
from eval.read_items import read_items
from eval.results import ANSWERS, REPORT, RESULTS, SUMMARY
from eval.tasks import TASKS
from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.slots import Stats

NAMES, COUNT = ("digits-motion", "digits-vqa"), 3


class StandIn:
    """Answers one prompt after the other with given texts; None presses Ctrl-C."""

    def __init__(self, answers):
        self.answers, self.stats, self.asked = iter(answers), Stats(), 0

    def generate_many(self, requests, **_):
        for index, _ in enumerate(requests):
            text = next(self.answers)
            if text is None:
                raise KeyboardInterrupt
            self.asked += 1
            yield Completion(index, f"<answer>{text}</answer>", (5, 6), 9, "stop")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(root, monkeypatch):
    """(answers, ...) -> status, the engine."""
    pytest.importorskip("sklearn")

    def run(answers, *more):
        engine, loaded = StandIn(answers), []
        monkeypatch.setattr("glm4v_jax.console.options.ModelOptions.load", lambda *_: loaded.append(1) or engine)
        tasks = [part for name in NAMES for part in ("--task", name)]
        status = main([*tasks, "--limit", str(COUNT), "--out", str(root), *more])
        assert len(loaded) <= 1  # the tasks share it
        return status, engine

    return run


def right_answers():
    return [item.reference["answer"] for name in NAMES for item in read_items(TASKS[name], limit=COUNT)]


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_tasks_have_directories_and_a_joint_summary(root, run, capsys):
    answers = right_answers()
    answers[COUNT] = answers[-1] = "none of these"  # of the second task's three
    status, engine = run(answers)
    assert (status, engine.asked) == (0, 2 * COUNT)
    assert files(root) == sorted([*NAMES, SUMMARY])
    summaries = [json.loads((root / name / SUMMARY).read_text()) for name in NAMES]
    for name, summary in zip(NAMES, summaries, strict=True):
        assert files(root / name) == sorted([ANSWERS, RESULTS, SUMMARY, REPORT])
        assert (summary["task"], summary["count"]) == (name, COUNT)
    assert [summary["score"] for summary in summaries] == [1, 1 / 3]
    joint = json.loads((root / SUMMARY).read_text())
    assert joint == {"score": statistics.fmean([1, 1 / 3]), "scores": {NAMES[0]: 1, NAMES[1]: 1 / 3}}
    assert list(joint) == ["score", "scores"]
    assert runs_in(root) == {name: root / name for name in NAMES}
    printed = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1] for line in printed.out.splitlines() if line}
    assert rows[NAMES[0]] == "1.000" and rows[NAMES[1]] == "0.333"
    assert f"{root}: {ANSWERS}, {RESULTS}, {SUMMARY}, {REPORT} in a directory for each task" in printed.err

    before = (root / SUMMARY).read_bytes()
    status, engine = run([], "--json", "--no-report")
    assert (status, engine.asked, (root / SUMMARY).read_bytes()) == (0, 0, before)
    assert json.loads(capsys.readouterr().out) == dict(zip(NAMES, summaries, strict=True))


def test_scores_are_removed_with_the_answers_they_are_of(root, run):
    answers = right_answers()
    assert run(answers, "--no-report")[0] == 0
    before = {path.relative_to(root): path.read_bytes() for path in root.rglob("*.json*") if path.name != ANSWERS}
    assert len(before) == 5
    status, _ = run([answers[0], None], "--restart", "--no-report")
    assert status == 130
    # The second task has not been begun anew; of the first one there is one answer, and no score.
    assert files(root) == sorted(NAMES)
    assert (files(root / NAMES[0]), files(root / NAMES[1])) == ([ANSWERS], sorted([ANSWERS, RESULTS, SUMMARY]))
    status, engine = run(answers[1:COUNT], "--no-report")
    assert (status, engine.asked) == (0, COUNT - 1)
    assert {name: (root / name).read_bytes() for name in before} == before
