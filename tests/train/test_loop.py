"""Whole jobs with the random checkpoint: they train, and resume after a kill as if there had been none."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import time
import types

import numpy as np
import PIL.Image
import pytest
import skimage.data
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_processes import ForkedProgram

from glm4v_jax import Engine, Glm4vConfig
from glm4v_jax.checkpoints.adapter import load_adapter
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.checkpoints.safetensors import SafetensorsFile
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.errors import CheckpointError, ConfigError, DataError
from glm4v_jax.files import to_json
from glm4v_jax.model.lora import is_lora
from glm4v_jax.model.params import leaf_paths
from train.config import ADAPTER, MODEL, AdapterConfig, CheckpointConfig, EvalConfig, load_config
from train.data.records import read_records
from train.evaluate import Evaluation, Evaluator
from train.job import read_data
from train.log import EVALUATIONS, METRICS, MetricsLog, read_log, truncate
from train.loop import _Steps, train
from train.optimizers import OptimizerConfig
from train.output import ANSWERS, CHECKPOINTS, EPOCHS, PROFILE, TrainError
from train.profiler import Profiler
from train.trackers import TENSORBOARD

pytestmark = pytest.mark.slow

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
    """Eleven images to name, one invalid row, and a job."""
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
    PIL.Image.fromarray(skimage.data.chelsea()).resize((168, 168)).save(folder / "large.png")
    large = rows[0] | {"images": ["large.png"]}
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, [rows[1], large, *rows[2:4]])), encoding="utf-8")
    rows[-1]["messages"][0]["content"] += "!"
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "job.toml").write_text(JOB, encoding="utf-8")
    return folder


def job(folder, out, **changes):
    return dataclasses.replace(load_config(folder / "job.toml"), out=str(folder / out), **changes)


def steps(folder, out):
    """The metrics of every step, without times."""
    timed = ("seconds", "compile_seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_log(folder / out / METRICS)]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    told = []
    result = train(job(folder, "whole"), log=told.append)
    assert result == (STEPS, True)
    assert sum("data.jsonl:5: images: found 0 for 1 <image> marker" in line for line in told) == 1
    assert any(line.endswith("12 records to train on; one device, cpu") for line in told)
    assert "compiling 1 of 1: training step" in told
    first, *_, last = read_log(folder / "whole" / METRICS)
    assert first["compile_seconds"] > 0 == last["compile_seconds"]
    assert told[-2] == (
        f"{STEPS} steps in this run, 0 of all skipped; rows read: {round(12 * last['epoch'])}, of which 0 were too "
        f"long and {last['rows_skipped']} could not be read"
    )
    return steps(folder, "whole")


def test_the_loss_falls_over_a_job(uninterrupted):
    assert [line["step"] for line in uninterrupted] == list(range(1, STEPS + 1))
    assert uninterrupted[-1]["loss"] < 0.7 * uninterrupted[0]["loss"]
    assert uninterrupted[0]["learning_rate"] == pytest.approx(5e-4)
    assert uninterrupted[-1]["learning_rate"] < 1e-4
    assert all(0 < line["padding"] < 1 and not line["is_skipped"] for line in uninterrupted)
    assert all(2 <= line["samples"] <= 10 for line in uninterrupted)  # of 20 to 30 tokens, in two rows of 96
    assert uninterrupted[-1]["epoch"] > 2 and uninterrupted[-1]["rows_skipped"] >= 2


def test_a_finished_job_takes_no_further_step(folder, uninterrupted):
    told = []
    assert train(job(folder, "whole"), log=told.append) == (STEPS, True)
    assert told[1] == f"resuming after step {STEPS}, from {folder / 'whole' / 'checkpoints'}"
    assert told[2].startswith("exported: relative difference of the logits ") and len(told) == 3
    assert steps(folder, "whole") == uninterrupted


def test_the_result_is_a_checkpoint_with_frozen_parts_unchanged(folder, uninterrupted):
    """And the engine loads it."""
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


@pytest.fixture(scope="module")
def failed_evaluation(folder):
    """A job with an adapter whose evaluation fails after a step that no checkpoint was due for.

    Its program is that of longer jobs too: its rates do not depend on the number of steps.
    """

    class Broken:
        def __init__(self, *args):
            pass

        def __call__(self, *args):
            raise RuntimeError("no tokenizer")

    config = job(folder, "adapter", lora=AdapterConfig(rank=2, alpha=4.0, modules_to_save=("lm_head",)), steps=3)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule="constant"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.Evaluator", Broken)
        with pytest.raises(RuntimeError, match="no tokenizer"):
            train(dataclasses.replace(config, eval=EvalConfig(files=(str(folder / "held.jsonl"),), every=1)))
    assert not (folder / "adapter" / ADAPTER).exists()
    return config


@pytest.fixture(scope="module")
def resumed(failed_evaluation):
    """Messages of the same job, without evaluations, to its end."""
    told = []
    assert train(failed_evaluation, log=told.append) == (3, True)
    return told


def test_a_failed_evaluation_loses_no_step(resumed):
    assert resumed[1].startswith("resuming after step 1, ")


@pytest.mark.usefixtures("resumed")
def test_a_job_with_lora_trains_an_adapter(folder, uninterrupted):
    losses = [line["loss"] for line in steps(folder, "adapter")]
    # The same samples, and the same model: an adapter adds nothing before its first step.
    assert losses[0] == pytest.approx(uninterrupted[0]["loss"], rel=1e-5) and losses[2] < losses[0]
    with use_mesh():
        model = load_model(RANDOM_CHECKPOINT, Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT))
        adapted = load_adapter(model, folder / "adapter" / ADAPTER)
    assert {path for path in leaf_paths(adapted) if is_lora(path)}
    found = np.asarray(adapted.language_model.layers.stacked.self_attn.q_proj.lora_b[...])
    assert np.abs(found).max() > 0
    assert adapted.modules_to_save == ("lm_head",)
    assert not np.array_equal(adapted.lm_head.kernel[...], model.lm_head.kernel[...])


@pytest.mark.usefixtures("resumed")
def test_a_job_goes_on_from_an_adapter(folder):
    """With dropout and noise, which change its losses, and with steps of almost nothing it stays what it was."""
    first = folder / "adapter" / ADAPTER
    (told, other), path = ([], []), first / "adapter_config.json"
    config = job(
        folder, "further", lora=AdapterConfig(adapter=str(first), dropout=0.5), steps=2, neftune=5.0,
        optimizer=OptimizerConfig(learning_rate=1e-12, weight_decay=0.0),
    )  # fmt: skip
    assert train(config, log=told.append) == (2, True)
    files = [SafetensorsFile(path / "adapter_model.safetensors") for path in (first, folder / "further" / ADAPTER)]
    assert set(files[0]) == set(files[1]) and "base_model.model.lm_head.weight" in files[0]
    for name in files[0]:
        np.testing.assert_allclose(files[1].read(name), files[0].read(name), rtol=0, atol=1e-10)
    options = [json.loads((path.path.parent / "adapter_config.json").read_text()) for path in files]
    assert options[0] == options[1]
    losses = [line["loss"] for line in steps(folder, "further")]
    assert losses[0] > steps(folder, "adapter")[1]["loss"]
    path.write_text(json.dumps(options[0] | {"base_model_name_or_path": "org/other"}))
    with pytest.raises(ConfigError, match="steps: found 1"):
        train(dataclasses.replace(config, steps=1), log=other.append)
    note = f"warning: lora.adapter: {first}: found org/other as its base model; expected {RANDOM_CHECKPOINT}: it is of"
    assert other[0].startswith(note) and not any("base model" in line for line in told)


def test_a_job_stopped_by_sigterm_resumes_bit_for_bit(folder, uninterrupted):
    """In the middle of an evaluation, which is dropped."""
    told = []

    def stop(line):
        told.append(line)
        if line.startswith("step 3 "):  # logged when the fourth is under way
            os.kill(os.getpid(), signal.SIGTERM)

    looked = EvalConfig(files=(str(folder / "held.jsonl"),), every=4)
    assert train(job(folder, "stopped", eval=looked), log=stop) == (4, False)
    assert "the evaluation after step 4 was stopped" in told and not read_log(folder / "stopped" / EVALUATIONS)
    assert steps(folder, "stopped") == uninterrupted[:4]
    assert train(job(folder, "stopped", eval=looked)) == (STEPS, True)
    assert steps(folder, "stopped") == uninterrupted
    # And that evaluation is made up for.
    assert [line["step"] for line in read_log(folder / "stopped" / EVALUATIONS)] == [4, 8, STEPS]


def test_a_second_run_is_refused_while_the_first_goes_on(folder, uninterrupted, lowerings):
    """A job that is submitted twice, or started again while it still runs elsewhere.

    It is equal to one that this process has run, and so nothing is traced again.
    """

    def start_again(line):
        if line.startswith("step 2 "):
            with pytest.raises(CheckpointError, match=r"twice.checkpoints: found another process writing it.*wait for"):
                train(job(folder, "twice"))

    with lowerings() as lowered:
        assert train(job(folder, "twice"), log=start_again) == (STEPS, True)
    assert not lowered
    assert steps(folder, "twice") == uninterrupted
    assert not list((folder / "twice").glob(".*"))


def test_a_killed_job_resumes_bit_for_bit(folder, uninterrupted):
    """The command is killed after a step that no checkpoint has: its line is written again."""
    (folder / "killed.toml").write_text(JOB.replace('"out"', '"killed"'), encoding="utf-8")
    running = ForkedProgram(["-m", "train", folder / "killed.toml"], env=os.environ, text=True)
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
    assert train(job(folder, "killed"), log=told.append) == (STEPS, True)
    assert told[1].startswith("resuming after step ")
    assert steps(folder, "killed") == uninterrupted


@pytest.fixture(scope="module")
def evaluated(folder):
    """A job of five steps with evaluations, best checkpoint, profile and TensorBoard.

    Also its messages, and the checkpoints that are there, or being written, at the beginning of each evaluation.
    """
    held_out = EvalConfig(files=(str(folder / "held.jsonl"),), every=2, generate=2, max_new_tokens=8)
    config = job(
        folder, "evaluated", eval=held_out, steps=5, checkpoint=CheckpointConfig(every=100, keep=1, best="loss"),
        optimizer=OptimizerConfig(learning_rate=0.3, warmup=1, schedule="constant", clip_norm=None), tensorboard=True,
    )  # fmt: skip
    told, there, evaluate = [], [], Evaluator.__call__

    def found():
        return {int(path.name.partition(".")[0]) for path in (folder / "evaluated" / CHECKPOINTS).iterdir()}

    def look(*arguments):
        # A thread of Orbax's begins to write, soon after it has been told to.
        deadline, last = time.monotonic() + 60, max(there[-1]) if there else 0
        while not any(step > last for step in found()) and time.monotonic() < deadline:
            time.sleep(0.01)
        there.append(found())
        return evaluate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "__call__", look)
        assert train(config, profile=1, log=told.append) == (5, True)
    return config, told, there


def test_an_epoch_ends_with_each_record_seen_and_evaluations_without_a_better_model_end_a_job(
    folder, tmp_path, monkeypatch
):
    """Interrupted, and then with another epoch: steps are counted once, and evaluations over all runs."""
    losses = iter([2.0, 2.5, float("nan")])

    class Known:
        def __init__(self, *args):
            pass

        def __call__(self, *args):
            return Evaluation(next(losses), 0.5, None)

    monkeypatch.setattr("train.loop.Evaluator", Known)
    looked = EvalConfig(files=(str(folder / "held.jsonl"),), every=2, patience=2)
    config = job(folder, "epochs", steps=0, epochs=1, eval=looked, lora=AdapterConfig(rank=2, alpha=4.0))
    assert config.checkpoint.best == "loss"
    other = shutil.copytree(RANDOM_CHECKPOINT, tmp_path / "other")
    with (other / "chat_template.jinja").open("a") as file:
        file.write("{# changed #}")
    told = []

    def stop(line):
        told.append(line)
        if line.startswith("evaluation after step 2:"):
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(config, log=stop) == (2, False)
    assert "1 epoch of 12 records in 4 steps" in told
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.count_steps", None)
        assert train(config) == (4, True)
        shutil.copytree(folder / "epochs", tmp_path / "out", ignore=shutil.ignore_patterns(CHECKPOINTS))
        assert json.loads((tmp_path / "out" / EPOCHS).read_text())["steps"] == 4  # of the other template
        changed = dataclasses.replace(config, model=str(other), out=str(tmp_path / "out"))
        with pytest.raises(TypeError, match="not callable"):  # how long samples are depends on the template, too
            train(changed)
    lines = steps(folder, "epochs")
    assert sum(line["samples"] for line in lines) == 11 and lines[-1]["epoch"] == 1
    # A warm-up of two steps, and a cosine of two.
    assert [line["learning_rate"] for line in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    assert train(dataclasses.replace(config, epochs=2), log=told.append) == (6, True)
    assert "ended after step 6 of 8: 2 evaluations without a better loss" in told
    assert "exporting step 2, the best by loss" in told


def test_a_step_is_saved_before_it_is_evaluated(evaluated):
    """An evaluation takes long, and a job that is killed meanwhile loses no step before it."""
    assert [max(steps) for steps in evaluated[2]] == [2, 4, 5]


def test_a_log_that_was_cut_off_in_a_character_keeps_the_lines_before(tmp_path):
    """Characters in answers that end a line elsewhere, end none."""
    lines = [{"step": step, "text": "数\u2028\x85"} for step in (1, 2, 3)]
    whole = "".join(to_json(line, ensure_ascii=False) + "\n" for line in lines).encode()
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(whole[: whole.rindex("数".encode()) + 1])
    assert read_log(path) == lines[:2]
    truncate(path, 1)
    assert read_log(path) == lines[:1] and path.read_bytes().endswith(b"\n")


def test_evaluations_come_every_n_steps_and_after_the_last(folder, evaluated):
    found = read_log(folder / "evaluated" / EVALUATIONS)
    assert [line["step"] for line in found] == [2, 4, 5]
    assert all(line["score"] in (0.0, 0.5, 1.0) for line in found)


@pytest.mark.parametrize("step", [2, 4, 5])
def test_answers_of_an_evaluation_are_written(folder, evaluated, step):
    lines = (folder / "evaluated" / ANSWERS / f"step-{step:08d}.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer.keys() for answer in answers] == [{"source", "expected", "answer", "score"}] * 2
    assert all(answer["expected"] in ("chelsea", "coffee", "rocket") for answer in answers)


def test_the_best_checkpoint_is_kept_and_exported(folder, evaluated):
    config, told, _ = evaluated
    found = read_log(folder / "evaluated" / EVALUATIONS)
    best = min(found, key=lambda line: line["loss"])
    kept = {int(path.name) for path in (folder / "evaluated" / CHECKPOINTS).iterdir()}
    assert kept == {best["step"], 5}
    assert best["step"] == 5 or f"exporting step {best['step']}, the best by loss" in told
    # The weights are float32, and written as bfloat16.
    again = dataclasses.replace(config, model=str(folder / "evaluated" / MODEL), out=str(folder / "again"), steps=1)
    still = OptimizerConfig(learning_rate=1e-12, warmup=0)
    train(dataclasses.replace(again, optimizer=still, tensorboard=False))
    (line,) = read_log(folder / "again" / EVALUATIONS)
    assert line["loss"] == pytest.approx(best["loss"], rel=2**-6)


def test_profile_tensorboard_and_curves_are_written(folder, evaluated):
    assert list((folder / "evaluated" / PROFILE).rglob("*.xplane.pb"))
    assert list((folder / "evaluated" / TENSORBOARD).iterdir())
    assert PIL.Image.open(folder / "evaluated" / "loss.png").width == 960


def test_held_out_records_that_fit_no_batch_are_skipped(evaluated):
    (large,) = [line for line in evaluated[1] if "held.jsonl:" in line]
    assert large.startswith("skipped in the evaluation: ")
    assert "held.jsonl:2: found 1 image or frame of up to 144 patches" in large


CHANGED = {
    r'freeze: found \["vision", "llm"\]; expected \["vision"\]': lambda job: dict(freeze=("vision", "llm")),
    "seed: found 7; expected 0": lambda job: dict(seed=7),
    "eval.share: found 0.5; expected 0.0": lambda job: dict(eval=EvalConfig(share=0.5)),
    "batch.length: found 80; expected 96": lambda job: dict(batch=dataclasses.replace(job.batch, length=80)),
    "records to learn from: found 4; expected 12": lambda job: dict(data=of_file(job, "held.jsonl")),
    'data.keep_thoughts: found "all"; expected "last"': lambda job: dict(
        data=dataclasses.replace(job.data, keep_thoughts="all")
    ),
    "content of the training data: found .*; expected .*": lambda job: dict(data=of_file(job, "other.jsonl")),
    "tokenizer, chat template and processors of the model: found .*; expected .*": lambda job: dict(
        model=with_another_template(job)
    ),
}


def with_another_template(job):
    """A copy of a job's model beside its data, which writes prompts differently."""
    other = shutil.copytree(job.model, f"{job.data.files[0]}.model")
    with open(f"{other}/chat_template.jinja", "a") as template:
        template.write(" ")
    return other


