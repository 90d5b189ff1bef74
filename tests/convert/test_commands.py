"""`python -m convert`: exit statuses, what is printed where, and one line for what is wrong."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers_convert import files_of
from helpers_paths import ROOT

import convert.progress
import convert.to_hf
import convert.verify
from convert.commands import COMMANDS, main
from glm4v_jax.checkpoints.safetensors import SafetensorsFile, write_safetensors


@pytest.fixture
def run(capsys):
    """Arguments -> (exit status, standard output, standard error)."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_there_and_back(run, synthetic, tmp_path):
    status, out, err = run("to-orbax", synthetic(), tmp_path / "orbax")
    assert (status, err) == (0, "") and out.startswith(f"{tmp_path / 'orbax'}: 89 tensors, 2.69 MB, in ")
    status, out, _ = run("to-hf", tmp_path / "orbax", tmp_path / "back", "--max-shard-size", "original")
    assert status == 0 and "89 tensors, 2.69 MB in 2 files, in " in out
    assert files_of(tmp_path / "back") == files_of(synthetic())
    status, out, _ = run("verify", tmp_path / "orbax", tmp_path / "back")
    assert status == 0 and out.splitlines()[0] == "equal: 89 tensors, 5.38 MB compared"


def test_options_reach_the_converter(run, synthetic, tmp_path):
    status, out, _ = run("to-orbax", synthetic(), tmp_path / "o", "--dtype", "float32", "--mesh", "fsdp=1", "--no-hash")
    assert status == 0 and "5.38 MB" in out
    run("to-hf", tmp_path / "o", tmp_path / "h", "--dtype", "float16", "--max-shard-size", "200KiB")
    names = sorted(path.name for path in (tmp_path / "h").glob("*.safetensors"))
    assert len(names) > 2
    assert {info.dtype for info in SafetensorsFile(tmp_path / "h" / names[0]).values()} == {np.dtype(np.float16)}
    status, _, err = run("to-orbax", synthetic(), tmp_path / "o", "--mesh", "tp=2")
    assert status == 1 and err.startswith("convert: error: mesh: found 'tp=2'")


def test_meshes_may_be_presets(run, synthetic, tmp_path):
    status, out, err = run("to-orbax", synthetic(), tmp_path / "o", "--mesh", "train:1")
    assert (status, err) == (0, "") and "89 tensors" in out
    status, out, _ = run("inspect", synthetic(), "--mesh", "latency:4", "--json")
    assert status == 0 and json.loads(out)["mesh"] == dict(data=1, fsdp=1, kv=2, q=2, seq=1)
    for mesh, problem in [
        ("latency", "mesh latency: found no number of devices; expected one, as in latency:8"),
        ("fast", "mesh: found 'fast'; expected one of the presets latency, throughput, train, long-context"),
        ("kv=4", "mesh kv=4: kv_heads of 2 does not divide by mesh axes kv of 4 devices"),
    ]:
        status, out, err = run("inspect", synthetic(), "--mesh", mesh)
        assert (status, out) == (1, "") and err.startswith(f"convert: error: {problem}")
    status, _, err = run("to-orbax", synthetic(), tmp_path / "p", "--mesh", "train:64")
    assert status == 1 and "needs 64 devices, found" in err and not (tmp_path / "p").exists()


def test_dry_runs_and_json(run, synthetic, tmp_path):
    for command in ("to-orbax", "to-hf"):
        status, out, _ = run(command, synthetic(), tmp_path / "out", "--dry-run")
        assert status == 0 and "nothing written; would have 89 tensors" in out
        status, out, _ = run(command, synthetic(), tmp_path / "out", "--dry-run", "--json")
        fields = json.loads(out)
        assert fields["tensors"] == 89 and fields["nbytes"] == 2688192 and fields["dry_run"] is True
    assert os.listdir(tmp_path) == []


def test_verify_says_what_differs(run, synthetic, tmp_path):
    run("synth", "--config", "tiny", "--out", tmp_path / "other", "--shards", "2")
    path = tmp_path / "other" / "model-00002-of-00002.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: np.array(file.read(name)) for name in file}
    tensors["model.visual.downsample.bias"][5] += 1
    write_safetensors(path, tensors)
    status, out, err = run("verify", synthetic(), tmp_path / "other")
    lines = out.splitlines()
    assert status == 1 and err == "" and lines[1].split()[0] == "visual.downsample.bias"
    assert "different: 1 of 89 tensors" in lines
    assert run("verify", synthetic(), tmp_path / "other", "--tolerance", "1.1")[0] == 0
    status, out, _ = run("verify", synthetic(), tmp_path / "other", "--json")
    (different,) = json.loads(out)["different"]
    assert status == 1 and different["unequal"] == 1 and different["name"] == "visual.downsample.bias"
    status, out, err = run("verify", synthetic(), tmp_path / "nowhere")
    assert status == 2 and out == "" and err.startswith("convert: error: ") and err.count("\n") == 1


