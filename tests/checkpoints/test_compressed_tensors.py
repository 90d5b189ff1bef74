"""Checkpoints that compressed-tensors made are read bit for bit; wrong ones are refused by tensor and field."""

import json
import re
import shutil
from types import MappingProxyType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers_compressed import assert_equal, import_compressed_tensors, read_theirs, weights_of, write_theirs
from helpers_convert import read_all
from helpers_lora import batch_of, leaves_of, logits_of, trained
from helpers_mesh import ROWS
from reference import CONFIGS, assert_close, random_tensors

from convert.quantize import quantize
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax.checkpoints import plan
from glm4v_jax.checkpoints.adapter import save_adapter
from glm4v_jax.checkpoints.compressed_tensors import QuantizedWeight, pack, unpack
from glm4v_jax.checkpoints.leaves import TensorLeaves
from glm4v_jax.checkpoints.load import load_model, load_runtime
from glm4v_jax.checkpoints.merge_adapter import merged_tensors
from glm4v_jax.checkpoints.safetensors import open_checkpoint, write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import StoredQuantization
from glm4v_jax.devices.memory import Memory
from glm4v_jax.errors import CheckpointError, ConfigError, MemoryShortageError
from glm4v_jax.files import assets_directory
from glm4v_jax.model.cpu_matmul import pack_int4
from glm4v_jax.model.lora import LoraConfig
from glm4v_jax.model.quantize import QuantConfig, for_inference, is_scale, scale_path

pytestmark = pytest.mark.usefixtures("mesh")

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
K_PROJ = "model.language_model.layers.0.self_attn.k_proj"