def of_file(job, name):
    return dataclasses.replace(job.data, files=(job.data.files[0].replace("data.jsonl", name),))


@pytest.mark.parametrize("message", CHANGED)
def test_a_changed_job_does_not_resume(folder, uninterrupted, message):
    changes = CHANGED[message](load_config(folder / "job.toml"))
    with pytest.raises(CheckpointError, match=f"cannot resume from this checkpoint: .*{message}"):
        train(job(folder, "whole", **changes))


def test_the_content_of_data_counts_wherever_they_are(folder, tmp_path):
    config = job(folder, "whole")
    (tmp_path / "moved.jsonl").write_bytes((folder / "data.jsonl").read_bytes())
    moved = dataclasses.replace(config.data, files=(str(tmp_path / "moved.jsonl"),))
    digests = [
        read_data(dataclasses.replace(config, data=data), records).digest
        for data in (config.data, moved, of_file(config, "other.jsonl"))
        for records in (None, list(read_good(data)))
    ]
    assert digests[:2] == digests[2:4] and len(set(digests)) == 4


def read_good(data):
    """The rows that can be read, as a caller may pass them."""
    records = read_records(data.files)
    for number in range(len(records)):
        with contextlib.suppress(DataError):
            yield records[number]


def test_processes_agree_on_the_held_out_samples(folder, monkeypatch):
    """Before a model is loaded."""
    digests = []
    monkeypatch.setattr("train.loop.Job", None)
    monkeypatch.setattr("train.evaluate.agree", lambda name, digest: digests.append((name, digest)))
    for count in (3, 3, 4):  # the second record does not fit
        held_out = EvalConfig(files=(str(folder / "held.jsonl"),), max_samples=count)
        with pytest.raises(AttributeError, match="start"):
            train(job(folder, "agreed", eval=held_out))
    first, second, third = digests
    assert first == second != third and first[0] == "the records of eval"


