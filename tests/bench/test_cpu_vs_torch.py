"""The comparison with torch compares: both sides for real on a tiny model, and the judging on made-up times."""

import copy
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers_transformers import import_transformers
from reference import tensor_names

from bench import cpu_model, cpu_vs_torch, report, turns
from glm4v_jax import Glm4vConfig

TINY = copy.deepcopy(cpu_model.CONFIG)
TINY["text_config"] |= dict(hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                            num_key_value_heads=1)  # fmt: skip
TINY["vision_config"] |= dict(depth=1, hidden_size=128, num_heads=1, out_hidden_size=256, intermediate_size=96)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    cpu_model.write_checkpoint(directory, TINY)
    return directory


@pytest.fixture(scope="module")
def ours(checkpoint):
    from bench.cpu_ours import Ours

    side = Ours()
    side.load(str(checkpoint))
    return side


@pytest.fixture(scope="module")
def theirs(checkpoint):
    import_transformers()
    from bench.cpu_theirs import Theirs

    side = Theirs()
    side.load(str(checkpoint))
    return side


def test_the_model_has_the_promised_size_and_shape():
    assert 250e6 < cpu_model.num_parameters(cpu_model.CONFIG) < 270e6
    config = Glm4vConfig.from_dict(cpu_model.CONFIG)
    released = Glm4vConfig.glm4_1v_9b()
    assert config.text_config.head_dim == released.text_config.head_dim
    assert config.vision_config.head_dim == released.vision_config.head_dim
    assert config.text_config.mrope_section == released.text_config.mrope_section


def test_bytes_of_a_token_are_the_weights_and_the_cache():
    shapes = tensor_names(Glm4vConfig.from_dict(TINY))
    read = [s for name, s in shapes.items() if len(s) == 2 and ("language_model.layers." in name or "lm_head" in name)]
    assert cpu_model.decode_bytes(TINY, 0) == 4 * sum(rows * columns for rows, columns in read)
    more = cpu_model.decode_bytes(TINY, 10) - cpu_model.decode_bytes(TINY, 0)
    assert more == 4 * 10 * TINY["text_config"]["num_hidden_layers"] * 2 * 128


def test_both_sides_do_every_work_the_same_ways(ours, theirs):
    works = {
        "prefill": {"tokens": 20},
        "decode": {"context": 20, "short": 2, "long": 4},
        "vision": {"rows": 4, "columns": 4},
    }
    assert {line.work.task for line in cpu_vs_torch.LINES} == {*works, "preprocess"}
    for line in cpu_vs_torch.LINES:
        if line.work.task in works:
            mine, other = (getattr(side, line.work.task)(**works[line.work.task]) for side in (ours, theirs))
            assert line.ours in mine and set(line.theirs) <= set(other), line.title
    assert ours.answer(20, 5) == theirs.answer(20, 5)
    assert len(ours.answer(20, 5)) == 5


def test_both_sides_prepare_the_same_pictures(ours, theirs, monkeypatch):
    assert len(ours.pictures) == len(theirs.pictures) > 5
    for side in (ours, theirs):
        monkeypatch.setattr(side, "pictures", side.pictures[:2])
    times = {name: side.preprocess(True) for name, side in (("ours", ours), ("theirs", theirs))}
    for line in cpu_vs_torch.LINES:
        if line.work.task == "preprocess":
            assert times["ours"][line.ours] > 0 and times["theirs"][line.theirs[0]] > 0
    found = ours.processors["slow"](ours.pictures).pixel_values
    expected = theirs.processors["slow"](theirs.pictures, return_tensors="np").pixel_values
    np.testing.assert_array_equal(found, expected)


def test_profiles_name_operations(ours, theirs):
    for side, name in ((ours, "dot"), (theirs, "aten::addmm")):
        profile = side.profile("prefill", {"tokens": 20})
        assert 0 < len(profile) <= turns.PROFILE_LENGTH
        assert any(name in line["name"] for line in profile), profile
        assert all(line["milliseconds"] > 0 for line in profile[:1])
    host = ours.profile("preprocess", {"together": True})
    assert any("resize" in line["name"] for line in host), host


def test_bandwidth_is_bytes_a_second(ours):
    (speed,) = ours.bandwidth(40, 2).values()
    assert 1e8 < speed < 1e13


LINE = cpu_vs_torch.Line("", cpu_vs_torch.Work("decode", {}), 6, "", "a", ("slow", "fast"), 1.2)


def times(ours, slow, fast):
    return [
        {"ours": {"a": a}, "theirs": {"slow": b, "fast": c}} for a, b, c in zip(ours, slow, fast, strict=True)
    ]  # fmt: skip


