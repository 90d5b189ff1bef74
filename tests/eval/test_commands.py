"""Runs with random weights: interrupted ones and those of several processes have the same figures."""

import dataclasses
import json
import os
import shutil
import time

import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_orbax import free_port
from helpers_processes import ForkedProgram

from eval.commands import RunTasks, main
from eval.results import ANSWERS, REPORT, RESULTS, SUMMARY, read_results
from eval.tasks import find_task
from glm4v_jax.console.options import ModelOptions, SamplingOptions
from glm4v_jax.errors import MemoryShortageError

COUNT = 12
TASK = """
metric = "exact_match"
prompt = "{{ question }} In a word."

[options]
max_new_tokens = 40
do_sample = true
temperature = 0.8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions in two groups, some about an image, one of which is damaged after its header."""
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "noise.png")
    (folder / "broken.png").write_bytes((folder / "noise.png").read_bytes()[:2000])
    rows = [
        {"id": f"q{n}", "question": f"What is {n}?", "answer": "seven", "group": "odd" if n % 2 else "even"}
        for n in range(COUNT)
    ]
    for number in (1, 4):
        rows[number]["image"] = "noise.png"
    rows[7]["image"] = "broken.png"
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "words.toml").write_text(TASK, encoding="utf-8")
    return folder


def arguments(folder, out, *more):
    task, data = folder / "words.toml", folder / "data.jsonl"
    given = ["--model", RANDOM_CHECKPOINT, "--task", task, "--data", data, "--out", folder / out, "--slots", 2, *more]
    return [str(argument) for argument in given]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(folder):
    assert main(arguments(folder, "whole")) == 1  # as one item has failed
    return folder / "whole"


def test_every_item_has_a_result(whole, folder):
    summary = json.loads((whole / SUMMARY).read_text())
    assert next(iter(summary)) == "score"
    results = read_results(whole / RESULTS)
    assert [result.id for result in results] == [f"q{n}" for n in range(COUNT)]
    assert sorted(line["id"] for line in lines(whole / ANSWERS)) == sorted(result.id for result in results)
    (failed,) = (result for result in results if result.category == "error")
    assert failed.id == "q7" and "broken.png" in failed.error and failed.score == 0
    assert all(result.new_tokens and result.prompt_tokens and result.output for result in results if not result.error)
    assert summary["count"] == COUNT and summary["rates"]["error"] == pytest.approx(1 / COUNT)
    assert summary["score"] == summary["mean"] == sum(result.score for result in results) / COUNT
    assert summary["groups"]["odd"]["count"] == summary["groups"]["even"]["count"] == COUNT // 2
    assert summary["truncated_share"] == sum(result.is_truncated for result in results) / COUNT > 0
    assert summary["tokens"]["new"] == sum(result.new_tokens for result in results)
    assert summary["options"]["max_new_tokens"] == 40 and summary["model"] == str(RANDOM_CHECKPOINT)
    assert (whole / REPORT).read_text(encoding="utf-8").count("data:image/") >= 2


def test_a_finished_run_answers_failed_items_again(whole, folder, capsys):
    """They may have been repaired; the scores are computed again."""
    before = (whole / SUMMARY).read_bytes()
    (whole / SUMMARY).unlink()
    answers = {line["id"]: line for line in lines(whole / ANSWERS)}
    assert main(arguments(folder, "whole", "--no-report", "--json")) == 1
    assert (whole / SUMMARY).read_bytes() == before
    assert json.loads(capsys.readouterr().out) == json.loads(before)
    assert {line["id"]: line for line in lines(whole / ANSWERS)} == answers


def test_a_killed_run_resumes_to_the_same_summary(whole, folder):
    running = ForkedProgram(["-m", "eval", *arguments(folder, "killed", "--slots", "1")], env=os.environ)
    answers, deadline = folder / "killed" / ANSWERS, time.monotonic() + 240
    try:
        while not answers.exists() or answers.read_bytes().count(b"\n") < 3:
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        running.kill()
        running.communicate()
    early = answers.read_bytes().splitlines(keepends=True)
    early = [line for line in early if line.endswith(b"\n") and b'"error"' not in line]
    assert 2 <= len(early) < COUNT and not (folder / "killed" / SUMMARY).exists()
    assert main(arguments(folder, "killed")) == 1
    assert answers.read_bytes().splitlines(keepends=True)[: len(early)] == early  # nothing is asked twice
    assert (folder / "killed" / SUMMARY).read_bytes() == (whole / SUMMARY).read_bytes()
    assert (folder / "killed" / RESULTS).read_bytes() == (whole / RESULTS).read_bytes()