class TestBeforeTheModelIsLoaded:
    @pytest.fixture(autouse=True)
    def _no_model(self, monkeypatch):
        monkeypatch.setattr("train.loop.Job", None)

    def test_other_files_in_the_place_of_the_result_are_refused(self, folder):
        (folder / "taken" / MODEL).mkdir(parents=True)
        (folder / "taken" / MODEL / "thesis.txt").touch()
        with pytest.raises(CheckpointError, match=r"found thesis\.txt"):
            train(job(folder, "taken"))
        assert os.listdir(folder / "taken") == [MODEL]

    @pytest.mark.parametrize("out", ["file", "file/below"])
    def test_a_directory_that_cannot_be_made_is_named_as_out(self, folder, out):
        (folder / "file").touch()
        with pytest.raises(
            CheckpointError, match=rf"^out: found .*{out}: (File exists|Not a directory); expected a dir"
        ):
            train(job(folder, out))

    def test_a_full_disk_is_found(self, folder, monkeypatch):
        monkeypatch.setattr(
            "glm4v_jax.checkpoints.atomic_directory.shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000)
        )
        with pytest.raises(CheckpointError, match=r"1,000 free"):
            train(job(folder, "full"))
        assert not (folder / "full").exists()

    def test_too_little_room_for_the_checkpoints_is_found(self, folder, monkeypatch):
        """Two of them are kept while a third is written; the result comes on top."""
        free = types.SimpleNamespace(free=2 << 20)
        monkeypatch.setattr("glm4v_jax.checkpoints.atomic_directory.shutil.disk_usage", lambda path: free)
        message = r"small.checkpoints: found 2\.00 MiB free .*: 3 checkpoints of .* MiB and .* KiB for the result; free"
        with pytest.raises(CheckpointError, match=message):
            train(job(folder, "small"))
        assert not (folder / "small").exists()

    def test_a_bad_held_out_record_ends_a_strict_job(self, folder):
        held_out = EvalConfig(files=(str(folder / "held.jsonl"),))
        data = dataclasses.replace(load_config(folder / "job.toml").data, bad_rows="error")
        with pytest.raises(DataError, match=r"held\.jsonl:2: found 1 image or frame of up to 144 patches"):
            train(job(folder, "large", eval=held_out, data=data))
        assert not (folder / "large").exists()


