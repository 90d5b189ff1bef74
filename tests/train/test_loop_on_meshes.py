"""A job is the same on every mesh and by any number of processes: the same batches, and losses within rounding.

Run as a program with the arguments of `python -m train`, this file runs that twice, as one of several processes.
"""

import dataclasses
import json
import re
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import skimage.data
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_orbax import environment, free_port
from helpers_processes import ForkedProgram

from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.console.program import start_process
from glm4v_jax.devices import distributed
from glm4v_jax.errors import CheckpointError, ConfigError
from train import commands
from train.config import MODEL, BatchConfig, load_config
from train.data.placement import check_batch
from train.log import EVALUATIONS, METRICS, read_log
from train.loop import train

STEPS = 8
SHARDED = ("data=2,fsdp=4", "fsdp=2,kv=2,q=2")
JOB = """
model = {model}
out = "out"
steps = 8
freeze = []
dtype = "float32"
remat = "none"
mesh = "data=1"

[data]
files = ["data.jsonl"]

[batch]
rows = 8
length = 48
vision_rows = 8
vision_length = 72

[optimizer]
learning_rate = 1e-3
eps = 1e-3

[checkpoint]
every = 100
"""
# The large eps: where a gradient is nothing but rounding, Adam's steps would be as large as elsewhere, and of any sign.


def job(folder, out, **changes):
    return dataclasses.replace(load_config(folder / "job.toml"), out=str(folder / out), **changes)


def losses(folder, out):
    lines = read_log(folder / out / METRICS)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([[line["loss"], line["grad_norm"], line["tokens"], line["targets"]] for line in lines])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures to name in questions of different lengths, some without one, and a job."""
    folder = tmp_path_factory.mktemp("job")
    names = ("chelsea", "coffee", "rocket")
    for name in names:
        PIL.Image.fromarray(getattr(skimage.data, name)()).resize((56, 56)).save(folder / f"{name}.png")
    rows = []
    for number in range(60):
        name, has_picture = names[number % 3], number % 4 > 0
        asked = f"{'<image>' if has_picture else ''}{'?' * (number % 9 + 1)}"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": name}]
        rows.append({"messages": messages, "images": [f"{name}.png"] if has_picture else []})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "job.toml").write_text(JOB.format(model=json.dumps(str(RANDOM_CHECKPOINT))), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one_device(folder):
    assert train(job(folder, "one")) == (STEPS, True)
    found = losses(folder, "one")
    assert found[-1, 0] < 0.9 * found[0, 0]
    return found


@pytest.fixture(scope="module")
def sharded(folder, run_on_devices):
    """What a job on eight devices, stopped in the middle, logs where it starts and where it resumes on another mesh.

    And the names of programs that slice leaves.
    """
    return run_on_devices(stop_and_resume, folder)


def test_every_mesh_gives_the_losses_of_one_device(folder, one_device, sharded):
    """Of the steps before the job was stopped, and of as many after it was."""
    found = losses(folder, "moved")
    assert len(found) == STEPS
    np.testing.assert_allclose(found, one_device, rtol=1e-5)


def test_a_job_resumes_on_another_mesh(sharded):
    (started, *_), (resumed, second, *_), _ = sharded
    for line, mesh in ((started, SHARDED[0]), (resumed, SHARDED[1])):
        assert line.endswith(f"60 records to train on; 8 devices ({mesh}), cpu")
    assert second == f"resuming after step {STEPS // 2}, from checkpoints"


def test_checkpoints_on_a_mesh_compile_no_programs_that_slice_small_leaves(sharded):
    assert sharded[2] == []


def assert_same_results(folder, out, expected):
    """Weights that were equal to 1e-5 of the largest, as a chain in float32 leaves them, before they were rounded.

    They are written in bfloat16, as those of the checkpoint are: 8 bits, so that numbers next to each other differ by
    up to 2^-7 of their size, and the smallest of differences before rounding may become that.
    """
    found, wanted = (open_weights(folder / name / MODEL) for name in (out, expected))
    assert set(found) == set(wanted)
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype == jnp.bfloat16
        a, b = (np.asarray(weights.read(name), np.float32) for weights in (found, wanted))
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-5 * np.abs(b).max(), err_msg=name)


def test_the_result_of_a_sharded_job_is_that_of_one_device(folder, one_device, sharded):
    assert_same_results(folder, "moved", "one")


def start(folder, out, count=2, tables=""):
    """Processes that train together, with two devices each, and then resume; `tables` are added to the job's file."""
    port = free_port()
    text = (folder / "job.toml").read_text().replace('"out"', json.dumps(out)).replace("data=1", "data=2,fsdp=2")
    path = folder / f"{out}.toml"
    path.write_text(text.replace("every = 100", f"every = 2\n{tables}"), encoding="utf-8")
    command = [__file__, path, "--coordinator", f"127.0.0.1:{port}", "--num-processes", count, "--process-id"]
    return [ForkedProgram([*command, n], env=environment(2, shares=False), text=True) for n in range(count)]


