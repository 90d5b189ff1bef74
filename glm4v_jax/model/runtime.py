"""Modules as the programs take them."""

import dataclasses
import functools
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm4v_jax.batch import VisionRows
from glm4v_jax.devices import mesh
from glm4v_jax.model.vision import VisionEncoder

M = TypeVar("M")


class Structure:
    """A tree structure that hashes in no time: `_structure` makes equal ones the same object."""

    def __init__(self, treedef: Any):
        self.treedef = treedef


@functools.cache
def _structure(treedef: Any) -> Structure:
    return Structure(treedef)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat(Generic[M]):
    """A module as the programs take it; `leaves` are arrays on their devices."""

    leaves: list[Array]
    structure: Structure = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, module: M) -> "Flat[M]":
        """Flatten a module."""
        leaves, treedef = jax.tree.flatten(module)
        return cls(leaves, _structure(treedef))

    @property
    def module(self) -> M:
        """The module itself, around the same arrays."""
        return jax.tree.unflatten(self.structure.treedef, self.leaves)


@functools.partial(jax.jit, static_argnames="num_tokens")
def encode(
    visual: Flat[VisionEncoder], rows: VisionRows, num_tokens: int, dropout_key: Array | None = None
) -> Float[Array, "N D"]:
    """Packed patches -> [num_tokens, D] merged tokens, flattened, replicated and padded with zeros.

    `num_tokens` comes from a coarse bucket set, so that prompt lengths and picture sizes do not multiply into programs.
    """
    features = mesh.reshard(visual.module(rows, dropout_key=dropout_key), None, None, None)
    flat = features.reshape(-1, features.shape[-1])
    return jnp.pad(flat, ((0, num_tokens - flat.shape[0]), (0, 0)))
