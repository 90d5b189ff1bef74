"""Damaged checkpoints: whatever is wrong, one clear error names it, and no checkpoint comes of it.

Files and indices that the reader refuses by themselves: `tests/checkpoints/test_safetensors.py`.
"""

import json
import os
import shutil

import numpy as np
import pytest
from helpers_convert import join_file, read_all, split_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.inspect import inspect
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OTHER_DTYPES = {"BF16": ("F16", "I16", "U16"), "F32": ("I32", "U32"), "F16": ("BF16", "I16", "U16")}

mutated = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
numbers = st.integers(0, 10**9)


class Damaged:
    """A copy of a checkpoint of two shards, to be damaged."""

    def __init__(self, source, directory):
        self.directory = directory / "damaged"
        self.target = directory / "target"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(source, self.directory)
        self.weight_map = json.loads((self.directory / INDEX).read_text())["weight_map"]

    def pick(self, number):
        """A tensor and its file."""
        name = sorted(self.weight_map)[number % len(self.weight_map)]
        return name, self.weight_map[name]

    def write_index(self):
        (self.directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.weight_map}))

    def header(self, file, change):
        """Change the header of a file, its data stay."""
        text, data = split_file(self.directory / file)
        header = json.loads(text)
        join_file(self.directory / file, change(header) or header, data)

    def assert_refused(self, *names):
        """Nothing takes it; each says the names."""
        attempts = (
            lambda: to_hf(self.directory, self.target),
            lambda: to_orbax(self.directory, self.target),
            lambda: Glm4vForConditionalGeneration.from_pretrained(self.directory),
            lambda: inspect(self.directory),
        )
        for attempt in attempts:
            with pytest.raises(CheckpointError) as caught:
                attempt()
            assert not [name for name in names if name not in str(caught.value)], str(caught.value)
            assert os.listdir(self.target.parent) == [self.directory.name]


@pytest.fixture
def damaged(synthetic, tmp_path):
    """dtype -> a fresh copy."""
    return lambda dtype="bfloat16": Damaged(synthetic(dtype, 2), tmp_path / "here")


def short(name):
    """As the table has it."""
    return name.removeprefix("model.")


@mutated
@given(number=numbers, index_too=st.booleans())
def test_a_dropped_tensor_is_refused(damaged, number, index_too):
    it = damaged()
    name, file = it.pick(number)
    tensors = read_all(it.directory)
    kept = {other: tensors[other] for other, place in it.weight_map.items() if place == file and other != name}
    write_safetensors(it.directory / file, kept)
    if index_too:
        del it.weight_map[name]
        it.write_index()
    # Once gone from the index too, nobody knows where it was.
    it.assert_refused(short(name), *() if index_too else (file,))


@mutated
@given(number=numbers, index_too=st.booleans())
def test_a_renamed_tensor_is_refused(damaged, number, index_too):
    it = damaged()
    name, file = it.pick(number)
    other = name.replace("weight", "weights").replace("bias", "biases")
    it.header(file, lambda header: {other if key == name else key: value for key, value in header.items()})
    if index_too:
        it.weight_map = {other if key == name else key: value for key, value in it.weight_map.items()}
        it.write_index()
    it.assert_refused(short(name), other, file)


@mutated
@given(number=numbers, flat=st.booleans())
def test_a_reshaped_tensor_is_refused(damaged, number, flat):
    it = damaged()
    matrices = sorted(name for name, tensor in read_all(it.directory).items() if len(set(tensor.shape)) > 1)
    name = matrices[number % len(matrices)]
    file = it.weight_map[name]

    def change(header):
        shape = header[name]["shape"]
        header[name]["shape"] = [int(np.prod(shape))] if flat else shape[::-1]

    text, _ = split_file(it.directory / file)
    if not flat and json.loads(text)[name]["shape"] == json.loads(text)[name]["shape"][::-1]:
        flat = True
    it.header(file, change)
    it.assert_refused(name, file, "shape")


@mutated
@given(number=numbers, which=numbers, dtype=st.sampled_from(["bfloat16", "float16", "float32"]))
def test_another_dtype_is_refused(damaged, number, which, dtype):
    it = damaged(dtype)
    name, file = it.pick(number)

    def change(header):
        others = OTHER_DTYPES[header[name]["dtype"]]
        header[name]["dtype"] = others[which % len(others)]

    it.header(file, change)
    it.assert_refused(name, file, "dtype")


@mutated
@given(number=numbers, spelling=st.sampled_from(["same", "without prefix"]))
def test_a_tensor_in_two_shards_is_refused(damaged, number, spelling):
    it = damaged()
    layers = [name for name in sorted(it.weight_map) if it.weight_map[name] == SHARDS[0]]
    name = layers[number % len(layers)]
    tensors = read_all(it.directory)
    again = name if spelling == "same" else short(name)
    second = {other: tensors[other] for other, place in it.weight_map.items() if place == SHARDS[1]}
    write_safetensors(it.directory / SHARDS[1], second | {again: tensors[name] * 2})
    if again != name:
        it.weight_map[again] = SHARDS[1]
        it.write_index()
    it.assert_refused(name, again, *SHARDS)
