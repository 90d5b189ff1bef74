"""Results of jobs: written, verified by their logits, and equal for transformers and PEFT."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_lora import batch_of, logits_of, trained
from helpers_transformers import import_transformers
from reference import assert_close, load_theirs, their_inputs

from glm4v_jax import Glm4vConfig
from glm4v_jax.checkpoints import merge_adapter
from glm4v_jax.checkpoints.adapter import load_adapter, save_adapter
from glm4v_jax.checkpoints.adapter_files import read_adapter
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.checkpoints.merge_adapter import merged_tensors, write_merged
from glm4v_jax.checkpoints.safetensors import SafetensorsFile, open_checkpoint
from glm4v_jax.console.program import run_program
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.files import asset_files, read_json_object
from glm4v_jax.model import lora, quantize
from train import export, verify_export
from train.export_command import Export

pytestmark = pytest.mark.usefixtures("mesh")

PROMPT = [[4, ("image", (4, 6)), 3], [9]]


@pytest.fixture(scope="module")
def config():
    return Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT)


@pytest.fixture(scope="module")
def base(config):
    """The packaged model, whose weights are bfloat16, as float32 computes with it."""
    return load_model(RANDOM_CHECKPOINT, config, dtype="float32")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A trained adapter of it."""
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(trained(base, lora.LoraConfig(rank=2)), directory, str(RANDOM_CHECKPOINT))
    return directory


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    """Merged as float32, which rounds nothing, and the verification."""
    directory = tmp_path_factory.mktemp("results") / "merged"
    return directory, export.export_merged(RANDOM_CHECKPOINT, adapter, directory, written="float32")


@pytest.mark.slow
def test_a_merged_adapter_is_verified(merged, config):
    directory, verified = merged
    assert verified.difference <= verified.tolerance < 1.5e-5 < 0.05 < verified.effect
    assert verified.tolerance == pytest.approx(1e-5 * 2**0.5, rel=1e-3)
    found = {path.name for path in directory.iterdir()}
    assert found >= {path.name for path in RANDOM_CHECKPOINT.iterdir() if not path.name.startswith("model")}
    assert not [path for path in directory.parent.iterdir() if path != directory]
    assert Glm4vConfig.from_pretrained(directory) == config
    assert read_json_object(directory / "config.json")["text_config"]["dtype"] == "float32"
    assert {info.dtype.name for info in open_checkpoint(directory).values()} == {"float32"}


def test_merged_weights_are_sums_rounded_once(adapter, config, merged):
    before, pairs = open_checkpoint(RANDOM_CHECKPOINT), merged_tensors(RANDOM_CHECKPOINT, adapter)
    assert list(pairs) == list(before)
    file = SafetensorsFile(adapter / "adapter_model.safetensors")
    changed = 0
    for name, tensor in pairs.items():
        weight, key = before.read(name), f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = np.asarray(weight, np.float64)
        if f"{key}A.weight" in file:
            a, b = (np.asarray(file.read(f"{key}{side}.weight"), np.float64) for side in "AB")
            expected = expected + 8.0 * b @ a
            changed += 1
        assert tensor.dtype == weight.dtype == jnp.bfloat16
        assert np.mean(np.asarray(tensor) == expected.astype(jnp.bfloat16)) > 0.999
        assert_close(open_checkpoint(merged[0]).read(name), expected, tolerance=5e-7)
    assert changed == 6 * config.text_config.num_hidden_layers
    assert len(file) == 2 * changed


def test_a_bfloat16_export_differs_by_its_rounding(adapter, tmp_path):
    verified = export.export_merged(RANDOM_CHECKPOINT, adapter, tmp_path / "out")
    assert 1e-4 < verified.difference <= verified.tolerance
    assert verified.tolerance == pytest.approx(2 * 2**-8 * 8**0.5, rel=1e-3)
    assert verified.effect > 2 * verified.tolerance
    assert {info.dtype.name for info in open_checkpoint(tmp_path / "out").values()} == {"bfloat16"}


