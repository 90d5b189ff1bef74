"""Whole jobs with the random checkpoint: they learn, and go on after a kill as if there had been none."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import skimage.data
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax import Engine, Glm4vConfig
from glm4v_jax.checkpoint import open_weights
from glm4v_jax.errors import CheckpointError, ConfigError, DataError
from glm4v_jax.loading import leaf_paths, load_model
from glm4v_jax.lora import LoraConfig, is_lora
from glm4v_jax.mesh import use_mesh
from glm4v_jax.peft import load_adapter
from train.commands import main
from train.config import CheckpointConfig, EvalConfig, load_config
from train.job import ADAPTER, MODEL
from train.log import EVALUATIONS, METRICS, TENSORBOARD, read_log
from train.loop import ANSWERS, CHECKPOINTS, PROFILE, TrainError, train
from train.optimizers import OptimizerConfig

ROOT = Path(__file__).parent.parent.parent
STEPS, EVERY = 9, 2
JOB = f"""
model = {json.dumps(str(RANDOM_CHECKPOINT))}
out = "out"
steps = {STEPS}
freeze = ["vision"]
dtype = "float32"
remat = "none"
mesh = "data=1"

[data]
files = ["data.jsonl"]

[batch]
rows = 2
length = 96
vision_rows = 1
vision_length = 128

[optimizer]
learning_rate = 1e-3
warmup = 2