@pytest.mark.parametrize(("count", "out"), [(STEPS, "spikes"), (2, "last")])  # the last step is checked, too
def test_skipped_steps_in_a_row_end_a_job(folder, count, out):
    rates = OptimizerConfig(learning_rate=1e-3, warmup=2, schedule="constant")  # one program for both
    config = job(folder, out, max_grad_norm=1e-6, max_skipped=2, steps=count, checkpoint=CheckpointConfig(every=1))
    with pytest.raises(TrainError, match=r"step 2: found gradients of norm .*, the last of 2 skipped steps in a row"):
        train(dataclasses.replace(config, optimizer=rates))
    assert not (folder / out / CHECKPOINTS).exists()
    # Skipped steps do not advance the schedule.
    rates = [line["learning_rate"] for line in steps(folder, out)]
    assert rates == [pytest.approx(5e-4)] * 2


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "2 skipped steps in a row; .*this run began with {}, which may be bad: move it away to start again"),
        ([False], "an optimizer's state that are not finite, .*this run began with {}, which may be bad"),
        ([True, False], "not finite, .*newest good checkpoint is {}: the same command resumes from it"),
    ],
)
def test_a_bad_state_replaces_no_checkpoint(folder, failed_evaluation, tmp_path, monkeypatch, found, message):
    """Of a checkpoint that was damaged without a trace; or of a step that made it so."""
    latest = max(int(path.name) for path in (folder / "adapter" / CHECKPOINTS).iterdir())
    shutil.copytree(folder / "adapter" / CHECKPOINTS / str(latest), tmp_path / CHECKPOINTS / str(latest))
    keep = CheckpointConfig(every=1, keep=1)
    config = dataclasses.replace(failed_evaluation, out=str(tmp_path), checkpoint=keep, steps=latest + 3)
    if found is None:
        config = dataclasses.replace(config, max_grad_norm=1e-9, max_skipped=2)
    else:
        answers = iter(found)
        monkeypatch.setattr("train.output.is_finite", lambda state: next(answers))
        latest += found.count(True)
    with pytest.raises(TrainError, match=message.format(tmp_path / CHECKPOINTS / str(latest))):
        train(config)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == [str(latest)]


