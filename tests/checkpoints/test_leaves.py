"""Leaves come in groups of bounded size, and are in memory once."""

from types import SimpleNamespace

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from glm4v_jax.checkpoints import leaves
from glm4v_jax.checkpoints.leaves import array_of, in_groups
from glm4v_jax.checkpoints.safetensors import TensorInfo


def test_large_leaves_come_first_and_alone_and_others_in_groups():
    sizes = dict(a=5, b=40, c=6, d=3, e=1, f=10, g=40)
    infos = {path: TensorInfo((size,), np.dtype(np.uint8)) for path, size in sizes.items()}
    assert list(in_groups(infos, 10)) == [["b"], ["g"], ["a"], ["c", "d", "e"], ["f"]]


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("huge", [1, 1 << 20])
def test_jax_takes_over_the_memory_that_was_read_into(monkeypatch, huge):
    def fill(out, path, index):
        out[...] = np.arange(15).reshape(3, 5)

    of_numbers = SimpleNamespace(infos={"x": TensorInfo((3, 5), np.dtype(np.int8))}, fill=fill)
    monkeypatch.setattr(leaves, "_HUGE_BYTES", huge)
    made, aligned = [], leaves._aligned
    monkeypatch.setattr(leaves, "_aligned", lambda *of: made.append(aligned(*of)) or made[-1])
    array = array_of(of_numbers, "x", PartitionSpec(), np.dtype(np.float32))
    np.testing.assert_array_equal(array, np.arange(15.0).reshape(3, 5))
    assert array.dtype == np.float32 and array.unsafe_buffer_pointer() == made[0].ctypes.data