def end(processes):
    """Exit status, standard output and standard error of each."""
    try:
        told = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def test_two_processes_train_as_one_does(folder, one_device):
    """A signal to the second stops both; they go on as two, and end with the result of one.

    They look at records on the way, and keep the best of their models.
    """
    tables = 'best = "loss"\n[eval]\nfiles = ["data.jsonl"]\nevery = 2\nmax_samples = 12\n'
    processes = start(folder, "two", tables=tables)
    deadline = time.monotonic() + 200
    while len(read_log(folder / "two" / METRICS)) < 1:
        assert all(process.poll() is None for process in processes), end(processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    (status, out, errors), other = end(processes)
    assert (status, other) == (0, (0, "", "")), errors
    told = re.fullmatch(
        rf"{folder}/two: (\d+) of {STEPS} steps, stopped; the same command resumes the job\n"
        rf"{folder}/two: {STEPS} of {STEPS} steps, done\n", out,
    )  # fmt: skip
    assert told, out
    assert 1 <= (stopped := int(told[1])) < STEPS
    start_line = "60 records to train on, 12 held out to evaluate; 4 devices (data=2,fsdp=2), cpu"
    lines = errors.splitlines()
    first, again = (number for number, line in enumerate(lines) if line.endswith(start_line))
    assert any(line.startswith(f"{stopped} steps in this run") for line in lines[first:again])
    assert lines[again + 1].startswith(f"resuming after step {stopped}, ")
    errors = "\n".join(lines[again:])
    evaluated = read_log(folder / "two" / EVALUATIONS)
    assert [line["step"] for line in evaluated][-1] == STEPS
    # So that the best one is the last one, which one device is compared with.
    assert evaluated[-1]["loss"] == min(line["loss"] for line in evaluated) < evaluated[0]["loss"]
    rows = read_log(folder / "one" / METRICS)[-1]["epoch"] * 60
    assert f"rows read: {round(rows):,}, of which 0 were too long and 0 could not be read" in errors
    np.testing.assert_allclose(losses(folder, "two"), one_device, rtol=1e-5)
    assert_same_results(folder, "two", "one")


def test_a_mesh_that_cannot_divide_the_batch_is_refused():
    mesh = types.SimpleNamespace(shape=dict(data=3, fsdp=1, kv=1, q=1, seq=1))
    with pytest.raises(ConfigError, match=r"batch\.rows: found 8; expected a multiple of 3, the data shards"):
        check_batch(BatchConfig(rows=8, vision_rows=6), mesh)
    with pytest.raises(ConfigError, match=r"batch\.vision_rows: found 1; expected a multiple of 3"):
        check_batch(BatchConfig(rows=9, vision_rows=1), mesh)
    check_batch(BatchConfig(rows=9, vision_rows=0), mesh)


def test_a_job_with_other_lanes_does_not_resume(folder, one_device):
    config = load_config(folder / "job.toml")
    with pytest.raises(CheckpointError, match=r"batch\.lanes: found 2; expected 8, as saved"):
        train(job(folder, "one", batch=dataclasses.replace(config.batch, lanes=2), steps=STEPS + 1))


def stop_and_resume(folder):
    started, resumed, slices = [], [], []

    def hear(event, duration, **details):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration" and details["fun_name"] == "jit(slice)":
            slices.append(details["fun_name"])

    def stop(line):
        started.append(line)
        if line.startswith(f"step {STEPS // 2 - 1} "):  # the next one is running already
            signal.raise_signal(signal.SIGTERM)

    jax.clear_caches()  # or what others have compiled would not be listed
    jax.monitoring.register_event_duration_secs_listener(hear)
    train(job(folder, "moved", mesh=SHARDED[0]), log=stop)
    train(job(folder, "moved", mesh=SHARDED[1]), log=resumed.append)
    jax.monitoring.unregister_event_duration_listener(hear)
    logs = [[line.replace(f"{folder}/moved/", "") for line in log] for log in (started, resumed)]
    return *([line for line in log if not line.startswith("step")] for log in logs), slices


def _train_twice(arguments):
    """Run the command and, in processes that stay joined, once more: less than half the work of another start."""
    start_process()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "leave", lambda: None)
        status = commands.main(arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "init_distributed", lambda *given, **options: True)
        return status or commands.main(arguments)


if __name__ == "__main__":
    sys.exit(_train_twice(sys.argv[1:]))