def test_the_first_bad_row_of_every_other_process_is_named_once(monkeypatch):
    of_processes = [{"0": "a.jsonl:3: bad", "1": None}, {"2": None, "3": "a.jsonl:7: bad"}, {"4": None, "5": None}]
    found = [{lane: {"bad": bad} for lane, bad in lanes.items()} for lanes in of_processes]
    monkeypatch.setattr("train.loop.gathered", lambda lanes: found)
    told = []
    steps = _Steps(*[None] * 9, log=told.append, named=set())
    assert steps.of_all_processes(found[0]).keys() == set("012345") and told == ["process 1: a.jsonl:7: bad"]
    found[2]["4"]["bad"] = "a.jsonl:9: bad"
    steps.of_all_processes(found[0])
    assert told[1:] == ["process 2: a.jsonl:9: bad"]


def test_a_bad_record_ends_a_strict_job(folder):
    data = dataclasses.replace(load_config(folder / "job.toml").data, bad_rows="error")
    with pytest.raises(DataError, match=r"data\.jsonl:5: images: found 0"):
        train(job(folder, "strict", data=data))


def test_a_full_disk_names_the_file_of_metrics(folder, tmp_path):
    log = MetricsLog(tmp_path, job(folder, "log"), 0, None, None, print)
    (tmp_path / EVALUATIONS).symlink_to("/dev/full")
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path / EVALUATIONS}'")):
        log.evaluated(3, Evaluation(1.0, 0.5, None), 1.0)


