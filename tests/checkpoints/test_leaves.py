"""Leaves come in groups of bounded size, and are cut into pieces of bounded size that are all of them."""

import numpy as np
import pytest

from glm4v_jax.checkpoints import leaves
from glm4v_jax.checkpoints.leaves import in_groups
from glm4v_jax.checkpoints.safetensors import TensorInfo


def test_large_leaves_come_first_and_alone_and_others_in_groups():
    sizes = dict(a=5, b=40, c=6, d=3, e=1, f=10, g=40)
    infos = {path: TensorInfo((size,), np.dtype(np.uint8)) for path, size in sizes.items()}
    assert list(in_groups(infos, 10)) == [["b"], ["g"], ["a"], ["c", "d", "e"], ["f"]]


@pytest.mark.parametrize(
    "view",
    [
        np.zeros((2, 13, 40), np.int8).transpose(2, 0, 1),
        np.zeros((30, 2, 13), np.int8)[:, 1:],
        np.zeros((300, 2), np.int8).T,
        np.zeros((0, 4)),
        np.zeros(()),
    ],
    ids=["fused", "slice", "narrow", "empty", "scalar"],
)
def test_pieces_of_a_view_are_all_of_it_once(monkeypatch, view):
    monkeypatch.setattr(leaves, "_PIECE_BYTES", 100)
    count = np.zeros(view.shape, int)
    pieces = list(leaves._pieces(view))
    for piece in pieces:
        count[piece] += 1
    assert (count == 1).all() and all(view[piece].nbytes <= 100 for piece in pieces)
    assert len(pieces) <= 1 + 2 * view.nbytes // 100


def test_pieces_are_cut_along_the_axes_that_may_be(monkeypatch):
    monkeypatch.setattr(leaves, "_PIECE_BYTES", 100)
    pieces = list(leaves._pieces(np.zeros((30, 40), np.int8), [1]))
    assert pieces == [(slice(None), slice(first, first + 3)) for first in range(0, 40, 3)]
