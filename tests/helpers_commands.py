"""Fixtures of commands: a directory to work in, media, and no weights where none are due."""

import os
import subprocess
import sys

import pytest
from helpers_cli import ROOT, refuse_weights, save_noise, save_video


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path, monkeypatch):
    """Where files go by default."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def image():
    """Random pixels."""
    save_noise("image.png")
    return "image.png"


@pytest.fixture
def video():
    """Two seconds at two frames per second, as an animated image."""
    save_video("video.gif")
    return "video.gif"


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are asked for."""
    refuse_weights(monkeypatch)


@pytest.fixture
def run_python(tmp_path):
    """Runs Python code in a process in an empty directory; returns what it prints, and expects no complaint."""

    def run(code, *arguments, **variables):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run
