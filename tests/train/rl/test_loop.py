"""A job that learns by reward, from its file to its result: interrupted anywhere, it is the uninterrupted one."""

import json

import numpy as np
import PIL.Image
import pytest

from glm4v_jax.errors import ConfigError, DataError
from glm4v_jax.tiny import TINY_CHECKPOINT
from train.config import MODEL, load_config
from train.log import METRICS, read_log
from train.rl.log import ROLLOUTS
from train.rl.loop import learn
from train.trackers import TENSORBOARD

JOB = f"""
model = {json.dumps(str(TINY_CHECKPOINT))}
out = "out"
steps = 3
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
learning_rate = 1e-3

[checkpoint]
every = 1

[rl]
prompts = 4
samples = 6
updates = 2

[rl.sampling]
slots = 16
think_budget = 0
answer_budget = 8

[rl.verifiers.digits]
kind = "counting"
boxed = false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise to find digits in, and a job."""
    folder, rng = tmp_path_factory.mktemp("job"), np.random.default_rng(0)
    rows = []
    for number in range(10):
        PIL.Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)).save(folder / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "Which digit is this?"}]
        rows.append({"messages": [{"role": "user", "content": content}], "answer": number, "key": f"digit {number}"})
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "job.toml").write_text(JOB)
    return folder


def job(folder, out):
    path = folder / f"{out}.toml"
    path.write_text(JOB.replace('out = "out"', f"out = {json.dumps(out)}"))
    return load_config(path)


class KilledError(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_job_resumes_bit_for_bit(folder):
    """After a step that was not saved: it is taken again, with the same draws, answers and rewards."""
    whole, cut = job(folder, "whole"), job(folder, "cut")
    lines = []
    result = learn(whole, log=lines.append)
    assert result.is_done and result.step == 3 and any(line.startswith("step 3 of 3: reward") for line in lines)

    def kill(line):
        if line.startswith("step 2 of 3"):
            raise KilledError

    with pytest.raises(KilledError):
        learn(cut, log=kill)
    learn(cut, log=lines.append)
    assert any(line.startswith("resuming after step 1") for line in lines)
    for name in (METRICS, ROLLOUTS):
        found, expected = (
            [{key: value for key, value in line.items() if not key.startswith(("seconds", "compiles"))} for line in of]
            for of in (read_log(folder / out / name) for out in ("cut", "whole"))
        )
        assert found == expected and len(found) == (3 if name == METRICS else 6)
    weights = [(folder / out / MODEL / "model.safetensors").read_bytes() for out in ("whole", "cut")]
    assert weights[0] == weights[1]
    first, *_, last = read_log(folder / "whole" / METRICS)
    assert first["ratio_first_dev"] <= 2e-6 and last["compiles"] == 0 and 0 <= first["reward/digits"] <= 1
    assert sum(count for count, _ in last["tiers"]) == 10
    assert list((folder / "whole" / TENSORBOARD).iterdir())
    assert PIL.Image.open(folder / "whole" / "reward.png").width == 960


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("answer_budget = 8", "answer_budget = 128"), ConfigError, r"think_budget \+ answer_budget: found 128"),
        (("[rl]", "[eval]\nshare = 0.5\n[rl]"), ConfigError, "eval: found .*; expected none beside rl"),
        (("steps = 3", "steps = 3\nneftune = 5.0"), ConfigError, "neftune: found 5.0; expected none beside rl"),
        (("steps = 3", "epochs = 3"), ConfigError, "epochs: found 3; expected none beside rl"),
        (('kind = "counting"', 'kind = "chart"\ntolerance = 9.0'), ConfigError, "rl.verifiers.digits: found a reward"),
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
