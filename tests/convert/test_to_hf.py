"""To safetensors: the same files come back, transformers takes them, and nothing half done is left behind."""

import errno
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers_convert import files_of, read_all
from hypothesis import given
from hypothesis import strategies as st
from reference import CONFIGS, load_theirs, random_tensors, their_inputs

from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax.checkpoints import hf_shards
from glm4v_jax.checkpoints.atomic_directory import new_directory
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, open_checkpoint, write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.files import is_orbax

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])


class TestRoundTrip:
    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_through_orbax_every_file_is_the_same(self, synthetic, tmp_path, dtype, count):
        source = synthetic(dtype, count)
        to_orbax(source, tmp_path / "orbax")
        summary = to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="original")
        assert files_of(tmp_path / "back") == files_of(source)
        assert summary.files == count and summary.tensors == len(open_checkpoint(source))

    def test_four_shards(self, tmp_path):
        tensors = random_tensors(CONFIG)
        names = list(tensors)
        plan = {hf_shards.shard_name(i, 4): names[i::4] for i in range(4)}
        source = tmp_path / "source"
        source.mkdir()
        CONFIG.save_pretrained(source)
        hf_shards.write_shards(source, tensors, plan)
        to_orbax(source, tmp_path / "orbax")
        to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="original")
        assert files_of(tmp_path / "back") == files_of(source)

    @pytest.mark.parametrize("prefix", ["", "model."])
    def test_names_stay_as_they_were(self, tmp_path, prefix):
        tensors = {
            name if name.startswith("lm_head") else prefix + name.removeprefix("model."): tensor
            for name, tensor in random_tensors(CONFIG).items()
        }
        source = tmp_path / "source"
        source.mkdir()
        CONFIG.save_pretrained(source)
        write_safetensors(source / "model.safetensors", tensors, {"format": "pt", "by": "a test"})
        to_orbax(source, tmp_path / "orbax")
        to_hf(tmp_path / "orbax", tmp_path / "back")
        assert files_of(tmp_path / "back") == files_of(source)

    @pytest.mark.parametrize("size", ["100KB", "5GB"])
    def test_other_shards_hold_the_same_tensors(self, synthetic, tmp_path, size):
        to_hf(synthetic(count=2), tmp_path / "other", max_shard_size=size)
        found, expected = read_all(tmp_path / "other"), read_all(synthetic(count=2))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and found[name].tobytes() == tensor.tobytes()
        index = tmp_path / "other" / "model.safetensors.index.json"
        assert index.exists() == (size == "100KB")

    @pytest.mark.parametrize("through_orbax", [True, False])
    def test_cast(self, synthetic, tmp_path, through_orbax):
        source = synthetic("float32", 1)
        if through_orbax:
            to_orbax(source, tmp_path / "orbax")
        to_hf(tmp_path / "orbax" if through_orbax else source, tmp_path / "half", dtype="bfloat16")
        for name, tensor in read_all(tmp_path / "half").items():
            expected = read_all(source)[name].astype(ml_dtypes.bfloat16)
            assert tensor.dtype == ml_dtypes.bfloat16 and tensor.tobytes() == expected.tobytes()
        config = json.loads((tmp_path / "half" / "config.json").read_text())
        before = json.loads((source / "config.json").read_text())
        assert before["text_config"].pop("dtype") == "float32" and config["text_config"].pop("dtype") == "bfloat16"
        assert config == before


class TestTransformers:
    @pytest.mark.parametrize("name", ["base", "tester"])
    def test_the_result_loads_and_gives_the_same_logits(self, checkpoints, tmp_path, name, theirs):
        from reference import Prompts

        torch = pytest.importorskip("torch")
        to_orbax(checkpoints(name), tmp_path / "orbax")
        to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="100KB")
        assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
        back, before = load_theirs(tmp_path / "back"), theirs(name)  # asserts that no key is missing or unexpected
        prompts = Prompts(Glm4vConfig.from_dict(CONFIGS[name]), [[9, ("image", (8, 8)), 4]])
        with torch.no_grad():
            ours, expected = (model(**their_inputs(model, prompts)).logits for model in (back, before))
        assert torch.equal(ours, expected)

    def test_its_own_files_come_back(self, theirs, tmp_path):
        theirs("base").save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
        to_orbax(tmp_path / "theirs", tmp_path / "orbax")
        to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="original")
        assert files_of(tmp_path / "back") == files_of(tmp_path / "theirs")


