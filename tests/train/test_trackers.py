"""Trackers get numbers by their own libraries; a missing one is named first, and one that fails stops nothing."""

import dataclasses
import importlib.machinery
import json
import sys
import types

import pytest

from glm4v_jax.errors import ConfigError
from train.config import DataConfig, TrainConfig
from train.loop import train
from train.rl.config import RLConfig, SamplingConfig, VerifierConfig
from train.rl.loop import learn
from train.trackers import TENSORBOARD, TRACKERS, Trackers, check_trackers

LINE = {"step": 3, "loss": 0.5, "is_skipped": False, "mfu": None, "tiers": [[1, 0.5]], "reward/digits": 1}
WRITTEN = {"train/loss": 0.5, "train/is_skipped": 0.0, "train/reward/digits": 1.0}


class Library(types.ModuleType):
    """What Weights & Biases and Trackio have in common."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.started, self.written, self.finished = [], [], 0

    def init(self, **options):
        sys.stdout.write("the dashboard is at http://localhost")
        self.started.append(options)
        return self

    def log(self, values, step):
        self.written.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def libraries(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    found = {name: Library(name) for name in ("wandb", "trackio")}
    for name, library in found.items():
        monkeypatch.setitem(sys.modules, name, library)
    return found


def job(tmp_path, *trackers, **fields):
    data = DataConfig(files=("data.jsonl",))
    return TrainConfig(model="model", out=str(tmp_path), data=data, steps=9, trackers=trackers, **fields)


def test_numbers_are_written_by_each_tracker(libraries, tmp_path, capsys):
    told = []
    trackers = Trackers(job(tmp_path, "wandb", "trackio", "tensorboard"), tmp_path, 0, told.append)
    trackers.write("train", LINE)
    trackers.close()
    assert [(library.written, library.finished) for library in libraries.values()] == [([(3, WRITTEN)], 1)] * 2
    assert list((tmp_path / TENSORBOARD).iterdir()) and not told
    assert capsys.readouterr().out == ""  # which is the result of the command


def test_a_job_that_resumes_continues_its_run(libraries, tmp_path, monkeypatch):
    for mode in (None, "online"):
        if mode is not None:
            monkeypatch.setenv("WANDB_MODE", mode)
        Trackers(job(tmp_path, "wandb", "trackio"), tmp_path, 0, pytest.fail)
    first, last = libraries["wandb"].started
    assert (first["mode"], last["mode"]) == ("offline", "online")
    assert first["id"] == last["id"] and first["resume"] == last["resume"] == "allow"
    names = {one["name"] for one in libraries["trackio"].started}
    assert names == {f"{tmp_path.name}-{first['id']}"}
    assert json.dumps(first["config"], allow_nan=False) and first["config"]["steps"] == 9


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_the_others_continue(libraries, tmp_path, monkeypatch, where):
    def fail(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(libraries["wandb"], where, fail)
    told = []
    trackers = Trackers(job(tmp_path, "wandb", "trackio"), tmp_path, 0, told.append)
    for _ in range(2):
        trackers.write("train", LINE)
    trackers.close()
    assert told == ["wandb: no route to host: further metrics are in the files of the job alone"]
    assert len(libraries["trackio"].written) == 2 and libraries["trackio"].finished == 1


def test_a_full_disk_under_tensorboard_is_a_line(tmp_path, monkeypatch):
    """Its writer has a thread, and closes its files once more when Python ends."""
    told = []
    trackers = Trackers(job(tmp_path, tensorboard=True), tmp_path, 0, told.append)
    board = trackers._running["tensorboard"]._writer
    (writer,) = board.all_writers.values()
    thread = writer.event_writer._worker

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board, "close", full)
    trackers.close()
    assert len(told) == 1 and told[0].startswith("tensorboard: [Errno 28] No space left on device: further metrics are")
    assert not thread.is_alive() and writer.event_writer._closed


def test_a_directory_of_earlier_runs_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "no_such_library").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TRACKERS, "wandb", TRACKERS["wandb"]._replace(package="no_such_library"))
    with pytest.raises(ConfigError, match=r"trackers: found 'wandb' without the package no_such_library"):
        check_trackers(job(tmp_path, "wandb"))


@pytest.mark.parametrize("run", [train, learn])
def test_a_missing_library_is_named_before_anything_is_read(tmp_path, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = job(tmp_path, "wandb")
    if run is learn:
        sampling = SamplingConfig(think_budget=0)
        rl = RLConfig(verifiers={"count": VerifierConfig(kind="counting")}, sampling=sampling)
        config = dataclasses.replace(config, rl=rl)
    with pytest.raises(ConfigError, match=r"trackers: found 'wandb' without the package wandb; .*glm4v_jax\[wandb\]"):
        run(config)
