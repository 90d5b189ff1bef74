"""A job that learns by reward, from its file to its result: killed anywhere, or on several devices, it is the same.

Run as a program, this file is a job that is killed, or one of the processes of a job.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_orbax import environment, free_port
from helpers_processes import ForkedProgram

from glm4v_jax.devices.distributed import init_distributed, is_first, to_host
from glm4v_jax.errors import CheckpointError, ConfigError, DataError
from glm4v_jax.files import read_json_object, write_json
from train.config import MODEL, load_config
from train.job import Job
from train.log import METRICS, read_log
from train.output import Saver
from train.rl import log as reward_log
from train.rl.config import CurriculumConfig
from train.rl.curriculum import Curriculum
from train.rl.cycle import Cycle
from train.rl.log import ROLLOUTS
from train.rl.loop import _Steps, learn
from train.trackers import TENSORBOARD

JOB = f"""
model = {json.dumps(str(RANDOM_CHECKPOINT))}
out = "out"
steps = 2
freeze = []
dtype = "float32"
remat = "none"
mesh = "data=1"
trackers = ["tensorboard"]

[data]
files = ["problems.jsonl"]

[batch]
rows = 4
length = 128
vision_rows = 4
vision_length = 128

[optimizer]
learning_rate = 1e-4
eps = 1e-3

[checkpoint]
every = 1

[rl]
prompts = 4
samples = 6
updates = 2

[rl.sampling]
engine_mesh = "same"
slots = 16
think_budget = 0
answer_budget = 8
temperature = 1.5

[rl.verifiers.digits]
kind = "ocr"
boxed = false
"""
# The large eps: where a gradient is nothing but rounding, Adam's steps would be as large as elsewhere, and of any sign.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise in images and videos, right answers that share some letters with any other, and a job.

    The first step has problems of both kinds, and compiles all programs.
    """
    folder, rng = tmp_path_factory.mktemp("job"), np.random.default_rng(0)
    rows = []
    for number in range(10):
        PIL.Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)).save(folder / f"{number}.png")
        shown = {"type": "image", "image": f"{number}.png"}
        if number % 5 == 2:
            shown = {"type": "video", "video": [f"{frame}.png" for frame in range(number - 2, number + 2)], "fps": 2}
        content = [shown, {"type": "text", "text": "Which digit is this?"}]
        messages = [{"role": "user", "content": content}]
        answers = [f"8{number}", f"{number} or the tree on stone"]
        rows.append({"messages": messages, "answers": answers, "key": f"digit {number}"})
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "job.toml").write_text(JOB)
    return folder


def job(folder, out, mesh="data=1", engine_mesh="same"):
    path = folder / f"{out}.toml"
    text = JOB.replace('out = "out"', f"out = {json.dumps(out)}").replace("data=1", mesh)
    path.write_text(text.replace('engine_mesh = "same"', f"engine_mesh = {json.dumps(engine_mesh)}"))
    return load_config(path)


def run(config, is_exported=True):
    """The job, with all of its answers in its log, and its parameters as they were trained; returns its log lines."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        export = Job.export

        def export_too(self, params, out):
            found = to_host(params)
            if is_first():
                np.savez(out / "params.npz", **found)
            return export(self, params, out) if is_exported else None

        patch.setattr(Job, "export", export_too)
        patch.setattr(reward_log, "_SHOWN", 100)
        result = learn(config, log=lines.append)
    assert result.is_done and result.step == 2
    return lines


def written(folder, out, name):
    """Lines of a log, without what depends on the clock."""
    clock = ("seconds", "compiles")
    return [{k: v for k, v in one.items() if not k.startswith(clock)} for one in read_log(folder / out / name)]


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run, at a temperature."""
    lines = run(job(folder, "whole"))
    assert any(line.startswith("step 2 of 2: reward") for line in lines)
    first, last = read_log(folder / "whole" / METRICS)
    assert first["ratio_first_dev"] <= 2e-6 and last["compiles"] == 0 and 0 <= first["reward/digits"] <= 1
    assert first["grad_norm"] > 0 and last["learned"] >= 2  # an update for each of two parts
    assert sum(count for count, _ in last["tiers"]) == 10
    assert len(read_log(folder / "whole" / ROLLOUTS)) == first["groups"] + last["groups"]
    assert list((folder / "whole" / TENSORBOARD).iterdir())
    assert PIL.Image.open(folder / "whole" / "reward.png").width == 960
    return "whole"


