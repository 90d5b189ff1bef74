"""bench.cpu_vs_torch on a tiny model, both sides in this process."""

import contextlib
import copy
import json
import os
import sys

import numpy as np
import pytest
from helpers_transformers import import_transformers
from reference import tensor_names

from bench import cpu_vs_torch, models, report, turns
from glm4v_jax import Glm4vConfig

pytestmark = pytest.mark.slow

TINY = copy.deepcopy(models.INFERENCE)
TINY["text_config"] |= dict(hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                            num_key_value_heads=1)  # fmt: skip
TINY["vision_config"] |= dict(depth=1, hidden_size=128, num_heads=1, out_hidden_size=256, intermediate_size=96)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return models.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), TINY)


@pytest.fixture(scope="module")
def ours(checkpoint):
    from bench.cpu_sides import Ours

    side = Ours()
    side.load(str(checkpoint))
    return side


@pytest.fixture(scope="module")
def theirs(checkpoint):
    import_transformers()
    from bench.cpu_sides import Theirs

    side = Theirs()
    side.load(str(checkpoint))
    return side


@pytest.mark.parametrize(("config", "millions"), [(models.INFERENCE, (250, 270)), (models.TRAINING, (20, 50))])
def test_models_have_their_size_and_the_heads_of_the_9b(config, millions):
    assert millions[0] * 1e6 < models.num_parameters(config) < millions[1] * 1e6
    config, released = Glm4vConfig.from_dict(config), Glm4vConfig.glm4_1v_9b()
    assert config.text_config.head_dim == released.text_config.head_dim
    assert config.vision_config.head_dim == released.vision_config.head_dim
    assert config.text_config.mrope_section == released.text_config.mrope_section


def test_a_token_reads_the_weights_and_the_cache():
    shapes = tensor_names(Glm4vConfig.from_dict(TINY))
    read = [s for name, s in shapes.items() if len(s) == 2 and ("language_model.layers." in name or "lm_head" in name)]
    assert models.decode_bytes(TINY, 0) == 4 * sum(rows * columns for rows, columns in read)
    more = models.decode_bytes(TINY, 10) - models.decode_bytes(TINY, 0)
    assert more == 4 * 10 * TINY["text_config"]["num_hidden_layers"] * 2 * 128


@pytest.mark.parametrize(
    ("task", "arguments"),
    [("prefill", {"tokens": 20}), ("decode", {"context": 20, "short": 2, "long": 4}),
     ("vision", {"rows": 4, "columns": 4}), ("preprocess", {"together": True})],
)  # fmt: skip
def test_both_sides_do_the_work_of_a_line_in_its_ways(ours, theirs, monkeypatch, task, arguments):
    for side in (ours, theirs):
        monkeypatch.setattr(side, "_photographs", side._photographs[:2])
    mine, other = (getattr(side, task)(**arguments) for side in (ours, theirs))
    lines = [line for line in cpu_vs_torch.LINES if line.work.task == task]
    assert lines and all(line.ours in mine and set(line.theirs) <= set(other) for line in lines)


def test_both_sides_give_the_same_answer(ours, theirs):
    assert ours.answer(20, 5) == theirs.answer(20, 5)
    assert len(ours.answer(20, 5)) == 5


def test_both_sides_prepare_the_same_images(ours, theirs):
    found = ours.processors["slow"](ours._photographs[:2]).pixel_values
    expected = theirs.processors["slow"](theirs._photographs[:2], return_tensors="np").pixel_values
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("side", "work", "name"), [
    ("ours", "prefill", "dot"), ("theirs", "prefill", "aten::addmm"), ("ours", "preprocess", "resize"),
])  # fmt: skip
def test_profiles_name_operations(request, monkeypatch, side, work, name):
    side = request.getfixturevalue(side)
    monkeypatch.setattr(side, "_photographs", side._photographs[:2])
    profile = side.profile(work, {"tokens": 20} if work == "prefill" else {"together": True})
    assert 0 < len(profile) <= turns.PROFILE_LENGTH
    assert any(name in line["name"] for line in profile), profile
    assert profile[0]["milliseconds"] > 0


def test_memory_is_read_at_its_speed(ours):
    (speed,) = ours.bandwidth(40, 2).values()
    assert 1e8 < speed < 1e13


