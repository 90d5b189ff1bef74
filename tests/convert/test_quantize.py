"""`convert quantize`: what transformers reads of it, how far it is off, what it takes, and what it refuses."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from helpers_compressed import assert_equal, is_linear, weights_of
from helpers_convert import files_of, read_all
from helpers_transformers import import_transformers

from convert import quantize as module
from convert.commands import main
from convert.inspect import inspect
from convert.quantize import quantize
from convert.synth import load_config
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from convert.verify import verify
from glm4v_jax.checkpoints import safetensors
from glm4v_jax.checkpoints.load import INT4_QUALITY, load_model
from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.config.quantization import StoredQuantization, stored_quantization
from glm4v_jax.errors import CheckpointError, ConfigError

TINY = load_config("tiny")
WAYS = {"int8": {}, "int4": dict(to="int4", group=32, layers="all")}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, synthetic):
    """Scheme -> directory of the tiny model in it."""
    directory = tmp_path_factory.mktemp("quantized")
    for name, options in WAYS.items():
        quantize(synthetic(), directory / name, **options)
    return lambda name: directory / name


@pytest.mark.slow
@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", WAYS)
def test_transformers_reads_the_same_weights(quantized, name, dtype):
    transformers = import_transformers()
    compressors = pytest.importorskip("compressed_tensors.compressors")  # which imports transformers
    theirs, info = transformers.Glm4vForConditionalGeneration.from_pretrained(
        quantized(name), dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    layers = [layer for layer in theirs.modules() if getattr(layer, "quantization_scheme", None) is not None]
    count = 4 * 6 if name == "int8" else 4 * 6 + 3 * 5 + 4 + 1
    assert len(layers) == count
    for layer in layers:
        compressors.decompress_module(layer)
    expected = {
        name: tensor.float().numpy()
        for name, tensor in theirs.state_dict().items()
        if not name.endswith(("weight_scale", "weight_shape"))
    }
    ours = load_model(quantized(name), TINY, dtype=dtype, stacked=False)
    assert_equal(weights_of(ours, dtype), expected)


@pytest.mark.usefixtures("mesh")
def test_the_index_counts_parameters_and_not_words(synthetic, tmp_path):
    expected = sum(tensor.size for tensor in read_all(synthetic()).values())
    quantize(synthetic(), tmp_path / "int4", **WAYS["int4"], max_shard_size="100KB")
    to_orbax(tmp_path / "int4", tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="100KB")
    for name in ("int4", "back"):
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_parameters"] == expected


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7)])
@pytest.mark.usefixtures("mesh")
def test_weights_are_off_by_half_a_scale_and_all_else_is_copied(quantized, synthetic, name, largest):
    before = read_all(synthetic())
    after = weights_of(load_model(quantized(name), TINY, dtype="float32", stacked=False), "float32")
    scheme, changed = stored_quantization(quantized(name)), 0
    for key, tensor in before.items():
        found, tensor = after[key], tensor.astype(np.float32)
        if not is_linear(TINY, key) or (name == "int8" and ".layers." not in key):
            np.testing.assert_array_equal(found, tensor, key)
            continue
        groups = np.abs(tensor).reshape(len(tensor), -1, scheme.group or tensor.shape[1])
        scale = np.repeat(groups.max(-1) / largest, groups.shape[-1], axis=1)
        assert (np.abs(found - tensor) <= scale * (0.5 + largest * 2**-9)).all()  # the scale is rounded to bfloat16
        changed += not np.array_equal(found, tensor)
    assert changed == (24 if name == "int8" else 44)
    others = {file: content for file, content in files_of(synthetic()).items() if "model" not in file}
    config = json.loads(others.pop("config.json")) | {
        "quantization_config": scheme.to_dict(["re:.*visual.*", "lm_head"] if name == "int8" else [])
    }
    found = files_of(quantized(name))
    assert json.loads(found["config.json"]) == config
    assert others.items() <= found.items()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scales_have_the_dtype_of_the_weights_however_small_these_are(synthetic, tmp_path, dtype):
    key = "model.language_model.layers.0.mlp.down_proj.weight"
    tensors = read_all(synthetic(dtype, 1))
    tensors[key][0], tensors[key][1], tensors[key][2] = 0, 1e-7, 1
    source = tmp_path / "source"
    source.mkdir()
    TINY.save_pretrained(source)
    write_safetensors(source / "model.safetensors", tensors)
    quantize(source, tmp_path / "out")
    found = read_all(tmp_path / "out")
    scale = found[key + "_scale"]
    assert scale.dtype == dtype and scale[0, 0] == 1 and np.isfinite(1 / scale.astype(np.float64)).all()
    packed = found[key + "_packed"].view(np.uint8) ^ 0x80
    assert not packed[0].any() and (packed[2] == 127).all()


def test_an_orbax_source_gives_the_same_files(quantized, synthetic, tmp_path):
    to_orbax(synthetic(), tmp_path / "orbax")
    quantize(tmp_path / "orbax", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(quantized("int8"))


def test_memory_holds_a_few_chunks(synthetic, tmp_path, monkeypatch):
    for place in (module, safetensors):
        monkeypatch.setattr(place, "CHUNK_BYTES", 1 << 14)
    largest = max(tensor.nbytes for tensor in read_all(synthetic("float32", 1)).values())
    quantize(synthetic("float32", 1), tmp_path / "first")  # what is imported and cached for good
    tracemalloc.start()
    quantize(synthetic("float32", 1), tmp_path / "out", to="int4", group=32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < largest and largest > 200_000


def test_the_command_warns_of_int4_and_lists_what_it_wrote(synthetic, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", str(synthetic()), str(out), "--to", "int4", "--group", "32", "--dry-run"]) == 0
    assert not out.exists() and "nothing written; would have 137 tensors" in capsys.readouterr().out
    assert (
        main(["quantize", str(synthetic()), str(out), "--to", "int4", "--group", "32", "--max-shard-size", "1MB"]) == 0
    )
    assert INT4_QUALITY in capsys.readouterr().out
    assert len(list(out.glob("*.safetensors"))) > 1
    assert stored_quantization(out) == StoredQuantization(4, 32)
    found = inspect(out)
    assert found.parameters == inspect(synthetic()).parameters and found.nbytes < inspect(synthetic()).nbytes / 1.4
    assert not verify(out, out).different()
    rest = inspect(out, quantize="int4").device_bytes
    assert found.device_bytes > rest > inspect(synthetic(), quantize="int4").device_bytes * 0.9
    with pytest.raises(ConfigError, match=r"quantize: found 'int8' for a checkpoint that is quantised \(4 bits"):
        inspect(out, quantize="int8")
    (scale,) = (
        group
        for group in found.groups
        if group.name.endswith("mlp.down_proj.weight_scale") and "visual" not in group.name
    )
    assert scale.leaf.endswith("mlp.down.kernel_scale") and scale.count == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(to="int4"), "--group: found 64; expected a divisor of the 96 inputs of model.visual"),
        (dict(to="int4", group=0), "--group: found 0; expected an integer of at least 1"),
        (dict(group=64), "--group: found 64; expected it with --to int4"),
    ],
)
def test_options_that_do_not_fit_are_refused(synthetic, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        quantize(synthetic(), tmp_path / "out", layers="all", **options)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_refused(synthetic, tmp_path):
    tensors, key = read_all(synthetic()), "model.language_model.layers.1.mlp.down_proj.weight"
    tensors[key] = tensors[key].copy()
    tensors[key][3, 5] = ml_dtypes.bfloat16(np.nan)
    source = tmp_path / "source"
    source.mkdir()
    TINY.save_pretrained(source)
    write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=rf"{key}: found numbers that are not finite; expected finite ones"):
        quantize(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_quantised_source_is_refused(quantized, tmp_path):
    with pytest.raises(ConfigError, match=r"found weights that are quantised already \(8 bits, .*\); expected floats"):
        quantize(quantized("int8"), tmp_path / "out")