@pytest.mark.slow
def test_a_job_killed_in_any_phase_resumes_bit_for_bit(folder, whole):
    """With kill -9 in the second step. No phase changes a file, so what resumes after one resumes after any."""
    job(folder, "killed")
    program = ForkedProgram([__file__, "kill", folder / "killed.toml"], env=os.environ, text=True)
    out, errors = program.communicate(300)
    assert program.returncode == -signal.SIGKILL, errors[-4000:]
    phases, digests = zip(*map(str.split, out.splitlines()), strict=True)
    assert phases == ("rollout", "scoring", "step", "handover") and set(digests) == {digest(folder / "killed")}
    assert any(line.startswith("resuming after step 1") for line in run(job(folder, "killed")))
    for name in (METRICS, ROLLOUTS):
        assert written(folder, "killed", name) == written(folder, whole, name)
    found, expected = (np.load(folder / out / "params.npz") for out in ("killed", whole))
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    weights = [(folder / out / MODEL / "model.safetensors").read_bytes() for out in ("killed", whole)]
    assert weights[0] == weights[1]


def digest(directory):
    """Of all files and their contents, but for TensorBoard's, which a thread writes, and nothing reads."""
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and TENSORBOARD not in path.parts):
        found.update(f"{path.relative_to(directory)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def kill_in_the_second_step(out):
    """Have this process say what is on disk in the middle of each phase of the second step, and be killed in the last.

    A checkpoint is written meanwhile, and complete or absent; here it is complete.
    """
    step, save = Cycle.__call__, Saver.save

    def save_whole(self, *arguments):
        is_saved = save(self, *arguments)
        self.checkpoints.wait()
        return is_saved

    def second(self, state, problems, score, seed, number):
        if not int(state.step):
            return step(self, state, problems, score, seed, number)
        engine, policy = self.engine, self.step
        generate, update, gradients = engine.generate_many, policy.update, policy.gradients

        def tell(phase):
            sys.stdout.write(f"{phase} {digest(out)}\n")
            sys.stdout.flush()

        def generate_many(*arguments, **options):
            for number, answer in enumerate(generate(*arguments, **options)):
                if number == 5:
                    tell("rollout")
                yield answer

        def score_all(texts):
            some = score(texts[:5])
            tell("scoring")
            return [*some, *score(texts[5:])]

        def first_update(*arguments):  # of two: then there are gradients of the second
            policy.gradients, policy.update = some_gradients, update
            return update(*arguments)

        def some_gradients(*arguments):
            policy.gradients, found = gradients, gradients(*arguments)
            tell("step")
            return found

        def update_engine(module):
            tell("handover")
            os.kill(os.getpid(), signal.SIGKILL)

        engine.generate_many, policy.update, engine.update = generate_many, first_update, update_engine
        return step(self, state, problems, score_all, seed, number)

    Cycle.__call__, Saver.save = second, save_whole


@pytest.mark.slow
def test_answers_that_would_be_sampled_in_another_way_do_not_continue_a_job(folder, whole, monkeypatch):
    """Other end tokens; a temperature, which the job has its own of, may be another one."""
    model = shutil.copytree(RANDOM_CHECKPOINT, folder / "model")
    config = dataclasses.replace(job(folder, whole), model=str(model))
    options = read_json_object(model / "generation_config.json")
    monkeypatch.setattr(Job, "start", None)
    write_json(model / "generation_config.json", options | {"temperature": 0.3})
    with pytest.raises(TypeError, match="NoneType"):
        learn(config)
    write_json(model / "generation_config.json", options | {"eos_token_id": [3]})
    with pytest.raises(CheckpointError, match=r"cannot resume .*: generation_config\.json of the model: found"):
        learn(config)


@pytest.mark.slow
def test_two_processes_with_four_devices_learn_as_one_device_does(folder, whole):
    """The same answers to all problems of both steps, the same rewards, and the same weights within rounding.

    The engine has another mesh of the devices than the training.
    """
    job(folder, "two", "fsdp=2,kv=2", "data=2,kv=2")
    program = [__file__, f"127.0.0.1:{free_port()}", folder / "two.toml"]
    processes = [ForkedProgram([*program, index], env=environment(2), text=True) for index in range(2)]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors[0][-4000:] + errors[1][-4000:]
    assert written(folder, "two", ROLLOUTS) == written(folder, whole, ROLLOUTS)
    for found, expected in zip(written(folder, "two", METRICS), written(folder, whole, METRICS), strict=True):
        assert found.pop("tiers") == expected.pop("tiers") and set(found) == set(expected)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    lines = read_log(folder / "two" / METRICS)
    assert all(line["ratio_first_dev"] <= 2e-6 and line["ratio_first_max"] <= 1e-4 for line in lines)
    assert lines[-1]["compiles"] == 0
    found, expected = (np.load(folder / out / "params.npz") for out in ("two", whole))
    for name in expected:
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5 * largest, err_msg=name)