[checkpoint]
every = {EVERY}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pictures to name, one row that is broken, and a job."""
    folder = tmp_path_factory.mktemp("job")
    rows = []
    for name in ("chelsea", "coffee", "rocket"):
        PIL.Image.fromarray(getattr(skimage.data, name)()).resize((56, 56)).save(folder / f"{name}.png")
    for number in range(11):
        name = ("chelsea", "coffee", "rocket")[number % 3]
        asked = {"role": "user", "content": f"<image>{'?' * (number + 1)}"}
        rows.append({"messages": [asked, {"role": "assistant", "content": name}], "images": [f"{name}.png"]})
    rows.insert(4, {"messages": rows[0]["messages"], "images": []})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "job.toml").write_text(JOB, encoding="utf-8")
    return folder


def job(folder, out, **changes):
    return dataclasses.replace(load_config(folder / "job.toml"), out=str(folder / out), **changes)


def steps(folder, out):
    """What every step came to, without how long it took."""
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_log(folder / out / METRICS)]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    told = []
    result = train(job(folder, "whole"), tell=told.append)
    assert result == (STEPS, True)
    assert sum("data.jsonl:5: field 'images': found 0 for 1 <image> markers" in line for line in told) == 1
    return steps(folder, "whole")


def test_a_job_learns(uninterrupted):
    assert [line["step"] for line in uninterrupted] == list(range(1, STEPS + 1))
    assert uninterrupted[-1]["loss"] < 0.7 * uninterrupted[0]["loss"]
    assert uninterrupted[0]["learning_rate"] == pytest.approx(5e-4)
    assert uninterrupted[-1]["learning_rate"] < 1e-4
    assert all(0 < line["padding"] < 1 and not line["is_skipped"] for line in uninterrupted)


def test_a_job_that_is_done_stays_as_it_is(folder, uninterrupted):
    told = []
    assert train(job(folder, "whole"), tell=told.append) == (STEPS, True)
    assert told[0] == f"going on after step {STEPS}, from {folder / 'whole' / 'checkpoints'}"
    assert told[1].startswith("the result is written: logits differ by ") and len(told) == 2
    assert steps(folder, "whole") == uninterrupted


def test_the_result_is_a_checkpoint(folder, uninterrupted):
    """What was trained has changed, what was frozen has not, and the engine takes it as it is."""
    directory = folder / "whole" / MODEL
    before, after = open_weights(RANDOM_CHECKPOINT), open_weights(directory)
    assert set(before) == set(after)
    for name in before:
        is_equal = np.array_equal(before.read(name), after.read(name))
        is_frozen = ".visual." in f".{name}" and ".merger." not in name
        assert is_equal == is_frozen, name
        assert before[name].dtype == after[name].dtype
    prompt = [{"role": "user", "content": [{"type": "image", "path": str(folder / "rocket.png")}]}]
    assert 0 < len(Engine.from_pretrained(directory).generate(prompt, max_new_tokens=3).tokens) <= 3


def test_an_adapter_is_trained_alone(folder):
    config = job(folder, "adapter", lora=LoraConfig(rank=2, alpha=4.0), steps=3)
    assert train(config) == (3, True)
    losses = [line["loss"] for line in steps(folder, "adapter")]
    assert losses[0] == pytest.approx(7.63, abs=0.05) and losses[2] < losses[0]
    with use_mesh():
        model = load_model(RANDOM_CHECKPOINT, Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT))
        adapted = load_adapter(model, folder / "adapter" / ADAPTER)
    assert {path for path in leaf_paths(adapted) if is_lora(path)}
    found = np.asarray(adapted.language_model.layers.stacked.self_attn.q_proj.lora_b[...])
    assert np.abs(found).max() > 0


def test_sigterm_saves_and_the_job_goes_on_bit_for_bit(folder, uninterrupted):
    def stop(line):
        if line.startswith("step 3 "):  # which is said when the fourth is under way
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(job(folder, "stopped"), tell=stop) == (4, False)
    assert steps(folder, "stopped") == uninterrupted[:4]
    assert train(job(folder, "stopped")) == (STEPS, True)
    assert steps(folder, "stopped") == uninterrupted


def test_a_killed_job_goes_on_bit_for_bit(folder, uninterrupted):
    """By the command, killed behind a step that no checkpoint has: its line is written anew."""
    (folder / "killed.toml").write_text(JOB.replace('"out"', '"killed"'), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "train", str(folder / "killed.toml")]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while len(steps(folder, "killed")) < 2 * EVERY + 1:
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        running.kill()
        running.wait()
    assert 2 * EVERY + 1 <= len(steps(folder, "killed")) < STEPS
    told = []
    assert train(job(folder, "killed"), tell=told.append) == (STEPS, True)
    assert told[0].startswith("going on after step ")
    assert steps(folder, "killed") == uninterrupted


def test_a_job_looks_at_what_it_does_not_learn_from(folder):
    """Of the data held back: loss, answers and their score; and the best of the models is the result."""
    looked = EvalConfig(share=0.3, every=2, generate=2, max_new_tokens=8)
    config = job(
        folder, "looked", eval=looked, steps=5, checkpoint=CheckpointConfig(every=100, keep=1, best="loss"),
        optimizer=OptimizerConfig(learning_rate=0.3, warmup=1, schedule="constant", clip_norm=None), tensorboard=True,
    )  # fmt: skip
    told = []
    assert train(config, profile=1, tell=told.append) == (5, True)
    found = read_log(folder / "looked" / EVALUATIONS)
    assert [line["step"] for line in found] == [2, 4, 5]
    best = min(found, key=lambda line: line["loss"])["step"]
    kept = {int(path.name) for path in (folder / "looked" / CHECKPOINTS).iterdir()}
    assert kept == {best, 5}
    assert best == 5 or f"the result is that of step {best}, the best by loss" in told
    for step in (2, 4, 5):
        lines = (folder / "looked" / ANSWERS / f"step-{step:08d}.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        assert [answer.keys() for answer in answers] == [{"source", "expected", "answer", "score"}] * 2
        assert all(answer["expected"] in ("chelsea", "coffee", "rocket") for answer in answers)
    assert all(line["score"] in (0.0, 0.5, 1.0) for line in found)
    assert list((folder / "looked" / PROFILE).rglob("*.xplane.pb"))
    assert list((folder / "looked" / TENSORBOARD).iterdir())
    bad = [line for line in told if "data.jsonl:" in line]
    assert bad and all("data.jsonl:5: field 'images'" in line for line in bad)

    # The loss of the result is that which was found for it: the weights are float32, and written as bfloat16.
    again = dataclasses.replace(config, model=str(folder / "looked" / MODEL), out=str(folder / "again"), steps=1)
    still = OptimizerConfig(learning_rate=1e-12, warmup=0)
    train(dataclasses.replace(again, optimizer=still, tensorboard=False))
    (line,) = read_log(folder / "again" / EVALUATIONS)
    assert line["loss"] == pytest.approx(min(line["loss"] for line in found), rel=2**-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[eval]", "eval: found files of 0 names and a share of 0.0; expected one of them"),
        ('[eval]\nfiles = ["a.jsonl"]\nshare = 0.5', "eval: found files of 1 names and a share of 0.5"),
        ("[eval]\nshare = 1.5", "eval.share: found 1.5"),
        ("[eval]\nshare = 0.5\nevery = 0", "eval.every: found 0; expected a number above 0"),
        ('[checkpoint]\nbest = "loss"', "checkpoint.best: found 'loss' without .eval.; expected both"),
        ('[checkpoint]\nbest = "score"\n[eval]\nshare = 0.5', "checkpoint.best: found 'score' with eval.generate = 0"),
    ],
)
def test_what_is_wrong_with_an_evaluation_is_named(tmp_path, text, message):
    path = tmp_path / "job.toml"
    path.write_text(JOB.replace("[checkpoint]\nevery = 2", "") + text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_another_job_does_not_go_on_from_here(folder, uninterrupted):
    with pytest.raises(CheckpointError, match="cannot go on from this checkpoint"):
        train(job(folder, "whole", freeze=("vision", "llm")))


def test_a_job_ends_where_it_cannot_go_on(folder):
    with pytest.raises(TrainError, match=r"step 2: found gradients of norm .*, and 2 steps like that"):
        train(job(folder, "spikes", max_grad_norm=1e-6, max_skipped=2))
    data = dataclasses.replace(load_config(folder / "job.toml").data, bad_rows="error")
    with pytest.raises(DataError, match=r"data\.jsonl:5: field 'images'"):
        train(job(folder, "strict", data=data))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps =", "stepps =", "stepps: found an unknown field; expected some of model, out"),
        (f"steps = {STEPS}", "steps = 1.5", "steps: found 1.5; expected int"),
        (f"steps = {STEPS}", "steps = 0", "steps: found 0; expected a number above 0"),
        ("steps =", "[data]\nsteps =", "cannot|Cannot|declare"),
        ('freeze = ["vision"]', 'freeze = ["vit"]', "freeze: found 'vit'; expected some of vision, merger, llm"),
        ('freeze = ["vision"]', 'freeze = "vision"', "freeze: found 'vision'; expected a list"),
        ('dtype = "float32"', 'dtype = "int8"', "dtype: found 'int8'; expected one of 'float32', 'bfloat16'"),
        ('files = ["data.jsonl"]', "files = []", "data.files: found none"),
        ('files = ["data.jsonl"]', "", "data.files: found nothing; expected a value"),
        ("rows = 2", "rows = true", "batch.rows: found True; expected int"),
        (
            "learning_rate = 1e-3",
            "group_learning_rates = 3",
            "optimizer.group_learning_rates: found 3; expected a table",
        ),
    ],
)
def test_what_is_wrong_with_a_job_is_named(folder, tmp_path, capsys, old, new, message):
    assert old in JOB
    path = tmp_path / "job.toml"
    path.write_text(JOB.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert main([str(path)]) == 1
    assert capsys.readouterr().err == f"train: error: {error.value}\n"


def test_paths_are_relative_to_the_job(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config(folder / "job.toml")
    assert config.data.files == (str(folder / "data.jsonl"),) and config.out == str(folder / "out")
    assert config.optimizer.learning_rate == 1e-3 and config.batch.rows == 2 and config.freeze == ("vision",)
    with pytest.raises(ConfigError, match=r"nowhere\.toml: there is no such file"):
        load_config("nowhere.toml")