class TestPlan:
    @given(
        sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
        limit=st.integers(1, 60),
    )
    def test_shards_are_those_of_huggingface_hub(self, sizes, limit):
        hub = pytest.importorskip("huggingface_hub.serialization._base")
        named = {f"t{i:02d}": size for i, size in enumerate(sizes)}
        theirs = hub.split_state_dict_into_shards_factory(
            named, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
        )
        assert hf_shards.plan_shards(named, limit) == theirs.filename_to_tensors

    @pytest.mark.parametrize(
        ("text", "size"),
        [("5GB", 5 * 10**9), ("200MiB", 200 * 2**20), ("1.5kb", 1500), (" 3 TB ", 3 * 10**12), ("77", 77), (88, 88)],
    )
    def test_sizes(self, text, size):
        assert hf_shards.parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "0.1", "5 G", "1e9", "nan"])
    def test_no_sizes(self, text):
        with pytest.raises(ConfigError, match=r"max_shard_size: found .* expected a size such as 5GB"):
            hf_shards.parse_size(text)


class TestPlaces:
    def test_a_dry_run_writes_nothing(self, synthetic, tmp_path):
        summary = to_hf(synthetic(), tmp_path / "out", dry_run=True)
        assert summary.dry_run and summary.files == 1 and os.listdir(tmp_path) == []

    def test_what_is_there_stays(self, synthetic, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "precious").write_text("kept")
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match=r"mine: exists .* is no checkpoint: found precious; expected"):
                to_hf(synthetic(), tmp_path / "mine", overwrite=overwrite)
            assert files_of(tmp_path / "mine") == {"precious": b"kept"} and os.listdir(tmp_path) == ["mine"]

    @pytest.mark.parametrize("name", ["config.json", "model-00001-of-00009.safetensors", "_CHECKPOINT_METADATA"])
    def test_a_checkpoint_is_replaced(self, synthetic, tmp_path, name):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / name).write_text("{}")
        (tmp_path / "mine" / "precious").write_text("gone")
        with pytest.raises(CheckpointError, match="mine: exists and is not empty; --overwrite replaces it"):
            to_hf(synthetic(), tmp_path / "mine")
        to_hf(synthetic(), tmp_path / "mine", overwrite=True)
        assert os.listdir(tmp_path) == ["mine"] and not (tmp_path / "mine" / "precious").exists()

    def test_the_root_of_a_file_system_is_no_target(self, synthetic, tmp_path, monkeypatch):
        with pytest.raises(CheckpointError, match="/: found a mount point"):
            to_hf(synthetic(), "/", overwrite=True)
        monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
        with pytest.raises(CheckpointError, match="disk: found a mount point, which cannot be replaced; expected"):
            to_hf(synthetic(), tmp_path / "disk")
        assert os.listdir(tmp_path) == []

    def test_a_path_that_goes_up_again(self, synthetic, tmp_path):
        to_hf(synthetic(), tmp_path / "out" / "sub" / "..")
        assert os.listdir(tmp_path) == ["out"] and read_all(tmp_path / "out").keys() == read_all(synthetic()).keys()
        to_orbax(synthetic(), tmp_path / "orbax" / "sub" / "..")
        assert sorted(os.listdir(tmp_path)) == ["orbax", "out"] and is_orbax(tmp_path / "orbax")

    def test_it_writes_into_an_empty_directory(self, synthetic, tmp_path):
        to_hf(synthetic(), tmp_path)
        assert read_all(tmp_path).keys() == read_all(synthetic()).keys()

    @pytest.mark.parametrize("place", [".", "inside", ".."])
    def test_the_source_is_no_target(self, synthetic, place):
        before = files_of(synthetic())
        with pytest.raises(CheckpointError, match="found the source, or a directory in or around it"):
            to_hf(synthetic(), synthetic() / place, overwrite=True)
        assert files_of(synthetic()) == before

    def test_too_small_a_disk_is_noticed_before(self, synthetic, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(CheckpointError, match=r"out: needs [\d,]{6,} bytes, found 1,000 free"):
            to_hf(synthetic(), tmp_path / "out")
        assert os.listdir(tmp_path) == []

    def test_a_disk_that_fills_up(self, synthetic, tmp_path, monkeypatch):
        """The old checkpoint stays, the new one is gone, the source is as it was."""
        to_hf(synthetic(), tmp_path / "out")
        before, source = files_of(tmp_path / "out"), files_of(synthetic())
        _fail_at(monkeypatch, 5, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(CheckpointError, match=r"out: the disk is full \([\d,]+ bytes free\); what was written"):
            to_hf(synthetic(), tmp_path / "out", overwrite=True)
        assert os.listdir(tmp_path) == ["out"]
        assert files_of(tmp_path / "out") == before and files_of(synthetic()) == source

    def test_an_interrupted_run_leaves_nothing(self, synthetic, tmp_path, monkeypatch):
        _fail_at(monkeypatch, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            to_hf(synthetic(), tmp_path / "out")
        assert os.listdir(tmp_path) == []

    def test_what_a_killed_run_left_is_replaced(self, synthetic, tmp_path):
        left = tmp_path / ".out.unfinished"
        (left / "folder").mkdir(parents=True)
        (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
        to_hf(synthetic(), tmp_path / "out")
        assert os.listdir(tmp_path) == ["out"] and read_all(tmp_path / "out").keys() == read_all(synthetic()).keys()

    def test_a_kill_between_the_two_renames_loses_nothing(self, synthetic, tmp_path):
        """Of replacing a checkpoint: the old one has gone aside, the new one has not come yet."""
        to_hf(synthetic(), tmp_path / ".out.replaced")
        before = files_of(tmp_path / ".out.replaced")
        with pytest.raises(CheckpointError, match="out: exists and is not empty"):
            to_hf(synthetic(), tmp_path / "out")
        assert os.listdir(tmp_path) == ["out"] and files_of(tmp_path / "out") == before

    def test_a_dry_run_leaves_that_as_it_is(self, synthetic, tmp_path):
        to_hf(synthetic(), tmp_path / ".out.replaced")
        for convert in (to_hf, to_orbax):
            with pytest.raises(CheckpointError, match="out: exists and is not empty; --overwrite"):
                convert(synthetic(), tmp_path / "out", dry_run=True)
            convert(synthetic(), tmp_path / "out", dry_run=True, overwrite=True)
            assert os.listdir(tmp_path) == [".out.replaced"]

    def test_what_the_next_run_writes_is_let_be(self, tmp_path, monkeypatch):
        """It may begin as soon as this one's directory has its name."""
        rename = Path.rename

        def and_the_next_begins(path, target):
            rename(path, target)
            path.mkdir()
            (path / "next").write_text("written")

        monkeypatch.setattr(Path, "rename", and_the_next_begins)
        with new_directory(tmp_path / "out", overwrite=False) as directory:
            (directory / "this").write_text("written")
        assert files_of(tmp_path / "out") == {"this": b"written"}
        assert files_of(tmp_path / ".out.unfinished") == {"next": b"written"}

    def test_two_runs_do_not_mix(self, synthetic, tmp_path):
        with pytest.raises(CheckpointError, match="out: another process is writing it"):
            _locked_elsewhere(tmp_path / "out", lambda: to_hf(synthetic(), tmp_path / "out"))


def _locked_elsewhere(target: Path, body):
    """Run `body` while another open file holds the lock."""
    import fcntl

    directory = target.with_name(f".{target.name}.unfinished")
    directory.mkdir(exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        body()
    finally:
        os.close(descriptor)


def _fail_at(monkeypatch, number, error):
    """Make the n-th read of a tensor fail."""
    read, count = CheckpointFiles.read, 0

    def failing(self, name, index=...):
        nonlocal count
        count += 1
        if count == number:
            raise error
        return read(self, name, index)

    monkeypatch.setattr(CheckpointFiles, "read", failing)


@pytest.mark.parametrize("convert", [to_hf, to_orbax])
@pytest.mark.parametrize("piece", [100, 1 << 20])
def test_a_cast_that_loses_numbers_is_refused(tmp_path, convert, piece, monkeypatch):
    """Those that were infinite or none before are no loss."""
    monkeypatch.setattr("glm4v_jax.checkpoints.safetensors.PIECE_BYTES", piece)
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in random_tensors(CONFIG).items()}
    name = "model.language_model.layers.1.mlp.gate_up_proj.weight"
    tensors[name][3, :2] = np.inf, np.nan
    source = tmp_path / "source"
    source.mkdir()
    CONFIG.save_pretrained(source)
    write_safetensors(source / "model.safetensors", tensors)
    convert(source, tmp_path / "out", dtype="float16")
    found = open_weights(tmp_path / "out").read(name)
    assert np.isposinf(found[3, 0]) and np.isnan(found[3, 1]) and np.isfinite(found).sum() == found.size - 2
    tensors[name][[5, -1], 7] = 1e6, -1e6
    write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"{name}: found 2 numbers too large for float16; expected none"):
        convert(source, tmp_path / "other", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
    convert(source, tmp_path / "other", dtype="float32")


def test_progress_counts_every_byte(synthetic, tmp_path):
    told = []
    to_hf(synthetic(), tmp_path / "out", progress=lambda *now: told.append(now))
    total = sum(info.nbytes for info in open_checkpoint(synthetic()).values())
    assert told[-1] == (total, total) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_tensor_is_written_by_pieces(tmp_path, monkeypatch):
    """Pieces that end within rows' worth of data come out in order."""
    from glm4v_jax.checkpoints import safetensors

    monkeypatch.setattr(safetensors, "PIECE_BYTES", 100)
    rng = np.random.default_rng(0)
    tensors = {"t": rng.standard_normal((7, 3, 5)).T, "f": rng.standard_normal((9, 30)).astype(np.float32)}
    write_safetensors(tmp_path / "a", tensors)
    file = safetensors.SafetensorsFile(tmp_path / "a")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.read(name), tensor)
