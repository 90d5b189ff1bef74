"""Leaves are in memory once; those that are quantised as they are read are what a device makes of them."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from reference import CONFIGS, random_tensors

from glm4v_jax import Glm4vConfig
from glm4v_jax.checkpoints import arrays, leaves, load, strided_copy
from glm4v_jax.checkpoints.arrays import array_of
from glm4v_jax.checkpoints.safetensors import TensorInfo, write_safetensors
from glm4v_jax.model.quantize import QuantConfig


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("huge", [1, 1 << 20])
def test_jax_takes_over_the_memory_that_was_read_into(monkeypatch, huge):
    def fill(out, path, index):
        out[...] = np.arange(15).reshape(3, 5)

    of_numbers = SimpleNamespace(infos={"x": TensorInfo((3, 5), np.dtype(np.int8))}, fill=fill)
    monkeypatch.setattr(arrays, "_HUGE_BYTES", huge)
    made, aligned = [], arrays._aligned
    monkeypatch.setattr(arrays, "_aligned", lambda *of: made.append(aligned(*of)) or made[-1])
    array = array_of(of_numbers, "x", PartitionSpec(), np.dtype(np.float32))
    np.testing.assert_array_equal(array, np.arange(15.0).reshape(3, 5))
    assert array.dtype == np.float32 and array.unsafe_buffer_pointer() == made[0].ctypes.data


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_leaves_quantised_on_the_host_are_those_of_the_device(tmp_path, monkeypatch, dtype):
    """All of a model's, fused, embedding and convolutions included, from several pieces each."""
    config, everything = Glm4vConfig.from_dict(CONFIGS["base"]), QuantConfig("int8", rest=True)
    tensors = {name: tensor.astype(np.dtype(dtype)) for name, tensor in random_tensors(config).items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    monkeypatch.setattr(leaves, "_PIECE_BYTES", 3000)
    monkeypatch.setattr(strided_copy, "_SMALL_BYTES", 0)
    made = []
    monkeypatch.setattr(load, "int8_of", lambda *of: made.append(of) or arrays.int8_of(*of))
    ours = load.load_model(tmp_path, config, stacked=False, quantize=everything)
    assert len(made) > 10
    monkeypatch.setattr(load, "TensorLeaves", SimpleNamespace)  # which no leaves are
    count = len(made)
    theirs = load.load_model(tmp_path, config, stacked=False, quantize=everything)
    assert len(made) == count
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (own.dtype, own.sharding) == (other.dtype, other.sharding)
        np.testing.assert_array_equal(own, other)
