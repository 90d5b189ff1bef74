"""`python -m convert`: exit statuses, what is printed where, and one line for what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_convert import files_of
from helpers_paths import ROOT

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


def test_files_come_back_through_orbax(run, synthetic, tmp_path):
    status, out, err = run("to-orbax", synthetic(), tmp_path / "orbax")
    assert (status, err) == (0, "") and out.startswith(f"{tmp_path / 'orbax'}: 89 tensors, 2.69 MB, in ")
    status, out, _ = run("to-hf", tmp_path / "orbax", tmp_path / "back", "--max-shard-size", "original")
    assert status == 0 and "89 tensors, 2.69 MB in 2 files, in " in out
    assert files_of(tmp_path / "back") == files_of(synthetic())
    status, out, _ = run("verify", tmp_path / "orbax", tmp_path / "back")
    assert status == 0 and out.splitlines()[0] == "equal: 89 tensors, 5.38 MB compared"


@pytest.mark.slow
def test_options_of_to_orbax_reach_it(run, synthetic, tmp_path):
    options = ("--dtype", "float32", "--mesh", "fsdp=1", "--no-hash")
    status, out, _ = run("to-orbax", synthetic(), tmp_path / "o", *options)
    assert status == 0 and "5.38 MB" in out


def test_options_of_to_hf_reach_it(run, synthetic, tmp_path):
    run("to-hf", synthetic(), tmp_path / "h", "--dtype", "float16", "--max-shard-size", "200KiB")
    names = sorted(path.name for path in (tmp_path / "h").glob("*.safetensors"))
    assert len(names) > 2
    assert {info.dtype for info in SafetensorsFile(tmp_path / "h" / names[0]).values()} == {np.dtype(np.float16)}


def test_to_orbax_takes_presets_of_meshes(run, synthetic, tmp_path):
    status, out, err = run("to-orbax", synthetic(), tmp_path / "o", "--mesh", "train:1")
    assert (status, err) == (0, "") and "89 tensors" in out


def test_inspect_takes_presets_of_meshes(run, synthetic):
    status, out, _ = run("inspect", synthetic(), "--mesh", "latency:4", "--json")
    whole = json.loads(out)
    assert status == 0 and whole["mesh"] == dict(data=1, fsdp=1, kv=2, q=2, seq=1)
    status, out, _ = run("inspect", synthetic(), "--mesh", "latency:4", "--quantize", "int8", "--json")
    assert status == 0 and 0.5 < json.loads(out)["device_bytes"] / whole["device_bytes"] < 0.6


@pytest.mark.parametrize(
    ("mesh", "problem"),
    [("latency", "latency: "), ("fast", "'fast'"), ("tp=2", "'tp=2'"), ("kv=4", "kv_heads of 2 is not divisible")],
)
def test_invalid_meshes_are_refused(run, synthetic, mesh, problem):
    status, out, err = run("inspect", synthetic(), "--mesh", mesh)
    assert (status, out) == (1, "") and err.startswith("convert: error: ") and problem in err


def test_a_mesh_without_its_devices_is_refused(run, synthetic, tmp_path):
    status, _, err = run("to-orbax", synthetic(), tmp_path / "p", "--mesh", "train:64")
    assert status == 1 and "needs 64 devices, found" in err and not (tmp_path / "p").exists()


@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_dry_runs_write_nothing(run, synthetic, tmp_path, command):
    status, out, _ = run(command, synthetic(), tmp_path / "out", "--dry-run")
    assert status == 0 and "nothing written; would have 89 tensors" in out
    status, out, _ = run(command, synthetic(), tmp_path / "out", "--dry-run", "--json")
    fields = json.loads(out)
    assert fields["tensors"] == 89 and fields["nbytes"] == 2688192 and fields["dry_run"] is True
    assert os.listdir(tmp_path) == []


@pytest.fixture
def changed(synthetic, tmp_path):
    """A copy of the synthetic checkpoint with one number increased by 1."""
    directory = Path(shutil.copytree(synthetic(), tmp_path / "changed"))
    path = directory / "model-00002-of-00002.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: np.array(file.read(name)) for name in file}
    tensors["model.visual.downsample.bias"][5] += 1
    write_safetensors(path, tensors)
    return directory


def test_verify_prints_what_differs(run, synthetic, changed):
    status, out, err = run("verify", synthetic(), changed)
    lines = out.splitlines()
    assert status == 1 and err == "" and lines[1].split()[0] == "visual.downsample.bias"
    assert "different: 1 of 89 tensors" in lines


def test_verify_accepts_differences_within_the_tolerance(run, synthetic, changed):
    status, out, _ = run("verify", synthetic(), changed, "--tolerance", "1.1")
    assert status == 0 and out.startswith("equal within 1.1: 89 tensors")


def test_verify_writes_json(run, synthetic, changed):
    status, out, _ = run("verify", synthetic(), changed, "--json")
    (different,) = json.loads(out)["different"]
    assert status == 1 and different["unequal"] == 1 and different["name"] == "visual.downsample.bias"


def test_verify_has_status_two_without_a_checkpoint(run, synthetic, tmp_path):
    status, out, err = run("verify", synthetic(), tmp_path / "nowhere")
    assert status == 2 and out == "" and err.startswith("convert: error: ") and err.count("\n") == 1


def test_verify_has_status_two_for_a_damaged_checkpoint(run, synthetic, tmp_path):
    run("to-orbax", synthetic(), tmp_path / "orbax")
    path = tmp_path / "orbax" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("model.visual.downsample.bias", "model.visual.downsample.bios"))
    status, out, err = run("verify", synthetic(), tmp_path / "orbax")
    assert (status, out) == (2, "") and "model.visual.downsample.bios: found" in err and err.count("\n") == 1


def test_verify_has_status_two_for_a_defect(run, synthetic, monkeypatch):
    def defect(*arguments, **options):
        raise KeyError("a defect")

    monkeypatch.setattr(convert.verify, "_compare", defect)
    status, out, err = run("verify", synthetic(), synthetic())
    assert (status, out) == (2, "") and err.startswith("Traceback") and "a defect" in err


def test_inspect_prints_tensors_and_totals(run, synthetic):
    status, out, _ = run("inspect", synthetic(), "--mesh", "fsdp=2,kv=2")
    assert status == 0
    assert "language_model.layers.{i}.mlp.gate_up_proj.weight x 4" in out
    assert out.splitlines()[-1].endswith("89 tensors, 1,344,096 parameters, 2,688,192 bytes; 769,760 on a device of "
                                         "data=1,fsdp=2,kv=2,q=1,seq=1")  # fmt: skip
    status, out, _ = run("inspect", synthetic(), "--json")
    assert status == 0 and json.loads(out)["parameters"] == 1_344_096


def test_synth_writes_a_checkpoint(run, tmp_path):
    status, out, _ = run("synth", "--out", tmp_path / "a", "--dtype", "float32", "--shards", "1", "--seed", "3")
    assert status == 0 and "89 tensors, 5.38 MB in 1 file, in" in out


def test_synth_replaces_a_checkpoint_with_overwrite(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    status, _, err = run("synth", "--out", tmp_path)
    expected = "found a checkpoint; expected nothing, or an empty directory: --overwrite replaces it"
    assert (status, err) == (1, f"convert: error: {tmp_path}: {expected}\n")
    assert run("synth", "--out", tmp_path, "--overwrite")[0] == 0


def test_synth_refuses_a_negative_seed(run, tmp_path):
    status, _, err = run("synth", "--out", tmp_path / "b", "--seed", "-1")
    assert status == 1 and err.startswith("convert: error: --seed: found -1; expected an integer of at least 0")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"], prog="glm4v convert")
    assert caught.value.code == 0
    assert f"glm4v convert {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["to-hf", "a"], ["to-hf", "a", "b", "--nonsense"]])
def test_unknown_options_have_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        main(["to-hf", str(tmp_path / "nowhere"), str(tmp_path / "out"), "-v"])


@pytest.mark.parametrize("is_twice", [False, True])
def test_ctrl_c_removes_what_was_written_or_names_what_is_left(run, synthetic, tmp_path, monkeypatch, is_twice):
    """A second one during the cleanup ends that."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.to_hf, "write_shards", interrupted)
    if is_twice:
        monkeypatch.setattr(shutil, "rmtree", interrupted)
    status, out, err = run("to-hf", synthetic(), tmp_path / "out")
    left = tmp_path / ".out.unfinished"
    became = f"{left} is left until the next run to the same place" if is_twice else "what was written has been removed"
    assert (status, out) == (130, "") and list(tmp_path.iterdir()) == ([left] if is_twice else [])
    assert err == f"convert: interrupted; {became}, the source is as it was\n"


def test_it_runs_as_a_program(synthetic):
    command = [sys.executable, "-m", "convert"]
    done = subprocess.run(
        [*command, "verify", synthetic(), synthetic(count=1)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("equal: 89 tensors") and done.stderr == ""
