"""Casts round to nearest even, and refuse to make finite numbers infinite."""

import os

import ml_dtypes
import numpy as np
import pytest
from reference import CONFIGS, random_tensors

from convert.casts import cast_chunks
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
NAME = "model.language_model.layers.1.mlp.gate_up_proj.weight"


@pytest.fixture(params=[100, 1 << 20])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr("glm4v_jax.checkpoints.safetensors.CHUNK_BYTES", request.param)


@pytest.fixture
def source(tmp_path):
    """A function: write a bfloat16 checkpoint with these numbers in some places of a tensor."""

    def write(**places):
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in random_tensors(CONFIG).items()}
        for value, place in places.items():
            tensors[NAME][place] = float(value)
        directory = tmp_path / "source"
        directory.mkdir()
        CONFIG.save_pretrained(directory)
        write_safetensors(directory / "model.safetensors", tensors)
        return directory

    return write


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_chunks_are_numpys_cast(chunk_bytes, dtype):
    array = np.random.default_rng(0).standard_normal((30, 7, 11)).astype(np.float32).T
    chunks = list(cast_chunks(array, np.dtype(dtype), "w"))
    assert np.concatenate(chunks).tobytes() == np.ascontiguousarray(array).astype(dtype).tobytes()


@pytest.mark.parametrize("convert", [to_hf, to_orbax])
def test_infinities_and_nan_survive_a_cast(source, tmp_path, convert):
    convert(source(inf=(3, 0), nan=(3, 1)), tmp_path / "out", dtype="float16")
    found = open_weights(tmp_path / "out").read(NAME)
    assert np.isposinf(found[3, 0]) and np.isnan(found[3, 1]) and np.isfinite(found).sum() == found.size - 2


@pytest.mark.slow
@pytest.mark.parametrize("convert", [to_hf, to_orbax])
def test_a_cast_that_loses_numbers_is_refused(source, tmp_path, convert, chunk_bytes):
    """An infinity in the tensor is not counted."""
    directory = source(**{"1e6": (5, 7), "-1e6": (-1, 7), "inf": (3, 0)})
    with pytest.raises(CheckpointError, match=f"{NAME}: found 2 numbers too large for float16; expected none"):
        convert(directory, tmp_path / "out", dtype="float16")
    assert os.listdir(tmp_path) == ["source"]
    convert(directory, tmp_path / "out", dtype="float32")