def test_nan_is_written_as_null(folder):
    config = job(folder, "log")
    (folder / "log").mkdir()
    log = MetricsLog(folder / "log", config, 0, None, None, print)
    log.evaluated(3, Evaluation(float("nan"), 0.5, None), 1.0)
    (line,) = read_log(folder / "log" / EVALUATIONS)
    assert line == {"step": 3, "loss": None, "accuracy": 0.5, "score": None, "seconds": 1.0}


@pytest.mark.parametrize(("steps", "said"), [(2, "was not written"), (4, "has only 2 steps"), (5, None), (9, None)])
def test_a_profile_covers_steps_alone(tmp_path, monkeypatch, steps, said):
    """Three of them after the first two, and nothing after the last."""
    seen, told = [], []
    monkeypatch.setattr("jax.profiler.start_trace", lambda directory: seen.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: seen.append("stop"))
    with Profiler(tmp_path, 3, told.append) as profiler:
        for step in range(steps):
            profiler.before_step()
            seen.append(step)
            profiler.after_step(())
        profiler.end()
    expected = list(range(steps))
    if steps > 2:
        expected = [0, 1, "start", *range(2, min(steps, 5)), "stop", *range(5, steps)]
    assert seen == expected
    assert [line.split("profile ")[1].split(":")[0] for line in told] == ([said] if said else [])
