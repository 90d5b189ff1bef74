"""The measurements measure: on reduced sets, and on wrong answers, which they must not let pass."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from helpers_transformers import import_transformers

from bench import eval as evaluation
from bench import install, media, memory, recompile, report, turns
from glm4v_jax import Glm4vForConditionalGeneration, Glm4vProcessor
from glm4v_jax.generate.warmup import warmup
from glm4v_jax.tiny import TINY_CHECKPOINT

VISION = memory.vision_config()


@pytest.fixture(scope="module")
def parity():
    import_transformers()
    from bench import parity

    return parity


@pytest.fixture(scope="module")
def reference(parity):
    from bench import reference

    return reference


@pytest.fixture(scope="module")
def models(reference, tmp_path_factory):
    path = reference.write_checkpoint("packaged", tmp_path_factory.mktemp("parity"))
    return reference.load_model(path), Glm4vForConditionalGeneration.from_pretrained(path)


@pytest.fixture(scope="module")
def processors(reference):
    return reference.load_processor(TINY_CHECKPOINT), Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)


def test_a_result_is_json_without_names_of_this_machine(tmp_path):
    facts = report.machine_facts("jax", "numpy")
    path = report.write_result("some", {"machine": facts, "passed": True}, tmp_path / "results")
    assert path == tmp_path / "results" / "some.json"
    assert json.loads(path.read_text()) == {"machine": facts, "passed": True}
    assert set(facts) == {"cores", "system", "python", "jax", "numpy"}


def test_a_batch_through_processors_and_models(parity, processors, models):
    conversations = [parity._user(parity._text("Hi")), parity._user(parity._crop("chelsea.png", (0, 0, 90, 60)))]
    line = parity.compare_case("both", conversations, "right", processors, models, new_tokens=4)
    assert line.passed
    assert line.inputs_equal
    assert (line.prompts, line.greedy_tokens, line.patches) == (2, 8, 6 * 8)
    assert 0 < line.logit_difference < line.smallest_margin < 1


def test_every_way_to_be_wrong_fails_a_line(parity):
    right = parity.ModelLine(
        case="", prompts=1, tokens=9, patches=0, inputs_equal=None, positions_equal=True, logit_difference=1e-6,
        greedy_equal=64, greedy_tokens=64, distinct_tokens=9, smallest_margin=1e-3,
    )  # fmt: skip
    assert right.passed
    for wrong in (
        dict(inputs_equal=False), dict(positions_equal=False), dict(logit_difference=1.1e-5), dict(greedy_equal=63),
        dict(distinct_tokens=1), dict(smallest_margin=1e-7), dict(logit_difference=float("nan")),
    ):  # fmt: skip
        assert not dataclasses.replace(right, **wrong).passed, wrong
    picture = parity.PixelLine("", (1, 1), [1, 2, 2], True, 0, 0.0, 0, 1e-6)
    assert picture.passed
    for wrong in (dict(grids_equal=False), dict(resize_steps=1), dict(pixel_difference=2e-6)):
        assert not dataclasses.replace(picture, **wrong).passed, wrong


def test_other_weights_are_noticed(parity, processors, models):
    packaged = Glm4vForConditionalGeneration.from_pretrained(TINY_CHECKPOINT)
    conversations = [parity._user(parity._text("Hi"))]
    line = parity.compare_case("wrong", conversations, "left", processors, (models[0], packaged), new_tokens=2)
    assert line.logit_difference > 1e-2
    assert not line.passed


def test_a_photograph_and_a_film_through_both_processors(parity, processors):
    picture = parity.compare_picture("chelsea.png", processors)
    assert picture.passed
    assert (picture.size, picture.grid) == ((300, 451), [1, 22, 32])
    film = parity.compare_video("carphone_distorted.mp4", processors)
    assert film.passed
    assert (film.size, film.grid) == ((120, 144, 176), [4, 10, 12])


def test_another_filter_is_noticed(parity, processors):
    bilinear = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT, resample=2)
    line = parity.compare_picture("chelsea.png", (processors[0], bilinear))
    assert line.resize_steps > 1
    assert not line.passed


def test_help_measures_nothing(parity, monkeypatch, capsys):
    for module in (parity, install):
        monkeypatch.setattr(sys, "argv", ["it", "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0 and "usage: python -m bench." in capsys.readouterr().out


def test_an_installation_is_told_and_judged(tmp_path, monkeypatch, capsys):
    figures = {
        "machine": report.machine_facts(), "bytes": 5e8, "packages": 40, "largest_packages": {"jax": 7e6},
        "install_seconds": 60.0, "import_seconds": 0.1, "import_model_seconds": 2.0, "first_token_seconds": 9.0,
        "first_token_seconds_all": [8.0, 9.0, 10.0], "first_token_cpu_seconds": 9.0, "reference_packages_found": [],
        "load_average_before": 0.0,
    }  # fmt: skip
    write = report.write_result
    monkeypatch.setattr(report, "write_result", lambda name, told: write(name, told, tmp_path))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["install"])
    for found, status in (([], 0), (["torch"], 1)):
        monkeypatch.setattr(install, "measure", lambda _, found=found: figures | {"reference_packages_found": found})
        assert install.main() == status
        out = capsys.readouterr().out
        assert "500 MB" in out and ("FAIL" in out) == bool(found)
        assert json.loads((tmp_path / "install.json").read_text())["reference_packages_found"] == found


def test_a_side_of_a_comparison_has_its_public_methods_as_tasks(monkeypatch):
    served = {}
    monkeypatch.setattr(sys, "argv", ["side", "--threads", "1"])
    monkeypatch.setattr(turns, "use_cores", lambda count: served.update(cores=count))
    monkeypatch.setattr(turns, "serve", served.update)
    from bench.eval_ours import Ours

    turns.main(Ours)
    assert served.keys() == {"cores", "facts", "load", "answer"} and served["cores"] == 1
    assert turns.slowest([("a", 1.5), ("b", 2.0), ("a", 1.0)]) == [
        {"name": "a", "calls": 2, "milliseconds": 2.5}, {"name": "b", "calls": 1, "milliseconds": 2.0},
    ]  # fmt: skip


def test_all_named_files_exist():
    assert all(media.photograph(name).is_file() for name in media.PHOTOGRAPHS)
    assert all(media.video(name).is_file() for name in media.VIDEOS)


def test_requests_are_counted_with_their_compilations_and_padding(monkeypatch):
    processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    model = Glm4vForConditionalGeneration.from_pretrained(TINY_CHECKPOINT)
    heard = recompile.Compilations()
    first, again = (recompile.send(model, processor, np.random.default_rng(30), heard) for _ in range(2))
    assert again.compiled == []

    def careless(input_ids, **_):
        jax.jit(lambda x: x * 3 + 1)(input_ids)

    monkeypatch.setattr(model, "generate", careless)
    assert len(recompile.send(model, processor, np.random.default_rng(30), heard).compiled) == 1
    assert dataclasses.replace(first, seconds=0, compiled=[]) == dataclasses.replace(again, seconds=0, compiled=[])
    assert 0 < first.prompt_tokens <= first.prompt_bucket
    assert 0 <= first.patches <= first.row_patches
    assert recompile.padded_share(first.prompt_tokens, first.prompt_bucket) < 1
    assert recompile.warmed_rows(warmup(model, prompt_lengths=(1, 2), max_new_tokens=2))[0][:2] == ("prefill", 1)


def test_requests_are_mixed():
    rng = np.random.default_rng(0)
    kinds = [[item["type"] for item in recompile.random_messages(rng)[0][0]["content"]] for _ in range(40)]
    assert {types.count("image") for types in kinds} == {0, 1, 2, 3, 4}
    assert {types.count("video") for types in kinds} == {0, 1}
    assert any("image" in types and "video" in types for types in kinds)


def test_the_fit_tells_linear_from_quadratic():
    sizes = np.array([1000, 2000, 4000])
    assert memory.growth_exponent(sizes, 7 * sizes) == pytest.approx(1)
    assert memory.growth_exponent(sizes, 7 * sizes**2) == pytest.approx(2)
    assert memory.growth_exponent(sizes, 7 * (sizes - 500), baseline=500) == pytest.approx(1)
    # A quadratic part that is an eighth of the smallest measurement is too much.
    assert memory.growth_exponent(sizes, sizes + sizes**2 / 7000) > memory.MAX_EXPONENT


def test_plans_end_at_a_4k_picture_and_a_32k_prompt():
    assert memory.PLANS["picture"].sizes == (6144, 12288, 24576)
    assert memory.PLANS["prompt"].sizes == (8192, 16384, 32768)
    assert all(plan.sizes == (n := plan.sizes[0], 2 * n, 4 * n) for plan in memory.PLANS.values())
    assert all(rows * columns == patches for patches, (rows, columns) in memory.GRIDS.items())
    assert memory.vision_config().depth == 24


def test_peak_memory_counts_what_was_touched():
    before = memory.peak_bytes()
    held = np.ones(before + 50_000_000, np.uint8)
    assert memory.peak_bytes() >= before + 50_000_000
    del held


@pytest.mark.parametrize("task", ["picture", "prompt", "gradient"])
def test_a_task_runs_and_prints_its_peak(task, monkeypatch, capsys):
    if task != "prompt":
        monkeypatch.setattr(memory, "vision_config", lambda: dataclasses.replace(VISION, depth=1))
    monkeypatch.setattr(sys, "argv", ["memory", "--task", task, "--size", "1024"])
    assert memory.main() == 0
    assert int(capsys.readouterr().out) > 50_000_000


def test_a_plan_is_measured_and_judged(monkeypatch):
    peaks = {10: 400, 110: 500, 210: 600, 410: 800}
    monkeypatch.setattr(memory, "measure", lambda task, size: (peaks[size], 1.0))
    plan = memory.Plan("", 10, (110, 210, 410), True)
    figures = memory.run("picture", plan)
    assert figures["increment_bytes"] == [100, 200, 400]
    assert figures["passed"]
    assert len(memory.rows(figures)) == 4
    peaks[410] = 2000
    assert not memory.run("picture", plan)["passed"]
    assert memory.run("picture", plan._replace(limited=False))["passed"]


def workers_of(seconds, texts):
    """Sides whose turns at each task take so many seconds, and which then say this."""
    turns = {side: dict.fromkeys(evaluation.TASKS, ()) for side in seconds}

    def worker_of(side):
        def worker(task, *, of, count, **_):
            assert (task, count) == ("answer", 4)
            turns[side][of] += (seconds[side][len(turns[side][of])],)
            return {"seconds": turns[side][of][-1], "texts": texts[side], "tokens": 9}

        return worker

    return {side: worker_of(side) for side in seconds}


SAME = {"ours": ["<answer>1</answer>", "2", "3", "4"], "theirs": ["<answer>1", "2</answer><|endoftext|>", " 3\n", "4"]}


def test_what_counts_of_an_answer_ends_with_it():
    shown, hidden = "<think>Hm.</think><answer>\n3 </answer>\n<|user|>", "<think>Hm.</think><answer>\n3 "
    assert evaluation.said(shown) == evaluation.said(hidden) == "<think>Hm.</think><answer>\n3"
    assert evaluation.said("</answer>3") == "" != evaluation.said("<answer>3")


def test_evaluations_are_compared_within_a_round():
    """The first one does not count, whatever it took."""
    workers = workers_of({"ours": (90, 1, 2, 4), "theirs": (1, 3, 2, 16)}, SAME)
    lines = evaluation.compare(workers, rounds=3, count=4)
    assert [line["task"] for line in lines] == list(evaluation.TASKS)
    for line in lines:
        assert line["ratio"] == {"median": 3, "min": 1, "max": 4}  # of the medians it would be 1.5
        assert line["ours"] == {"median": 2, "min": 1, "max": 4}
        assert line["theirs"] == {"median": 4 / 3, "min": 1 / 4, "max": 2}
        assert (line["items"], line["same_answers"], line["passed"]) == (4, 4, True)
    cells = ("2.0", "1.3", "3.00 [1.00, 4.00]", f"{evaluation.AIM:.1f}", "4 of 4", report.verdict(True))
    assert evaluation.rows(lines) == [(task, *cells) for task in evaluation.TASKS]


def test_evaluations_that_differ_or_are_slow_fail():
    aim = evaluation.AIM
    for seconds, texts, expected in (
        (aim, SAME, (4, True)),
        (aim * 0.99, SAME, (4, False)),
        (aim, {**SAME, "ours": ["<answer>1</answer>", "2", "3", "5"]}, (3, False)),
    ):
        workers = workers_of({"ours": (1, 1), "theirs": (1, seconds)}, texts)
        lines = evaluation.compare(workers, rounds=1, count=4)
        assert [(line["same_answers"], line["passed"]) for line in lines] == [expected] * len(evaluation.TASKS)
        same, passed = expected
        assert {row[-2:] for row in evaluation.rows(lines)} == {(f"{same} of 4", report.verdict(passed))}
    with pytest.raises(ValueError, match="zip"):  # an answer is lacking
        evaluation.compare(workers_of({"ours": (1, 1), "theirs": (1, 9)}, {**SAME, "ours": ["1"]}), rounds=1, count=4)
