"""Two sides in turns: workers, rounds, and what is concluded from the seconds."""

import doctest
import json
import os
import subprocess
import sys

import pytest

from bench import media, report, turns

ECHO = """
from bench import turns
def double(x): print("noise"); return 2 * x
def fail(): raise SystemExit(3)
turns.serve({"double": double, "fail": fail})
"""


def test_docstring_examples():
    assert doctest.testmod(turns).failed == 0


def test_a_worker_replies_and_its_exit_is_an_error():
    with turns.Worker("echo", [sys.executable, "-c", ECHO]) as worker:
        assert worker("double", x=4) == 8
        assert worker("double", x=[1]) == [1, 1]
        with pytest.raises(SystemExit, match="echo: ended in 'fail' with status 3"):
            worker("fail")


def test_sides_take_turns_after_a_round_of_warm_up():
    calls = []

    def side(name):
        return lambda task, **arguments: calls.append((name, task)) or len(calls)

    works = [dict.fromkeys(("ours", "theirs"), turns.TimedTask(task, {})) for task in "xy"]
    results = turns.measure({"ours": side("ours"), "theirs": side("theirs")}, works, 2)
    assert calls == [(name, task) for _ in range(3) for task in "xy" for name in ("ours", "theirs")]
    assert [[one["ours"] for one in each] for each in results] == [[5, 9], [7, 11]]


@pytest.mark.parametrize(("aim", "passed"), [(1.5, True), (1.51, False), (None, True)])
def test_ratios_are_taken_within_a_round(aim, passed):
    figures = turns.compare([1, 2, 4], [2, 3, 4], amount=6, aim=aim)
    assert figures["ratio"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert figures["ours"] == {"median": 3, "min": 1.5, "max": 6}
    assert figures["passed"] == passed


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_is_confined_to_its_cores():
    program = "from bench import turns; import os; turns.use_cores(1); print(len(os.sched_getaffinity(0)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=report.ROOT, check=True, text=True, capture_output=True)
    assert done.stdout == "1\n"
    with pytest.raises(SystemExit, match="cores; expected 1000000"):
        turns.use_cores(10**6)


def test_a_result_is_json_without_names_of_this_machine(tmp_path, capsys):
    facts = report.machine_facts("jax", "numpy")
    table = report.Table("some", ("", "speed"), [("packed | padded", report.verdict(True))])
    assert report.finish("some", {"machine": facts, "passed": False}, table, "slow", directory=tmp_path) == 1
    printed = capsys.readouterr().out
    assert "packed | padded" in printed and "slow\n" in printed
    assert json.loads((tmp_path / "some.json").read_text()) == {"machine": facts, "passed": False}
    assert set(facts) == {"processor", "cores", "system", "python", "jax", "numpy"}
    assert str(table) == "|  | speed |\n| --- | --- |\n| packed / padded | pass |"


def test_all_named_media_exist():
    assert all(media.photograph(name).is_file() for name in media.PHOTOGRAPHS)
    assert all(media.video(name).is_file() for name in media.VIDEOS)