def test_the_fastest_of_their_ways_counts_and_ratios_are_of_one_round():
    figures = cpu_vs_torch.compare(LINE, times([1, 2, 4], [9, 9, 9], [2, 3, 4]))
    assert figures["their_way"] == "fast"
    assert figures["ratio"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert figures["ours"] == {"median": 3, "min": 1.5, "max": 6}
    assert figures["passed"]
    assert not cpu_vs_torch.compare(LINE._replace(aim=1.51), times([1, 2, 4], [9, 9, 9], [2, 3, 4]))["passed"]


def test_the_share_of_bandwidth_is_of_the_best_read():
    size = cpu_vs_torch.compare_bandwidth(TINY, [{"ours": {"generate": 1.0}}], [{"a": {"x": 1.0}}])["bytes_per_token"]
    reads = [{"ours": {"x": size * 2.0}, "theirs": {"y": size * 4.0, "z": size * 3.0}}]
    figures = cpu_vs_torch.compare_bandwidth(TINY, [{"ours": {"generate": 0.5}}], reads)
    assert figures["ratio"]["median"] == 0.5 and not figures["passed"]
    assert cpu_vs_torch.compare_bandwidth(TINY, [{"ours": {"generate": 0.3}}], reads)["passed"]


def test_rounds_take_turns_after_one_for_warming_up():
    calls = []

    def side(name):
        return lambda task, **arguments: calls.append((name, task)) or {"n": len(calls)}

    works = [cpu_vs_torch.Work("x", {}), cpu_vs_torch.Work("y", {})]
    measured = cpu_vs_torch.measure({"ours": side("ours"), "theirs": side("theirs")}, works, 2)
    assert calls == [(name, task) for _ in range(3) for task in "xy" for name in ("ours", "theirs")]
    assert [[round_["ours"]["n"] for round_ in each] for each in measured] == [[5, 9], [7, 11]]


def test_a_run_profiles_what_missed_its_aim(monkeypatch):
    class Side:
        def __init__(self, seconds):
            self.seconds = seconds

        def __call__(self, task, **arguments):
            if task == "answer":
                return [1]
            if task == "profile":
                return [{"name": arguments["work"], "calls": 1, "milliseconds": 1.0}]
            return dict.fromkeys(("a", "b"), 1e30 if task == "bandwidth" else self.seconds)

    line = cpu_vs_torch.Line("it", cpu_vs_torch.Work("work", {}), 1, "per s", "a", ("b",), 1.0)
    monkeypatch.setattr(cpu_vs_torch, "LINES", (line,))
    monkeypatch.setattr(cpu_vs_torch, "DECODE", line._replace(work=cpu_vs_torch.Work("w", {"short": 1, "long": 3})))
    for seconds, passed in ((1.0, True), (3.0, False)):
        figures = cpu_vs_torch.run({"ours": Side(seconds), "theirs": Side(2.0)}, TINY, "", 1, 2)
        assert figures["lines"][0]["passed"] == passed
        # Decoding does not reach such a memory's speed, so its profile is there in any case.
        assert not figures["bandwidth"]["passed"] and not figures["passed"]
        assert [key.split()[0] for key in figures["profiles"]] == (["w"] if passed else ["work", "w"])
        assert json.loads(json.dumps(figures)) == figures
        assert len(cpu_vs_torch.rows(figures)) == 2


ECHO = """
from bench import turns
def double(x): print("noise"); return 2 * x
def fail(): raise SystemExit(3)
turns.serve({"double": double, "fail": fail})
"""


def test_a_worker_answers_and_its_end_is_told(monkeypatch):
    popen = subprocess.Popen

    def start(command, **options):
        assert command[1:] == ["-m", "module", "--threads", "2"]
        return popen([sys.executable, "-c", ECHO], stderr=subprocess.DEVNULL, **options)

    monkeypatch.setattr(turns.subprocess, "Popen", start)
    with turns.Worker("echo", sys.executable, "module", 2) as worker:
        assert worker("double", x=4) == 8
        assert worker("double", x=[1]) == [1, 1]
        with pytest.raises(SystemExit, match="echo: ended in 'fail' with status 3"):
            worker("fail")


def test_cores_are_confined():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    program = "from bench import turns; import os; turns.use_cores(1); print(len(os.sched_getaffinity(0)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=report.ROOT, check=True, text=True, capture_output=True)
    assert done.stdout == "1\n"
    with pytest.raises(SystemExit, match="cores, expected 1000000"):
        turns.use_cores(10**6)


@pytest.mark.parametrize(("clock", "median"), [([0, 0.1, 1, 1.4, 2, 2.2], 0.2), ([0, 0.5, 1, 1.7], 0.6), ([0, 3], 3)])
def test_the_median_time_of_calls_that_begin_within_a_second(clock, median, monkeypatch):
    ticks = iter(clock)
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(ticks))
    assert turns.seconds(io.StringIO, 3) == pytest.approx(median)
    assert next(ticks, None) is None