def test_a_wrong_result_is_removed(adapter, tmp_path, monkeypatch):
    """Here the adapter is added with twice its weight, not at all, and as NaN."""
    for scale in (2.0, 0.0, float("nan")):

        def wrong(*args, scale=scale):
            found = read_adapter(*args)
            pairs = {name: pair._replace(scale=scale * pair.scale) for name, pair in found.pairs.items()}
            return found._replace(pairs=pairs)

        monkeypatch.setattr(merge_adapter, "read_adapter", wrong)
        with pytest.raises(CheckpointError, match=r"out: found logits that differ from the trained model's by"):
            export.export_merged(RANDOM_CHECKPOINT, adapter, tmp_path / "out")
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_exported_adapter_is_verified(base, tmp_path, monkeypatch):
    """That of a quantised base too, which is compared on that base."""
    model = trained(quantize.quantize_model(base, quantize.QuantConfig("int4")), lora.LoraConfig(rank=2))
    verified = export.export_adapter(model, RANDOM_CHECKPOINT, tmp_path / "adapter")
    assert verified.difference <= 1e-6 and verified.effect > 0.05
    again = load_adapter(lora.drop_lora(model), tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, again, model)
    monkeypatch.setattr(export, "load_adapter", lambda model, directory: model)
    with pytest.raises(CheckpointError, match="adapter: found logits that differ"):
        export.export_adapter(model, RANDOM_CHECKPOINT, tmp_path / "adapter")
    assert jax.tree.structure(load_adapter(lora.drop_lora(model), tmp_path / "adapter"))  # the first is still there