def test_two_processes_give_the_summary_of_one(whole, folder):
    port = free_port()
    several = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    started = [
        ForkedProgram(["-m", "eval", *arguments(folder, "two", *several, str(index), "--mesh", "data=2")], text=True)
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [1, 1], printed
    assert "eval: error: 1 of 12 items failed" in printed[0][1] and printed[1][0] == ""
    assert (folder / "two" / SUMMARY).read_bytes() == (whole / SUMMARY).read_bytes()
    assert (folder / "two" / RESULTS).read_bytes() == (whole / RESULTS).read_bytes()


def copied(folder, whole, name):
    shutil.copytree(whole, folder / name)
    return folder / name


def test_the_first_items_of_a_run_are_scored_without_the_model(whole, folder, monkeypatch):
    out = copied(folder, whole, "part")
    monkeypatch.setattr("glm4v_jax.console.options.ModelOptions.load", pytest.fail)
    assert main(arguments(folder, "part", "--limit", "3", "--no-report")) == 0
    assert json.loads((out / SUMMARY).read_text())["count"] == 3
    assert len(lines(out / ANSWERS)) == COUNT - 1  # without the error, which would be tried again


@pytest.mark.parametrize("changed", ["model", "image", "prompt", "options", "system"])
def test_a_run_does_not_resume_with_other_answers(whole, folder, tmp_path, capsys, monkeypatch, changed):
    """Whatever has changed under the same name; the files stay as they are."""
    out = copied(folder, whole, f"changed-{changed}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    data = tmp_path / "data"
    data.mkdir()
    for name in ("noise.png", "broken.png", "data.jsonl", "words.toml"):
        shutil.copyfile(folder / name, data / name)
    model, more = tmp_path / "model", []
    shutil.copytree(RANDOM_CHECKPOINT, model)
    if changed == "model":
        path = next(model.glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-100:] = bytes(100)
        path.write_bytes(content)
    elif changed == "image":
        PIL.Image.new("RGB", (84, 56)).save(data / "noise.png")
    elif changed == "prompt":
        (data / "words.toml").write_text(TASK.replace("In a word", "In two words"), encoding="utf-8")
    else:
        more = ["--system", "Be brief."] if changed == "system" else ["--temperature", "0.7"]
    monkeypatch.setattr("glm4v_jax.console.options.ModelOptions.load", pytest.fail)
    given = ["--model", model, "--task", data / "words.toml", "--data", data / "data.jsonl", "--out", out, *more]
    assert main([str(argument) for argument in given]) == 1
    assert "found the answer to another prompt or with other options" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_options_of_the_command_replace_those_of_the_task():
    task = dataclasses.replace(find_task("chartqa"), options={})
    assert task.preset == "bench"

    def asked(**sampling):
        model = ModelOptions(directory=str(RANDOM_CHECKPOINT))
        return RunTasks(model=model, sampling=SamplingOptions(**sampling))._with_options(task)

    assert "max_new_tokens" not in asked().options
    short = asked(max_new_tokens=4).options
    assert (short["max_new_tokens"], short["think_budget"], short["answer_budget"]) == (4, None, None)
    assert asked(preset="greedy").options["max_new_tokens"] == 2048
    assert asked(system="Be brief.").system == "Be brief."


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], "--limit: found 0; expected an integer of at least 1"),
        (["--slots", "0"], "--slots: found 0; expected an integer of at least 1"),
        (["--model", "nowhere"], "nowhere"),
        (["--task", "nothing"], "--task: found 'nothing'; expected"),
        (["--task", "digits-vqa"], "--data: found with 2 tasks; expected it with one --task"),
        (["--preset", "nothing"], "nothing"),
        ([], "found 1 MB; expected 2 MB"),
    ],
)
def test_errors_come_before_the_model_is_loaded(folder, monkeypatch, capsys, more, message):
    def load(*_):  # without an error before it
        raise MemoryShortageError("found 1 MB; expected 2 MB")

    monkeypatch.setattr("glm4v_jax.console.options.ModelOptions.load", load)
    assert main(arguments(folder, "never", *more)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval: error: ") and message in line
    assert not (folder / "never").exists()
