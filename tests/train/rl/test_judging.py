"""Scores of many texts: in order, each with a limit that nothing escapes, and few failures."""

import os

import pytest

from glm4v_jax.errors import ConfigError, DataError
from glm4v_jax.generate.text.thinking import BOX, END_BOX
from train.rl.config import VerifierConfig
from train.rl.judging import Judges, Task, check_failures, score_shared
from train.rl.self_test import Example, self_test
from train.rl.verifiers import Reward, Verifier, make_verifiers

JUDGE = """
import os, sys, time

def judge(answer, item):
    print("noise")
    if answer == "spin":
        9 ** 9 ** 9
    if answer == "sleep":
        time.sleep(1000)
    if answer == "exit":
        os._exit(3)
    return {"half": 0.5, "more": 2.0, "same": 1.0, "no": 0.0}[answer]

def generous(answer, item):
    return 1
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "judge_of_test.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)


def boxed(*answers, domain="it", item=None):
    return [Task(domain, f"<answer>{BOX}{answer}{END_BOX}</answer>", item or {"answer": "right"}) for answer in answers]


def judge(seconds, name="judge"):
    return make_verifiers({"it": VerifierConfig(kind="vqa", judge=f"judge_of_test:{name}", seconds=seconds)})


@pytest.mark.multiprocess
@pytest.mark.usefixtures("here")
def test_what_does_not_end_is_killed_and_the_rest_goes_on_in_order():
    answers = ["spin", "half", "exit", "right", "more", "sleep", "same", "what", "no", "spin", "half"]
    with Judges(judge(seconds=0.3), processes=1) as judges:
        found = [(reward.value, reward.reason) for reward in judges.score(boxed(*answers))]
    late, partly = (0, "timed out"), (0.5, "partly")
    failed, right = (0, "failed"), (1, "right")
    assert found == [late, partly, failed, right, failed, late, right, failed, (0, "wrong"), late, partly]


@pytest.mark.multiprocess
@pytest.mark.usefixtures("here")
def test_a_judge_that_pays_for_anything_is_refused():
    verifiers = judge(seconds=9, name="generous")
    examples = [Example("it", {"answer": str(number)}, f"data.jsonl:{number + 1}") for number in range(20)]
    with Judges(verifiers) as judges, pytest.raises(ConfigError, match=r"rl\.verifiers\.it: .* data\.jsonl:1, .*'"):
        self_test(judges, examples)


@pytest.mark.multiprocess
@pytest.mark.usefixtures("here")
def test_a_judge_that_is_not_there_is_named():
    with (
        Judges(judge(9, "missing")) as judges,
        pytest.raises(ConfigError, match=r"rl\.verifiers\.it: judge: .*missing"),
    ):
        judges.start()


def test_no_process_starts_where_the_rule_is_all(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    with Judges(make_verifiers({"it": VerifierConfig(kind="math", symbolic=False)})) as judges:
        judges.start()
        tasks = boxed("9**9**9", "2", item={"answer": "2"})
        assert [reward.value for reward in judges.score(tasks)] == [0, 1]


@pytest.mark.multiprocess
def test_without_math_verify_a_job_that_needs_it_is_refused(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    verifiers = make_verifiers({"algebra": VerifierConfig(kind="math")})
    with Judges(verifiers) as judges, pytest.raises(ConfigError, match=r"rl\.verifiers\.algebra: symbolic: .*pip inst"):
        judges.start()


@pytest.mark.multiprocess
def test_expressions_are_compared_by_math_verify_and_bombs_are_killed():
    item = {"answer": r"\frac{\sqrt{3}}{2}"}
    answers = [r"\sqrt{3}/2", r"\frac{3}{2\sqrt{3}}", "1", r"9^{9^{9^{9}}}", r"\frac{" * 60 + "1" + "}{2}" * 60, "x +"]
    answers += ["__import__('os').system('touch bomb')", r"\sin^2(1)+\cos^2(1)-1+\sqrt{3}/2"]
    verifiers = make_verifiers({"it": VerifierConfig(kind="math", seconds=2)})
    with Judges(verifiers) as judges:
        found = judges.score(boxed(*answers, item=item))
    assert [reward.value for reward in found] == [1, 1, 0, 0, 0, 0, 0, 1]


def test_processes_share_texts_and_all_have_all_rewards():
    tasks = boxed(*"abcdefg")
    alone = [Reward(number / 10, task.text, "partly") for number, task in enumerate(tasks)]
    by_text = dict(zip((task.text for task in tasks), alone, strict=True))
    shares = [[list(by_text[task.text]) for task in tasks[index::3]] for index in range(3)]

    def score(some):
        return [by_text[task.text] for task in some]

    for index in range(3):
        assert score_shared(score, tasks, index=index, count=3, gather=lambda own: shares) == alone
    assert score_shared(score, tasks) == alone


def test_too_many_failures_end_the_job_and_one_does_not():
    tasks = boxed(*["a"] * 200)
    good, bad = Reward(1.0, "a", "right"), Reward(0.0, "KeyError: 'a'", "failed")
    check_failures(tasks, [bad] * 2 + [good] * 198, 0.01)
    check_failures(tasks[:8], [bad] + [good] * 7, 0.01)
    with pytest.raises(DataError, match=r"rl\.verifiers\.it: found 3 rollouts of 200 .*KeyError.*expected at most 1"):
        check_failures(tasks, [bad] * 3 + [good] * 197, 0.01)


class Weak(Verifier):
    """Pays for anything."""

    def score(self, text, item):
        return Reward(1.0, text, "right")


def test_a_weak_verifier_is_refused_with_its_domain_and_a_row():
    examples = [Example("count", {"answer": number}, f"data.jsonl:{number + 1}") for number in range(40)]
    strong = make_verifiers({"count": VerifierConfig(kind="counting")})
    self_test(Judges(strong), examples)
    weak = {"count": Weak(VerifierConfig(kind="counting"))}
    with pytest.raises(
        ConfigError, match=r"rl\.verifiers\.count: found a reward of 1 for an empty answer .*data.jsonl:1,"
    ):
        self_test(Judges(weak), examples)


@pytest.mark.parametrize(
    ("kind", "item", "message"),
    [
        ("counting", {}, "data.jsonl:9: domain 'it': answer: found nothing"),
        ("grounding", {"boxes": [[5, 5, 5, 5]], "width": 9, "height": 9}, "data.jsonl:9: domain 'it': found reward 0"),
    ],
)
def test_a_reference_that_is_not_right_is_refused_with_its_row(kind, item, message):
    verifiers = make_verifiers({"it": VerifierConfig(kind=kind)})
    with pytest.raises(DataError, match=message):
        self_test(Judges(verifiers), [Example("it", item, "data.jsonl:9")])


def test_graded_kinds_may_pay_a_part_for_another_answer():
    verifiers = make_verifiers({"it": VerifierConfig(kind="ocr")})
    examples = [Example("it", {"answer": f"2021-03-{day:02}"}, f"data.jsonl:{day}") for day in range(1, 29)]
    self_test(Judges(verifiers), examples)
