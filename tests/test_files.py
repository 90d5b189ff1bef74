"""Fingerprints change with the files of a model alone, and no file is written in place."""

import errno
import os
import pathlib
import shutil

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.checkpoints.hf_write import save_generation_config
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.errors import one_line
from glm4v_jax.files import fingerprint, model_fingerprint, replacing, set_dtype

STRAY = ("prompts.jsonl", "prompts.answers.jsonl", "answers.json", "notes.txt", "train/metrics.jsonl", "a.safetensors")


@pytest.fixture
def checkpoint(tmp_path):
    return pathlib.Path(shutil.copytree(RANDOM_CHECKPOINT, tmp_path / "model"))


@pytest.fixture
def orbax(tmp_path):
    """An Orbax checkpoint, as far as names go."""
    directory = tmp_path / "orbax"
    for name in ("_CHECKPOINT_METADATA", "orbax.checkpoint", "state/manifest.ocdbt", "state/d/0"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    shutil.copytree(RANDOM_CHECKPOINT, directory / "assets", ignore=shutil.ignore_patterns("model*"))
    return directory


@pytest.mark.parametrize("layout", ["checkpoint", "orbax"])
def test_stray_files_do_not_change_the_fingerprint_of_a_model(request, layout):
    directory = request.getfixturevalue(layout)
    before = model_fingerprint(directory)
    for name in STRAY:
        # A model in shards may have any safetensors file.
        if layout == "orbax" or name != "a.safetensors":
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text("stray")
            assert model_fingerprint(directory) == before, name
            assert fingerprint(directory) != before


def test_other_safetensors_do_not_count_beside_a_single_file(checkpoint):
    for shard in checkpoint.glob("model-*"):
        shard.rename(checkpoint / "model.safetensors")
    before = model_fingerprint(checkpoint)
    (checkpoint / "adapter_model.safetensors").write_text("stray")
    assert model_fingerprint(checkpoint) == before


@pytest.mark.parametrize("layout", ["checkpoint", "orbax"])
def test_every_file_of_a_model_changes_its_fingerprint(request, layout):
    directory = request.getfixturevalue(layout)
    found = {model_fingerprint(directory)}
    files = [path for path in directory.rglob("*") if path.is_file()]
    counted = [path for path in files if path.name not in ("README.md", "LICENSE")]
    for path in counted:
        path.write_bytes(path.read_bytes() + b" ")
        found.add(model_fingerprint(directory))
    assert len(counted) > 8 and len(found) == 1 + len(counted)
    next(path for path in files if path.name == "generation_config.json").unlink()
    assert model_fingerprint(directory) not in found


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_full_disk_leaves_the_old_file(checkpoint, monkeypatch, name):
    path = checkpoint / name
    before = path.read_text()

    def full(self, text, **_):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OSError, match="No space") as caught:
        if name == "config.json":
            set_dtype(path, "bfloat16")
        else:
            save_generation_config(GenerationConfig(), checkpoint)
    assert (caught.value.filename, path.read_text()) == (str(path), before)
    assert not list(checkpoint.glob(".*"))


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_failed_write_names_the_file_and_leaves_it_as_it_was(tmp_path, failing):
    path = tmp_path / "sheet.png"
    path.write_text("old")
    with pytest.raises(OSError, match="Read-only") as caught, replacing(path) as aside:
        aside.write_text("new")
        if failing == "write":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(aside))
        aside.unlink()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(aside), None, str(path))
    assert one_line(caught.value) == f"{path}: Read-only file system"
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["sheet.png"])


def test_a_file_is_replaced_by_what_was_written(tmp_path):
    path = tmp_path / "sheet.png"
    with replacing(path) as aside:
        aside.write_text("new")
    assert (path.read_text(), os.listdir(tmp_path)) == ("new", ["sheet.png"])


def test_an_empty_name_is_visible_in_an_error():
    assert one_line(FileNotFoundError(errno.ENOENT, "No such file", "")) == "'': No such file"