SCHEMES = {
    "int8": dict(num_bits=8, strategy="channel"),
    "int8 in groups": dict(num_bits=8, strategy="group", group_size=16),
    # Heads of o_proj have 16 inputs: a group is two of them.
    "int4": dict(num_bits=4, strategy="group", group_size=32),
    "int4, a scale for each channel": dict(num_bits=4, strategy="channel"),
    "int4 with zero points": dict(num_bits=4, strategy="group", group_size=16, symmetric=False),
    "int8, not packed": dict(num_bits=8, strategy="channel", format="int-quantized"),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_they_wrote_is_read_bit_for_bit(tmp_path, scheme):
    layers = write_theirs(tmp_path, CONFIG, random_tensors(CONFIG), **SCHEMES[scheme])
    model = load_model(tmp_path, CONFIG, dtype="float32", stacked=False)
    quantized = [path for path in leaves_of(model) if is_scale(path)]
    assert len(quantized) == 2 * 6 + 2 * 4 + 3  # the merger's is fused as the ViT's are
    if scheme == "int4":
        stacked = load_model(tmp_path, CONFIG, dtype="float32", stacked=True).unstacked()
        jax.tree.map(np.testing.assert_array_equal, stacked, model)
    for dtype in ("bfloat16", "float32"):
        theirs = read_theirs(
            tmp_path / "model.safetensors", layers, dtype, SCHEMES[scheme].get("format", "pack-quantized")
        )
        assert_equal(weights_of(jax.tree.map(lambda x: x, model), dtype), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8 in groups", "int4 with zero points"])
def test_groups_of_int8_compute_what_their_floats_do(tmp_path, scheme):
    """Which no rounding here makes."""
    write_theirs(tmp_path, CONFIG, random_tensors(CONFIG), **SCHEMES[scheme])
    model = load_model(tmp_path, CONFIG, dtype="float32", stacked=False)
    weights_of(floats := jax.tree.map(lambda x: x, model), "float32")
    batch, _ = batch_of(CONFIG, ROWS)
    assert_close(logits_of(model, batch), logits_of(floats, batch), np.asarray(batch.segment_ids) > 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_packed_as_they_pack_them(bits):
    import_compressed_tensors()
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << (bits - 1)
    for count in (1, 7, 8, 64, 67):
        values = np.random.RandomState(count).randint(-half, half, (5, count)).astype(np.int8)
        packed = pack(values, bits)
        assert np.array_equal(packed, pack_to_int32(torch.tensor(values), bits).numpy())
        assert np.array_equal(unpack(packed, bits, count), values)


@pytest.mark.parametrize("scheme", ["int8", "int4 with zero points"])
def test_a_slice_of_a_leaf_is_that_of_the_whole(tmp_path, scheme):
    """Which is what a device of a mesh reads."""
    write_theirs(tmp_path, CONFIG, random_tensors(CONFIG), **SCHEMES[scheme])
    leaves = TensorLeaves(open_checkpoint(tmp_path), CONFIG)
    for path in ("language_model.layers.0.mlp.gate_up.kernel", "visual.blocks.1.mlp.gate_up.kernel"):
        for leaf in (path, scale_path(path)):
            shape = leaves.infos[leaf].shape
            whole = filled(leaves, leaf, shape, (slice(None),) * len(shape))
            for part in (slice(1, None), slice(0, 1)):
                index = (part,) * len(shape)
                assert np.array_equal(filled(leaves, leaf, whole[index].shape, index), whole[index])


def test_pairs_of_the_file_are_those_of_the_integers(tmp_path):
    write_theirs(tmp_path, CONFIG, random_tensors(CONFIG), **SCHEMES["int4"])
    leaves = TensorLeaves(open_checkpoint(tmp_path), CONFIG)
    layer = "language_model.layers.1"
    for path, axis in ((f"{layer}.mlp.gate_up.kernel", 0), (f"{layer}.self_attn.o_proj.kernel", 2)):
        shape = leaves.infos[path].shape
        assert leaves.has_pairs(path)
        whole = np.asarray(pack_int4(jnp.asarray(filled(leaves, path, shape, (slice(None),) * len(shape))), axis))
        for part in (slice(None), slice(1, None), slice(0, 1)):
            index = (part,) * len(shape)
            assert np.array_equal(filled(leaves, path, whole[index].shape, index, np.uint8), whole[index])


def filled(leaves, path, shape, index, dtype=None):
    """A slice of a leaf."""
    out = np.zeros(shape, dtype or leaves.infos[path].dtype)
    leaves.fill(out, path, index)
    return out


@pytest.fixture(scope="module")
def int8(tmp_path_factory, checkpoints):
    directory = tmp_path_factory.mktemp("int8") / "checkpoint"
    quantize(checkpoints("base"), directory)
    return directory


def replaced(int8, tmp_path, tensors=None, **fields):
    """A copy with other tensors, None for no tensor, and other fields in the configuration of weights."""
    directory = shutil.copytree(int8, tmp_path / "copy", dirs_exist_ok=True)
    changed = {name: array for name, array in (read_all(int8) | (tensors or {})).items() if array is not None}
    write_safetensors(directory / "model.safetensors", changed)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= fields
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def with_config(directory, weights=MappingProxyType({}), **fields):
    """Change the scheme of a checkpoint: fields of its weights and of the whole; None for no scheme."""
    path = assets_directory(directory) / "config.json"
    config = json.loads(path.read_text())
    if weights is None:
        del config["quantization_config"]
    else:
        config["quantization_config"] |= fields
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("end", "value", "message"),
    [
        ("weight_scale", None, r"k_proj.weight_scale: found nothing; expected \[32, 1\]"),
        ("weight_scale", np.ones((32, 2), np.float32), r"weight_scale: found shape \[32, 2\].*; expected \[32, 1\]"),
        ("weight_scale", np.ones((32, 1), np.int32), "weight_scale: found int32.*; expected one of float32, bfloat16"),
        ("weight_scale", np.full((32, 1), np.nan, np.float32), "k_proj.kernel: found numbers that are not finite"),
        (
            "weight_packed",
            np.zeros((32, 15), np.int32),
            r"weight_packed: found shape \[32, 15\].*; expected \[32, 16\]",
        ),
        ("weight_packed", np.zeros((32, 16), np.float32), "weight_packed: found float32 in .*; expected one of int32"),
        ("weight_shape", np.array([64, 32]), r"k_proj.weight_shape: found \[64, 32\]; expected \[32, 64\]"),
        ("weight_g_idx", np.zeros(64, np.int32), r"k_proj.weight_g_idx: found \[64\].*; expected no such tensor"),
        ("weight_zero_point", np.zeros((8, 1), np.int32), r"weight_zero_point: found .*; expected no such tensor"),
        ("weight", np.zeros((32, 64), np.float32), r"k_proj.weight: found \[32, 64\].*; expected no such tensor"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(int8, tmp_path, end, value, message):
    directory = replaced(int8, tmp_path, {f"{K_PROJ}.{end}": value})
    with pytest.raises(CheckpointError, match=message):
        load_model(directory, CONFIG)


def refused(directory):
    with pytest.raises(CheckpointError) as raised:
        load_model(directory, CONFIG)
    return str(raised.value).removeprefix(f"{directory}: ")


def test_a_scheme_that_is_not_that_of_the_tensors_is_named_by_its_field(int8, tmp_path):
    assert re.match(
        r"quantization_config: num_bits: found 4; expected 8, the scheme of language_model\..*_proj\.weight$",
        refused(replaced(int8, tmp_path, num_bits=4)),
    )
    assert refused(replaced(int8, tmp_path, strategy="group", group_size=16)).startswith(
        "quantization_config: group_size: found 16; expected null, the scheme of "
    )
    assert re.match(
        r"quantization_config: num_bits: found 4; expected 8, the scheme of language_model\.[^;]*; "
        r"symmetric: found False; expected true, the scheme of ",
        refused(replaced(int8, tmp_path, num_bits=4, symmetric=False)),
    )
    assert refused(with_config(replaced(int8, tmp_path), format="int-quantized")).startswith(
        "quantization_config: format: found 'int-quantized'; expected \"pack-quantized\", the scheme of "
    )
    assert refused(with_config(replaced(int8, tmp_path), None)).startswith(
        "quantization_config: found nothing; expected the scheme of "
    )


def test_layers_that_are_missing_are_one_fault_of_quantised_checkpoints_too(int8):
    fields = CONFIG.to_dict()
    fields["text_config"]["num_hidden_layers"] += 1
    with pytest.raises(CheckpointError, match=r"num_hidden_layers: found 3; expected 2: the tensors are of 2 layers$"):
        load_model(int8, Glm4vConfig.from_dict(fields))


def test_a_scheme_is_compared_with_the_leaves_of_orbax_too(int8, tmp_path):
    to_orbax(int8, orbax := tmp_path / "orbax")
    assert refused(with_config(orbax, {"num_bits": 4})).startswith(
        "quantization_config: found 4 bits, a scale for each channel, of which language_model."
    )
    assert refused(with_config(orbax, {"num_bits": 8, "strategy": "group", "group_size": 16})).startswith(
        "quantization_config: found 8 bits, groups of 16, of which language_model."
    )
    assert refused(with_config(orbax, None)).startswith("quantization_config: found nothing; expected the scheme of ")


def test_ignored_layers_are_in_floats_and_exist(int8, tmp_path):
    with pytest.raises(CheckpointError, match=r"ignore: found 're:.*k_proj'; expected language_model\.layers\.0\.self"):
        load_model(with_config(replaced(int8, tmp_path), ignore=["lm_head", r"re:model\.lang.*k_proj"]), CONFIG)
    with pytest.warns(UserWarning, match="ignore: found 're:vision_tower', which matches no layer") as warned:
        given = ["re:.*visual", "model.visual.merger.proj", "Conv3d", "re:vision_tower"]
        load_model(with_config(replaced(int8, tmp_path), ignore=given), CONFIG)
    assert len(warned) == 1


def test_scales_may_be_in_the_other_half_precision(int8, tmp_path):
    scale, norm, tensors = f"{K_PROJ}.weight_scale", "model.language_model.norm.weight", read_all(int8)
    halves = {scale: tensors[scale].astype(np.float16), norm: tensors[norm].astype(ml_dtypes.bfloat16)}
    load_model(replaced(int8, tmp_path, halves), CONFIG)


def test_a_layer_in_floats_beside_quantised_ones_is_refused(int8, tmp_path):
    ends = ("weight_packed", "weight_scale", "weight_shape")
    tensors = dict.fromkeys(f"{K_PROJ}.{end}" for end in ends)
    directory = replaced(int8, tmp_path, tensors | {f"{K_PROJ}.weight": np.zeros((32, 64), np.float32)})
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight_.*: found it beside .*0.*in floats"
    ):
        load_model(directory, CONFIG)


def test_a_group_that_does_not_divide_is_refused(int8, tmp_path):
    directory = replaced(int8, tmp_path, strategy="group", group_size=48)
    with pytest.raises(ConfigError, match=r"group_size: found 48; expected a divisor of the 64 inputs of lang.*_proj"):
        load_model(directory, CONFIG)


def test_weights_and_configuration_must_agree(int8, checkpoints, tmp_path):
    floats = shutil.copytree(checkpoints("base"), tmp_path / "floats")
    shutil.copyfile(int8 / "config.json", floats / "config.json")
    with pytest.raises(CheckpointError, match=r"quantization_config: found 8 bits, .*, but no quantised weight"):
        load_model(floats, CONFIG)
    integers = shutil.copytree(int8, tmp_path / "integers")
    shutil.copyfile(checkpoints("base") / "config.json", integers / "config.json")
    with pytest.raises(CheckpointError, match=r"quantization_config: found nothing; expected the scheme of .*_scale"):
        load_model(integers, CONFIG)


def test_only_its_own_scheme_is_accepted_for_the_rest(int8):
    with pytest.raises(
        ConfigError, match=r"quantize: found 'int4' for a checkpoint that is quantised \(8 bits, .*'int8'"
    ):
        load_model(int8, CONFIG, quantize=QuantConfig("int4"))
    own, rest = (
        leaves_of(load_model(int8, CONFIG, dtype="float32", quantize=way)) for way in (None, for_inference("int8"))
    )
    assert own["lm_head.kernel"].dtype == np.float32 and rest["lm_head.kernel"].dtype == np.int8
    path = "language_model.layers.stacked.mlp.down.kernel"
    assert own[path].dtype == np.int8
    for leaf in (path, scale_path(path)):
        np.testing.assert_array_equal(rest[leaf], own[leaf])


def test_too_little_memory_is_refused_with_what_fits(int8, monkeypatch):
    monkeypatch.setattr(plan, "memory_of", lambda devices: [Memory("host memory", 250_000)])
    with pytest.raises(
        MemoryShortageError, match=r"needs .* for weights in int8 and float32.*what fits: --quantize int8 "
    ):
        load_model(int8, CONFIG, dtype="float32")


def test_an_adapter_stands_beside_it_and_is_not_merged_into_it(int8, tmp_path):
    model = load_model(int8, CONFIG)
    save_adapter(trained(model, LoraConfig(rank=2)), tmp_path)
    runtime = load_runtime(int8, adapter=tmp_path)
    assert runtime.config == CONFIG
    with pytest.raises(
        CheckpointError, match=r"found quantised weights \(8 bits, .*expected floats: merge the adapter in"
    ):
        merged_tensors(int8, tmp_path)


def test_it_goes_through_orbax_and_back(int8, tmp_path):
    to_orbax(int8, tmp_path / "orbax")
    models = [load_model(place, CONFIG, dtype="float32") for place in (int8, tmp_path / "orbax")]
    jax.tree.map(np.testing.assert_array_equal, *models)
    to_hf(tmp_path / "orbax", tmp_path / "back")
    for path in int8.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    for convert in (to_hf, to_orbax):
        with pytest.raises(ConfigError, match=r"--dtype: found float32 for .*, which is quantised"):
            convert(int8, tmp_path / "cast", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4", "int4 with zero points"])
def test_int4_goes_through_orbax_and_back_unless_zero_points_are_lost(tmp_path, scheme):
    (source := tmp_path / "theirs").mkdir()
    write_theirs(source, CONFIG, random_tensors(CONFIG), **SCHEMES[scheme])
    to_orbax(source, tmp_path / "orbax")
    models = [load_model(place, CONFIG, dtype="float32") for place in (source, tmp_path / "orbax")]
    jax.tree.map(np.testing.assert_array_equal, *models)
    if "zero" in scheme:
        with pytest.raises(CheckpointError, match="found integers less their zero points; expected the safetensors"):
            to_hf(tmp_path / "orbax", tmp_path / "back")
        return
    to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_equal(read_all(tmp_path / "back"), read_all(source))


def test_an_error_of_reading_ahead_names_its_tensor(tmp_path):
    (source := tmp_path / "theirs").mkdir()
    write_theirs(source, CONFIG, random_tensors(CONFIG), num_bits=4, strategy="channel", format="int-quantized")
    directory = replaced(source, tmp_path, {f"{K_PROJ}.weight": np.full((32, 64), 9, np.int8)})
    with pytest.raises(CheckpointError, match=r"k_proj\.weight: found integers from 9 to 9; expected -8 to 7, or num_"):
        load_model(directory, CONFIG)


def test_integers_of_more_than_4_bits_are_refused():
    class Files:
        def read(self, name):
            return np.array([[8, 0]], np.int8)

    weight = QuantizedWeight(Files(), "down_proj", (1, 2), StoredQuantization(bits=4, packed=False))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: found integers from 0 to 8; expected -8 to 7"):
        weight.values()