@pytest.mark.slow
def test_an_exported_model_is_verified(base, tmp_path, monkeypatch):
    """A whole model, as bfloat16 of what was trained in float32; not one that comes back with other weights."""
    exported = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora.merge_lora(trained(base, lora.LoraConfig(rank=2))))
    verified = export.export_model(exported, jnp.float32, RANDOM_CHECKPOINT, tmp_path / "model")
    assert verified.difference <= 1e-6 and verified.tolerance < 2e-5 and verified.effect is None
    again = load_model(tmp_path / "model", base.config, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again, exported)
    monkeypatch.setattr(export, "load_model", lambda *args, **kwargs: base)
    with pytest.raises(CheckpointError, match="model: found logits that differ"):
        export.export_model(exported, jnp.float32, RANDOM_CHECKPOINT, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_exported_model_has_all_fields_and_files_of_its_base(base, tmp_path):
    """Those that this package does not read too: by `dtype`, and without it by a guess, servers choose theirs."""
    source = tmp_path / "base"
    shutil.copytree(RANDOM_CHECKPOINT, source)
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        before = read_json_object(source / name)
        (source / name).write_text(json.dumps(before | {"dtype": "bfloat16", "of_tomorrow": {"a": [1, None]}}))
    exported = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    export.export_model(exported, jnp.float32, source, tmp_path / "model")
    assert len(asset_files(source)) > 6
    for name in asset_files(source):
        assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes(), name


def test_transformers_and_peft_compute_the_same(checkpoints, ours, tmp_path):
    """A merged export of a model that transformers and PEFT both load, from safetensors and from Orbax."""
    import_transformers()
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    directory = checkpoints("base")
    model = trained(ours("base").module)
    save_adapter(model, tmp_path / "adapter")
    ours("base").save_orbax(tmp_path / "orbax")
    for name, base in (("safetensors", directory), ("orbax", tmp_path / "orbax")):
        result = tmp_path / f"from-{name}"
        result.mkdir()
        write_merged(base, merged_tensors(base, tmp_path / "adapter"), result, max_shard_size="100KB")
        assert len(list(result.glob("*.safetensors"))) > 2
    batch, prompts = batch_of(model.config, PROMPT)
    wrapped = theirs.PeftModel.from_pretrained(load_theirs(directory), tmp_path / "adapter").eval()
    adapted, merged = wrapped.base_model.model, load_theirs(tmp_path / "from-safetensors")
    with torch.no_grad():
        expected, found = (m(**their_inputs(m, prompts)).logits.numpy() for m in (adapted, merged))
    assert_close(found, expected, prompts.real)
    assert_close(np.asarray(logits_of(model, batch))[:2, : expected.shape[1]], expected, prompts.real)
    one, other = (open_checkpoint(tmp_path / f"from-{name}") for name in ("safetensors", "orbax"))
    assert set(one) == set(other) and all(np.array_equal(one.read(name), other.read(name)) for name in one)


def main(arguments):
    return run_program({"export": Export}, arguments, name="train", prog="train", description="")


@pytest.fixture
def job(adapter, tmp_path):
    """The file of a job with lora in a directory of its own, without its adapter."""
    path = tmp_path / "job.toml"
    path.write_text(
        f'model = "{RANDOM_CHECKPOINT}"\nout = "."\nsteps = 1\nlora = {{ rank = 2 }}\n[data]\nfiles = ["x.jsonl"]\n'
    )
    return path


def test_the_command_verifies_and_does_not_overwrite(adapter, tmp_path, capsys):
    assert main(["export", str(adapter), "--out", str(tmp_path / "out"), "--dtype", "float32", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["out"] == str(tmp_path / "out") and printed["difference"] <= printed["tolerance"] < printed["effect"]
    assert main(["export", str(adapter), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train: error: {tmp_path / 'out'}: ") and "--overwrite" in error


def test_a_job_without_its_adapter_is_refused(job, capsys):
    assert main(["export", str(job), "--no-verify"]) == 1
    assert "found no adapter_config.json; expected a trained adapter" in capsys.readouterr().err


def test_a_job_exports_its_adapter(adapter, job, capsys):
    shutil.copytree(adapter, job.parent / "adapter")
    config = job.parent / "adapter" / "adapter_config.json"
    for named, is_noted in ((str(RANDOM_CHECKPOINT), False), ("org/other", True)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
        assert main(["export", str(job), "--no-verify", "--overwrite"]) == 0
        out, error = capsys.readouterr()
        assert out == f"{job.parent / 'model'}: not verified\n"
        assert (f"{named} as its base model; expected {RANDOM_CHECKPOINT}" in error) == is_noted
    files, expected = open_checkpoint(job.parent / "model"), merged_tensors(RANDOM_CHECKPOINT, adapter)
    assert all(np.array_equal(files.read(name), np.asarray(tensor)) for name, tensor in expected.items())


def paths(source, **options):
    return Export(source=str(source), **options)._paths()


def test_a_job_without_lora_has_no_adapter_to_export(tmp_path):
    (tmp_path / "full.toml").write_text('model = "m"\nout = "o"\nsteps = 1\n[data]\nfiles = ["x.jsonl"]\n')
    with pytest.raises(ConfigError, match=r"full\.toml: found a job without lora, whose result is not an adapter"):
        paths(tmp_path / "full.toml")


def test_an_adapter_needs_an_output_directory_of_its_own(adapter):
    with pytest.raises(ConfigError, match="--out: found nothing; expected the output directory"):
        paths(adapter)
    with pytest.raises(ConfigError, match="--out: found the adapter's own directory"):
        paths(adapter, out=str(adapter))
    with pytest.raises(CheckpointError, match=r"out: found"):
        export.export_merged(RANDOM_CHECKPOINT, adapter, RANDOM_CHECKPOINT / "out")


def test_an_adapter_of_another_model_is_refused(adapter, checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="tensors do not fit"):
        export.export_merged(checkpoints("wide"), adapter, tmp_path / "out")


def test_an_adapter_that_names_no_directory_needs_a_model(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "nameless")
    options = read_json_object(tmp_path / "nameless" / "adapter_config.json")
    (tmp_path / "nameless" / "adapter_config.json").write_text(json.dumps(options | {"base_model_name_or_path": "x"}))
    with pytest.raises(CheckpointError, match=r"--model: found nothing, and 'x' as the base of .*; expected"):
        paths(tmp_path / "nameless", out="out")


def test_a_log_line_has_difference_tolerance_and_effect():
    line = "relative difference of the logits 1e-06 (rounding: up to 1e-05)"
    assert str(verify_export.Verified(1e-6, 1e-5)) == line
    assert str(verify_export.Verified(1e-6, 1e-5, 0.2)) == f"{line}; training changed them by 0.2"
    assert str(verify_export.Verified(1e-3, 1e-2, 0.015)).endswith("0.015, which rounding alone could explain")
