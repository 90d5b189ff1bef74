"""`glm4v doctor`: what it shows where all is well, and where devices and packages are missing."""

import importlib.metadata
import json

import jax
import pytest

import glm4v_jax
from glm4v_jax.cli import doctor
from glm4v_jax.cli.main import main


def found_in(capfd, *options):
    assert main(["doctor", *options]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    return captured.out


def test_it_names_versions_devices_memory_caches_extras_and_decoders(capfd, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "programs")
    found = json.loads(found_in(capfd, "--json"))
    assert found["glm4v_jax"] == glm4v_jax.__version__
    assert found["packages"]["jax"] == importlib.metadata.version("jax")
    assert found["devices"]["count"] == jax.device_count() and found["devices"]["local"][0]["platform"] == "cpu"
    assert all(0 < memory["free"] <= memory["total"] for memory in found["memory"])
    assert found["cache"] == {"directory": "programs", "files": 0, "bytes": 0, "max_bytes": None}
    assert found["extras"]["train"] == [] and "gpu" not in found["extras"]
    assert set(found["decoders"]) == {"decord", "av"}
    assert found["environment"]["JAX_COMPILATION_CACHE_DIR"] == "programs"
    assert found["model"] and found["hub"]["directory"]


def test_the_table_has_the_same(capfd):
    lines = found_in(capfd).splitlines()
    assert lines[0].split() == ["glm4v_jax", glm4v_jax.__version__]
    text = "\n".join(lines)
    for word in ("devices", "host memory", "compiled programs", "extra eval", "decoders", "default model"):
        assert word in text


@pytest.fixture
def no_device(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda':\n no such device")

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.mark.usefixtures("no_device")
def test_other_commands_say_so_in_a_line(capfd, monkeypatch):
    def fail(*_, **__):
        raise AssertionError  # as JAX 0.10 does, without a word

    monkeypatch.setattr("glm4v_jax.checkpoints.load.load_runtime", fail)
    assert main(["generate", "Hello"]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("glm4v: error: JAX: found no device of $JAX_PLATFORMS, cpu (Unable to initialize backend")
    assert line.endswith("; `glm4v doctor` shows more")


@pytest.mark.usefixtures("no_device")
def test_a_device_that_jax_cannot_find_is_said(capfd):
    line = next(line for line in found_in(capfd).splitlines() if line.startswith("devices"))
    assert line.split(maxsplit=1)[1] == (
        "JAX: found no device of $JAX_PLATFORMS, cpu (Unable to initialize backend 'cuda': no such device); expected "
        "at least one"
    )


def test_missing_packages_of_extras_are_named(capfd, monkeypatch):
    monkeypatch.setattr(doctor, "extras", lambda: {"docs": ["sphinx-of-tomorrow"], "eval": ["scikit-learn"]})
    found = json.loads(found_in(capfd, "--json"))
    assert found["extras"] == {"docs": ["sphinx-of-tomorrow"], "eval": []}


def test_a_cache_that_is_switched_off_is_said(capfd, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert "found an empty value" in json.loads(found_in(capfd, "--json"))["cache"]["error"]
