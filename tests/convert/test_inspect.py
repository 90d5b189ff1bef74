"""What a checkpoint holds, from its headers alone."""

import dataclasses
import json

import jax
import pytest
from helpers_convert import write_hollow

from convert.inspect import inspect
from convert.synth import plan_like_released
from convert.to_orbax import to_orbax
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, open_checkpoint
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.planning.memory_table import describe
from glm4v_jax.planning.mesh_presets import parse_mesh


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The released model's headers, around 20 GB of holes."""
    directory = tmp_path_factory.mktemp("full")
    config = Glm4vConfig.glm4_1v_9b()
    write_hollow(directory, config, plan_like_released(config, 4))
    return directory


def test_the_figures_of_the_released_model(full):
    found = inspect(full)
    assert found.format == "safetensors"
    assert (found.tensors, found.parameters, found.nbytes) == (704, 10_292_777_472, 20_585_554_944)
    assert found.device_bytes == found.nbytes
    parts = {name: found.modules[name] for name in ("visual", "language_model", "lm_head")}
    assert parts == {"visual": 892_498_432, "language_model": 8_779_522_048, "lm_head": 620_756_992}
    assert found.modules["language_model.layers"] == 40 * 203_969_024
    assert found.modules["visual.blocks"] == 679_550_976 and found.modules["visual.merger"] == 185_081_856
    (gate_up,) = (group for group in found.groups if group.name.endswith("mlp.gate_up_proj.weight"))
    assert gate_up.name == "language_model.layers.{i}.mlp.gate_up_proj.weight" and gate_up.count == 40
    assert gate_up.shape == (2 * 13696, 4096) and gate_up.dtype == "bfloat16"
    assert gate_up.leaf == "language_model.layers.mlp.gate_up.kernel"


def test_shardings_and_bytes_per_device_follow_the_mesh(full):
    found = {group.name.removeprefix("language_model.layers.{i}."): group for group in
             inspect(full, parse_mesh("data=3, fsdp=4,kv=2,q=2")).groups}  # fmt: skip
    assert found["mlp.gate_up_proj.weight"].sharding == ("fsdp", "-", "kv+q+seq")
    assert found["mlp.gate_up_proj.weight"].device_bytes * 16 == found["mlp.gate_up_proj.weight"].nbytes
    assert set(found["self_attn.q_proj.weight"].sharding) >= {"fsdp", "kv", "q+seq"}
    assert found["self_attn.k_proj.weight"].device_bytes * 8 == found["self_attn.k_proj.weight"].nbytes
    assert found["input_layernorm.weight"].device_bytes == found["input_layernorm.weight"].nbytes
    assert found["visual.blocks.{i}.mlp.up_proj.weight"].leaf == "visual.blocks.mlp.gate_up.kernel[:, 1]"


def test_the_shardings_are_those_of_the_loaded_model(synthetic):
    """On one device, where a sharding is a name and splits nothing."""
    from glm4v_jax import Glm4vForConditionalGeneration
    from glm4v_jax.model.params import leaf_paths

    module = Glm4vForConditionalGeneration.from_pretrained(synthetic(), stacked=True).module
    leaves = dict(zip(leaf_paths(module), jax.tree.leaves(module), strict=True))
    names = {None: "-", "fsdp": "fsdp", "kv": "kv", ("q", "seq"): "q+seq", ("kv", "q", "seq"): "kv+q+seq"}
    for group in inspect(synthetic()).groups:
        path = group.leaf.split("[")[0]
        stacked = path.replace(".layers.", ".layers.stacked.").replace(".blocks.", ".blocks.stacked.")
        spec = tuple(leaves[stacked].sharding.spec)
        spec = (*spec, *(None,) * (leaves[stacked].ndim - len(spec)))[stacked != path :]
        assert tuple(names[axis] for axis in spec) == group.sharding, group.name


def test_both_formats_list_the_same_tensors(synthetic, tmp_path):
    to_orbax(synthetic(), tmp_path / "orbax")
    ours, theirs = inspect(synthetic()), inspect(tmp_path / "orbax")
    assert theirs.format == "orbax"
    assert dataclasses.replace(theirs, directory=ours.directory, format=ours.format) == ours
    assert ours.nbytes == sum(info.nbytes for info in open_checkpoint(synthetic()).values())
    assert json.loads(json.dumps(ours.to_dict()))["parameters"] == ours.parameters


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_bytes_per_device_can_be_those_of_quantised_weights(full, synthetic, scheme):
    found = inspect(full, quantize=scheme)
    assert found.nbytes == inspect(full).nbytes
    assert found.device_bytes == describe(Glm4vConfig.glm4_1v_9b(), {}, scheme=scheme).weight_bytes
    sizes = parse_mesh("fsdp=2,kv=2")
    split = inspect(synthetic(), sizes, scheme)
    assert split.device_bytes == describe(Glm4vConfig.from_pretrained(synthetic()), sizes, scheme=scheme).weight_bytes
    gates = [group for group in split.groups if group.leaf.startswith("visual.blocks.mlp.gate_up.kernel[")]
    assert len({group.device_bytes for group in gates}) == 1 and len(gates) == 2


def test_no_data_are_read(synthetic, monkeypatch):
    monkeypatch.setattr(CheckpointFiles, "read", lambda *_: pytest.fail("read a tensor"))
    assert inspect(synthetic()).tensors == len(open_checkpoint(synthetic()))


def test_a_truncated_file_is_found(full, tmp_path):
    config = Glm4vConfig.tiny()
    write_hollow(tmp_path, config, plan_like_released(config, 2))
    path = tmp_path / "model-00002-of-00002.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*as the header says"):
        inspect(tmp_path)


def test_a_mesh_that_does_not_divide_is_refused(full):
    with pytest.raises(ConfigError, match="kv_heads of 2 is not divisible by mesh axes kv of 4"):
        inspect(full, {"kv": 4})
