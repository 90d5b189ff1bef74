"""Leaves come in groups of bounded size."""

import numpy as np

from glm4v_jax.checkpoints.leaves import in_groups
from glm4v_jax.checkpoints.safetensors import TensorInfo


def test_large_leaves_come_first_and_alone_and_others_in_groups():
    sizes = dict(a=5, b=40, c=6, d=3, e=1, f=10, g=40)
    infos = {path: TensorInfo((size,), np.dtype(np.uint8)) for path, size in sizes.items()}
    assert list(in_groups(infos, 10)) == [["b"], ["g"], ["a"], ["c", "d", "e"], ["f"]]