@pytest.mark.slow
def test_steps_that_learn_nothing_are_not_taken_again(folder, monkeypatch):
    """Two of them: the job says so, and a second start has nothing to do; fewer steps are refused before it loads."""
    config, problems = job(folder, "empty"), folder / "texts.jsonl"
    row = {"messages": [{"role": "user", "content": "Which digit?"}], "answer": "8"}
    problems.write_text("".join(json.dumps(row | {"key": str(number)}) + "\n" for number in range(2)))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, files=(str(problems),)), trackers=(),
        batch=dataclasses.replace(config.batch, vision_rows=0, rows=1),
        rl=dataclasses.replace(config.rl, prompts=1, samples=2),
    )  # fmt: skip
    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(Job, "export", lambda self, params, out: None)
        for told in (lines, again := []):
            found = learn(config, log=told.append, control=lambda tasks, rewards: [rewards[0]] * len(tasks))
            assert found == (2, True)
    warning = "warning: 2 steps: found no group whose answers have different rewards; nothing was learned"
    assert sum(line.startswith(warning) for line in lines) == 1
    assert any(line.startswith("resuming after step 2,") for line in again)
    assert [line["step"] for line in read_log(folder / "empty" / METRICS)] == [1, 2]
    monkeypatch.setattr(Job, "start", None)
    with pytest.raises(ConfigError, match="steps: found 1; expected at least 2, the step of the latest checkpoint"):
        learn(dataclasses.replace(config, steps=1))


@pytest.mark.parametrize("every", [1, 2])
def test_a_checkpoint_is_of_the_last_step_after_which_no_groups_wait(every):
    """Those that wait are not saved: a job that resumes samples them again. After the last step nothing waits."""
    problems = [SimpleNamespace(key=f"k{number}") for number in range(4)]
    curriculum = Curriculum([one.key for one in problems], ["it"] * 4, CurriculumConfig(), prompts=2)
    waiting, states, saved = [0, 1, 2, 0, 1, 2], [], []  # after each step

    def cycle(state, drawn, score, seed, step):
        wait = waiting[len(states)]
        states.append(curriculum.state())  # before the step
        groups = [SimpleNamespace(key=one.key, rewards=np.array([1.0, 0.0]), is_valid=True) for one in drawn]
        updates = [] if wait else [SimpleNamespace(update=SimpleNamespace(grad_norm=1.0))] * 2
        return state, SimpleNamespace(groups=groups, learned=groups, waiting=wait, updates=updates)

    def save(step, state, streak, data, number):
        saved.append((number, step, data["step"], data["curriculum"]))
        return True

    cycle.config = SimpleNamespace(samples=2)
    saver = SimpleNamespace(save=save, first=0, check_streak=lambda *arguments: None)
    config = SimpleNamespace(steps=6, seed=0, is_saved=lambda step: step % every == 0)
    log, stopping = SimpleNamespace(add=lambda *_, **more: None), SimpleNamespace(is_asked_now=lambda: False)
    _Steps(cycle, problems, curriculum, None, saver, log, stopping, config, []).run(SimpleNamespace(streak=0), 0)
    states.append(curriculum.state())
    assert saved == [(number, step, step, states[step]) for number, step in ((2, 1), (6, 4), (8, 6))]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("answer_budget = 8", "answer_budget = 128"), ConfigError, r"think_budget \+ answer_budget: found 128"),
        (("[rl]", "[eval]\nshare = 0.5\n[rl]"), ConfigError, "eval: found .*; expected none beside rl"),
        (("steps = 2", "steps = 2\nneftune = 5.0"), ConfigError, "neftune: found 5.0; expected none beside rl"),
        (("updates = 2", "min_groups = 5"), ConfigError, "rl.*min_groups: found 5; expected at most prompts, 4"),
        (("steps = 2", "epochs = 2"), ConfigError, "epochs: found 2; expected none beside rl"),
        (('kind = "ocr"', 'kind = "chart"\ntolerance = 9.0'), ConfigError, "rl.verifiers.digits: found a reward"),
        (("length = 128", "length = 16"), DataError, r"problems.jsonl:1: found a prompt of at least \d+ tokens; .* 8:"),
        (('["problems.jsonl"]', '["problems.jsonl"]\nmedia_dir = "none"'), DataError, "^data.media_dir: found .*none,"),
        (('"problems.jsonl"', '"bad.jsonl"'), DataError, r"bad.jsonl:1: domain: found 'maths'; expected"),
    ],
)
def test_a_bad_job_ends_before_its_model_is_loaded(folder, monkeypatch, change, error, message):
    from train.job import Job

    monkeypatch.setattr(Job, "start", None)
    row = {"messages": [{"role": "user", "content": "3 + 4?"}], "answer": 7, "domain": "maths"}
    (folder / "bad.jsonl").write_text(json.dumps(row))
    (folder / "bad.toml").write_text(JOB.replace(*change).replace('out = "out"', 'out = "refused"'))
    with pytest.raises(error, match=message):
        learn(load_config(folder / "bad.toml"))
    assert not (folder / "refused").exists()


def main(command, path, *index):
    if command == "kill":
        kill_in_the_second_step(Path(load_config(path).out))
    else:
        init_distributed(command, 2, int(*index))
    run(load_config(path), is_exported=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