class Stub:
    """A side that takes the same time for everything, and reads memory very fast."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, task, **arguments):
        if task == "answer":
            return [1]
        if task == "facts":
            return dict.fromkeys(("jax", "torch", "python"), "1") | {"processor": "a"}
        if task == "profile":
            return [{"name": arguments["work"], "calls": 1, "milliseconds": 1.0}]
        return dict.fromkeys(("a", "b", "generate", "loop"), 1e30 if task == "bandwidth" else self.seconds)


@pytest.mark.parametrize(("seconds", "passed"), [(1.0, True), (3.0, False)])
def test_a_run_profiles_what_missed_its_aim(monkeypatch, seconds, passed):
    line = cpu_vs_torch.SpeedLine("it", turns.TimedTask("work", {}), 1, "per s", "a", ("b",), 1.0)
    monkeypatch.setattr(cpu_vs_torch, "LINES", (line,))
    figures = cpu_vs_torch.run({"ours": Stub(seconds), "theirs": Stub(2.0)}, TINY, "", 1, 2)
    assert figures["lines"][0]["passed"] == passed
    # Decoding does not reach such a memory's speed, so its profile is there in any case.
    assert not figures["bandwidth"]["passed"] and not figures["passed"]
    assert [title.split()[0] for title in figures["profiles"]] == (["decode"] if passed else ["work", "decode"])
    assert json.loads(json.dumps(figures)) == figures
    assert len(cpu_vs_torch.tables(figures)[0].rows) == 2


def test_a_record_keeps_the_ratios_of_other_processors():
    def run(processor, ratio):
        line = {"what": "it", "ratio": {"median": ratio}}
        facts = {"processor": processor, "jax": "1"}
        return {"machine": {"ours": facts}, "rounds": 3, "lines": [line], "bandwidth": line | {"what": "reads"}}

    assert cpu_vs_torch.others(run("a", 1.0), None) == []
    first = run("a", 1.0)  # as by an earlier version, which kept none
    second = run("b", 2.0)
    second["others"] = cpu_vs_torch.others(second, first)
    assert [(one["processor"], one["ratios"]["it"]["median"]) for one in second["others"]] == [("a", 1.0)]
    # A run replaces the one of its own processor.
    assert [one["processor"] for one in cpu_vs_torch.others(run("a", 3.0), second)] == ["b"]
    # One of an emulated processor joins the others, once.
    for ratio in (4.0, 5.0):
        second = cpu_vs_torch.with_ratios(second, run("b, emulated", ratio))
    assert second["machine"] == run("b", 2.0)["machine"]
    kept = [(one["processor"], one["ratios"]["it"]["median"]) for one in second["others"]]
    assert kept == [("a", 1.0), ("b, emulated", 5.0)]


def test_an_emulated_processor_confines_both_sides_and_joins_a_record(monkeypatch, tmp_path, capsys):
    """The command, with sides that tell their environment."""
    seen, one = {}, cpu_vs_torch.EMULATIONS["AVX2"]

    @contextlib.contextmanager
    def start(commands):
        seen.update({name: os.environ.get(name) for name in one})
        yield {"ours": Stub(1.0), "theirs": Stub(2.0)}

    monkeypatch.setattr(turns, "start", start)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(models, "INFERENCE", TINY)
    monkeypatch.setattr(os, "environ", {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"})
    line = cpu_vs_torch.SpeedLine("it", turns.TimedTask("work", {}), 1, "per s", "a", ("b",), 1.0)
    monkeypatch.setattr(cpu_vs_torch, "LINES", (line,))
    monkeypatch.setattr(sys, "argv", ["cpu_vs_torch", "--isa", "AVX2", "--rounds", "1"])
    with pytest.raises(SystemExit):
        cpu_vs_torch.main()
    assert "no record 'cpu_vs_torch'" in " ".join(capsys.readouterr().err.split()) and not seen
    monkeypatch.setattr(sys, "argv", ["cpu_vs_torch", "--rounds", "1"])
    cpu_vs_torch.main()
    monkeypatch.setattr(sys, "argv", ["cpu_vs_torch", "--isa", "AVX2", "--rounds", "1"])
    assert cpu_vs_torch.main() == 1  # no memory is as fast as that of the stubs
    assert seen == one | {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false --xla_cpu_max_isa=AVX2"}
    record = report.read("cpu_vs_torch")
    assert record["machine"]["ours"]["processor"] == "a"
    assert [run["processor"] for run in record["others"]] == ["a, emulated AVX2"]
