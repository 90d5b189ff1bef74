"""Where a model is, fingerprints that change with the files of a model alone, and no file written in place."""

import errno
import json
import os
import pathlib
import shutil

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.checkpoints.hf_write import save_generation_config
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.checkpoints.safetensors import open_checkpoint
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, one_line
from glm4v_jax.files import (
    assets_directory,
    base_of,
    fingerprint,
    model_directory,
    model_fingerprint,
    other_base,
    read_json_object,
    read_text,
    replacing,
    set_dtype,
)
from glm4v_jax.generate.engine import Engine
from glm4v_jax.inputs.processor import Glm4vProcessor

STRAY = (
    "prompts.jsonl", "prompts.answers.jsonl", "answers.json", "notes.txt", "train/metrics.jsonl",
    "chat_template.jinja~", "chat_template.jinja.bak", "old_preprocessor_config.json", "a.safetensors",
)  # fmt: skip


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


def test_the_assets_of_an_orbax_checkpoint_stand_for_it(orbax, checkpoint, tmp_path, monkeypatch):
    assert model_directory(orbax / "assets") == model_directory(orbax) == orbax
    assert model_fingerprint(orbax / "assets") == model_fingerprint(orbax)
    (tmp_path / "link").symlink_to(orbax / "assets")
    assert model_directory(tmp_path / "link") == orbax
    monkeypatch.chdir(orbax / "assets")
    assert model_directory(".") == orbax
    # Elsewhere it is a name like others.
    other = checkpoint.rename(tmp_path / "assets")
    assert model_directory(other) == assets_directory(other) == other and open_checkpoint(other)
    (orbax / "assets" / "_CHECKPOINT_METADATA").touch()
    assert model_directory(orbax / "assets") == orbax / "assets"


def test_assets_without_their_checkpoint_are_refused_by_that(orbax, tmp_path):
    copied = shutil.copytree(orbax / "assets", tmp_path / "copied")
    expected = f"{copied}: found no weights; expected model.safetensors.*; assets of an Orbax checkpoint .* inside it"
    with pytest.raises(CheckpointError, match=expected):
        open_weights(copied)


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


def test_a_disk_that_is_full_while_a_file_is_written_names_it(tmp_path):
    """Python names a file that cannot be opened, and not one whose content the system refuses."""
    path = tmp_path / "report.json"
    (tmp_path / f".report.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, replacing(path) as aside:
        aside.write_text("{}")
    assert one_line(caught.value) == f"{path}: No space left on device" and not os.listdir(tmp_path)


def test_a_large_file_may_be_covered_whole(tmp_path):
    (tmp_path / "rows").write_bytes(bytes(3 << 20))
    before = [fingerprint(tmp_path / "rows", *whole) for whole in ((), (4 << 20,))]
    with (tmp_path / "rows").open("r+b") as file:
        file.seek(5000)
        file.write(b"1")
    after = [fingerprint(tmp_path / "rows", *whole) for whole in ((), (4 << 20,))]
    assert after[0] == before[0] and after[1] != before[1]


def test_a_dtype_is_added_where_none_is_named(tmp_path):
    """Other programs guess one."""
    for before, after in (({}, {"dtype": "float32"}), ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"})):
        (tmp_path / "config.json").write_text(json.dumps(before))
        set_dtype(tmp_path / "config.json", "float32")
        assert json.loads((tmp_path / "config.json").read_text()) == after


def test_files_of_a_model_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json_object(tmp_path / "config.json") == {"a": 1}
    (tmp_path / "chat_template.jinja").write_text("{{ a }}", encoding="utf-8-sig")
    assert read_text(tmp_path / "chat_template.jinja") == "{{ a }}"


def test_an_empty_name_is_visible_in_an_error():
    assert one_line(FileNotFoundError(errno.ENOENT, "No such file", "")) == "'': found no such file; expected one"


NAME = "zai-org/GLM-4.1V-9B-Thinking"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The local Hugging Face cache, with a model."""
    place = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    (place / "snapshots" / ("0" * 40)).symlink_to(RANDOM_CHECKPOINT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return place


def test_a_name_is_found_in_the_hugging_face_cache_by_everything_that_reads_a_model(hub):
    assert model_directory(NAME) == hub / "snapshots" / ("0" * 40)
    assert Glm4vConfig.from_pretrained(NAME) == Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT)
    assert GenerationConfig.from_pretrained(NAME) == GenerationConfig.from_pretrained(RANDOM_CHECKPOINT)
    assert Glm4vProcessor.from_pretrained(NAME).chat_template
    assert model_fingerprint(NAME) == model_fingerprint(RANDOM_CHECKPOINT)


def test_a_name_that_is_not_in_the_cache_says_how_to_download_it(hub):
    with pytest.raises(CheckpointError, match="found zai-org/other, which is neither a directory nor in the local Hug"):
        model_directory("zai-org/other")
    with pytest.raises(CheckpointError, match=r"download it first: hf download zai-org/other$"):
        Glm4vConfig.from_pretrained("zai-org/other")


def test_a_directory_wins_over_a_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path(NAME).mkdir(parents=True)
    assert model_directory(NAME) == pathlib.Path(NAME)


def test_an_adapter_in_the_place_of_a_model_is_named_with_the_right_options(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    with pytest.raises(CheckpointError, match=r"found an adapter; expected a model: pass --model base --adapter /.*"):
        Glm4vConfig.from_pretrained(tmp_path / "adapter")
    for read in (Glm4vProcessor.from_pretrained, open_checkpoint, Engine.from_pretrained):
        with pytest.raises(CheckpointError, match="found an adapter; expected a model"):
            read(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"found no config.json; .*; did you mean .*/adapter\?$"):
        Glm4vConfig.from_pretrained(tmp_path)  # the output directory of a job


def test_the_base_of_an_adapter_is_what_it_names_if_that_is_here(tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text(f'{{"base_model_name_or_path": "{RANDOM_CHECKPOINT}"}}')
    assert base_of(tmp_path) == str(RANDOM_CHECKPOINT)
    for name in ("null", '"/nowhere"', "3"):
        config.write_text(f'{{"base_model_name_or_path": {name}}}')
        with pytest.raises(CheckpointError, match="--model: found nothing"):
            base_of(tmp_path)


@pytest.mark.parametrize(
    ("named", "model", "is_other"),
    [
        ("zai-org/GLM-OCR", "models/GLM-OCR", False),
        ("zai-org/GLM-OCR", "hub/models--zai-org--GLM-OCR/snapshots/1a", False),
        ("zai-org/GLM-4.6V-Flash", "models/GLM-4.1V-9B-Thinking", True),
        ("models/../models/GLM-OCR", "models/GLM-OCR/../GLM-OCR", False),
        (None, "models/GLM-OCR", False),
        ("one/out/model", "other/out/model", True),
        ("one/out/model", "one/out/model", False),
    ],
)
def test_another_base_of_an_adapter_is_told_by_place_and_name(tmp_path, named, model, is_other):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    assert other_base(tmp_path, model) == (named if is_other else None)
