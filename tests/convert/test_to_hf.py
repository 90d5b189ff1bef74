"""To safetensors: the same files come back, transformers takes them, and nothing half done is left behind."""

import errno
import json
import os
import shutil

import ml_dtypes
import pytest
from helpers_convert import files_of, read_all
from reference import CONFIGS, load_theirs, random_tensors, their_inputs

from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax.checkpoints import hf_write
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, open_checkpoint, write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError

pytestmark = pytest.mark.slow

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

    def test_tensors_spread_over_four_shards_stay_in_them(self, tmp_path):
        tensors = random_tensors(CONFIG)
        names = list(tensors)
        plan = {hf_write.shard_name(i, 4): names[i::4] for i in range(4)}
        source = tmp_path / "source"
        source.mkdir()
        CONFIG.save_pretrained(source)
        hf_write.write_shards(source, tensors, plan)
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
    def test_a_cast_rounds_to_nearest_even_and_updates_the_configuration(self, synthetic, tmp_path, through_orbax):
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
        # Loaders other than transformers look for it here.
        assert "dtype" not in before and config.pop("dtype") == "bfloat16"
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

    def test_files_that_it_saved_come_back_byte_for_byte(self, theirs, tmp_path):
        theirs("base").save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
        to_orbax(tmp_path / "theirs", tmp_path / "orbax")
        to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="original")
        assert files_of(tmp_path / "back") == files_of(tmp_path / "theirs")


class TestOutput:
    def test_a_dry_run_writes_nothing(self, synthetic, tmp_path):
        summary = to_hf(synthetic(), tmp_path / "out", dry_run=True)
        assert summary.dry_run and summary.files == 1 and os.listdir(tmp_path) == []

    def test_the_source_is_refused_as_target(self, synthetic):
        before = files_of(synthetic())
        with pytest.raises(CheckpointError, match="found the source, or a directory in or around it"):
            to_hf(synthetic(), synthetic(), overwrite=True)
        assert files_of(synthetic()) == before

    def test_too_small_a_disk_is_noticed_before_writing(self, synthetic, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(CheckpointError, match=r"out: needs [\d,]{6,} bytes, found 1,000 free"):
            to_hf(synthetic(), tmp_path / "out")
        assert os.listdir(tmp_path) == []

    def test_a_disk_that_fills_up_leaves_the_old_checkpoint_and_the_source(self, synthetic, tmp_path, monkeypatch):
        to_hf(synthetic(), tmp_path / "out")
        before, source = files_of(tmp_path / "out"), files_of(synthetic())
        _fail_at(monkeypatch, 5, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(
            CheckpointError, match=r"out: found a full disk \([\d,]+ bytes free\); expected .* what was written"
        ):
            to_hf(synthetic(), tmp_path / "out", overwrite=True)
        assert os.listdir(tmp_path) == ["out"]
        assert files_of(tmp_path / "out") == before and files_of(synthetic()) == source

    def test_an_interrupted_run_leaves_nothing(self, synthetic, tmp_path, monkeypatch):
        _fail_at(monkeypatch, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            to_hf(synthetic(), tmp_path / "out")
        assert os.listdir(tmp_path) == []


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


def test_progress_counts_every_byte(synthetic, tmp_path):
    told = []
    to_hf(synthetic(), tmp_path / "out", progress=lambda *now: told.append(now))
    total = sum(info.nbytes for info in open_checkpoint(synthetic()).values())
    assert told[-1] == (total, total) and [done for done, _ in told] == sorted(done for done, _ in told)