def test_verify_has_two_for_any_trouble(run, synthetic, tmp_path, monkeypatch):
    run("to-orbax", synthetic(), tmp_path / "orbax")
    path = tmp_path / "orbax" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("model.visual.downsample.bias", "model.visual.downsample.bios"))
    status, out, err = run("verify", synthetic(), tmp_path / "orbax")
    assert (status, out) == (2, "") and "model.visual.downsample.bios: found" in err and err.count("\n") == 1

    def defect(*arguments, **options):
        raise KeyError("a defect")

    monkeypatch.setattr(convert.verify, "_compare", defect)
    status, out, err = run("verify", synthetic(), synthetic())
    assert (status, out) == (2, "") and err.startswith("Traceback") and "a defect" in err


def test_inspect(run, synthetic):
    status, out, _ = run("inspect", synthetic(), "--mesh", "fsdp=2,kv=2")
    assert status == 0
    assert "language_model.layers.{i}.mlp.gate_up_proj.weight x 4" in out
    assert out.splitlines()[-1].endswith("89 tensors, 1,344,096 parameters, 2,688,192 bytes; 769,760 on a device of "
                                         "data=1,fsdp=2,kv=2,q=1,seq=1")  # fmt: skip
    status, out, _ = run("inspect", synthetic(), "--json")
    assert status == 0 and json.loads(out)["parameters"] == 1_344_096


def test_synth(run, tmp_path):
    status, out, _ = run("synth", "--out", tmp_path / "a", "--dtype", "float32", "--shards", "1", "--seed", "3")
    assert status == 0 and "89 tensors, 5.38 MB in 1 file, in" in out
    status, _, err = run("synth", "--out", tmp_path / "a")
    assert (
        status == 1 and err == f"convert: error: {tmp_path / 'a'}: exists and is not empty; --overwrite replaces it\n"
    )
    assert run("synth", "--out", tmp_path / "a", "--overwrite")[0] == 0
    assert run("synth", "--out", tmp_path / "b", "--seed", "-1")[0] == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"], prog="glm4v convert")
    assert caught.value.code == 0
    assert f"glm4v convert {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["to-hf", "a"], ["to-hf", "a", "b", "--nonsense"]])
def test_misuse(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        main(["to-hf", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--debug"])


def test_ctrl_c(run, synthetic, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.to_hf, "write_shards", interrupted)
    status, out, err = run("to-hf", synthetic(), tmp_path / "out")
    assert (status, out) == (130, "")
    assert err == "convert: interrupted; what was written has been removed, the source is as it was\n"
    assert os.listdir(tmp_path) == []


def test_ctrl_c_twice(run, synthetic, tmp_path, monkeypatch):
    """The second comes while what was written is being removed: it is not said to be gone."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.to_hf, "write_shards", interrupted)
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    status, out, err = run("to-hf", synthetic(), tmp_path / "out")
    left = tmp_path / ".out.unfinished"
    assert (status, out) == (130, "") and left.is_dir()
    told = f"convert: interrupted; {left} is left until the next run to the same place, the source is as it was\n"
    assert err == told


def test_plain_lines_now_and_then(capsys, monkeypatch):
    now = iter([0.0, 3.0, 12.0, 15.0, 30.0])
    monkeypatch.setattr(convert.progress.time, "perf_counter", lambda: next(now))
    with convert.progress.shown("to Orbax") as progress:
        for done in (1, 2, 3, 6):
            progress(done * 10**9, 8 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "to Orbax: 2.00 GB of 8.00 GB, 167 MB/s, 36 s left",
        "to Orbax: 6.00 GB of 8.00 GB, 200 MB/s, 10 s left",
    ]


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with convert.progress.shown("to Orbax") as progress:
        progress(10**9, 8 * 10**9)
        progress(8 * 10**9, 8 * 10**9)
    assert "to Orbax" in (told := capsys.readouterr().err) and "8.0/8.0 GB" in told


def test_as_a_program(synthetic, tmp_path):
    command = [sys.executable, "-m", "convert"]
    done = subprocess.run(
        [*command, "verify", synthetic(), synthetic(count=1)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("equal: 89 tensors") and done.stderr == ""
