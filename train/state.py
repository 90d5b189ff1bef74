"""What a step changes and what it leaves alone: a model's leaves by path, and the model made of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, UInt32

from glm4v_jax.errors import ConfigError
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.lora import is_lora
from glm4v_jax.model.params import leaf_paths
from glm4v_jax.model.quantize import is_scale
from glm4v_jax.model.runtime import Flat, Structure

Leaves = dict[str, Array]
"""Path -> array: "language_model.layers.stacked.mlp.down.kernel"."""


class TrainState(NamedTuple):
    """What a step changes.

    params: the trained leaves, float32 whatever the model computes in.
    opt_state: the optimizer's state for these.
    step: int32, batches taken.
    skipped: int32, how many of them were skipped because of their gradients, or had no target.
    streak: int32, how many of them in a row until now.
    """

    params: Leaves
    opt_state: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    streak: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model is made of its leaves; equal ones hash alike, so that programs take them as static."""

    structure: Structure
    paths: tuple[str, ...]

    @classmethod
    def of(cls, model: Glm4v) -> Self:
        """Return the layout of a model, abstract or not."""
        return cls(Flat.of(model).structure, tuple(leaf_paths(model)))

    def model(self, params: Mapping[str, Array], frozen: Mapping[str, Array], dtype: DTypeLike) -> Glm4v:
        """Return the model of these leaves, cast to `dtype` where it computes in that.

        The leaves of an adapter stay float32, as PEFT keeps them beside a half-precision or quantised base
        (`autocast_adapter_dtype`), and each layer casts its own where it multiplies, as autocast does. Quantised
        kernels and their scales are not cast.
        """
        leaves = [_cast(path, params[path] if path in params else frozen[path], dtype) for path in self.paths]
        return jax.tree.unflatten(self.structure.treedef, leaves)

    def exported(
        self, params: Mapping[str, Array], frozen: Mapping[str, Array], dtypes: Mapping[str, DTypeLike]
    ) -> Glm4v:
        """Return the model of these leaves, trained ones in the dtypes that they were loaded in."""
        leaves = {**frozen, **_in_dtypes(params, dtypes)}
        return jax.tree.unflatten(self.structure.treedef, [leaves[path] for path in self.paths])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """A model during training, as programs take it: its leaves, trained and not, and what it computes in."""

    params: Leaves
    frozen: Leaves
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    def model(self) -> Glm4v:
        """Return the model in its compute dtype, within a program."""
        return self.layout.model(self.params, self.frozen, self.dtype)

    def cast(self) -> Glm4v:
        """Return the same model outside of one: leaves of another dtype are cast together, others are not copied."""
        leaves = {**self.frozen, **self.params}
        found = _in_dtypes(leaves, {path: _dtype(path, leaf, self.dtype) for path, leaf in leaves.items()})
        return jax.tree.unflatten(self.layout.structure.treedef, [found[path] for path in self.layout.paths])


def _in_dtypes(leaves: Mapping[str, Array], dtypes: Mapping[str, DTypeLike]) -> Leaves:
    """Cast leaves by one program: one for each shape took longer to compile than a small model's step."""
    others = {path: leaf for path, leaf in leaves.items() if leaf.dtype != dtypes[path]}
    cast = _cast_all(list(others.values()), tuple(jnp.dtype(dtypes[path]) for path in others)) if others else []
    return {**leaves, **dict(zip(others, cast, strict=True))}


@functools.partial(jax.jit, static_argnames="dtypes")
def _cast_all(leaves: list[Array], dtypes: tuple[np.dtype, ...]) -> list[Array]:
    return [leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]


def _cast(path: str, leaf: Array, dtype: DTypeLike) -> Array:
    return leaf.astype(_dtype(path, leaf, dtype))


def _dtype(path: str, leaf: Array, dtype: DTypeLike) -> DTypeLike:
    is_kept = is_lora(path) or is_scale(path) or jnp.issubdtype(leaf.dtype, jnp.integer)
    return leaf.dtype if is_kept else dtype


def split(model: Glm4v, is_trained: Callable[[str], bool]) -> tuple[Leaves, Leaves]:
    """Return the leaves that are trained, in float32, and the frozen ones, as they are.

    Raises:
      ConfigError: none is trained.
    """
    leaves = dict(zip(leaf_paths(model), jax.tree.leaves(model), strict=True))
    trained = {path: leaf for path, leaf in leaves.items() if is_trained(path)}
    if not trained:
        raise ConfigError("freeze: found no parameter to train; expected some that are not frozen")
    params = _in_dtypes(trained, dict.fromkeys(trained, jnp.float32))
    return params, {path: leaf for path, leaf in leaves.items() if path not in params}


def init_state(params: Leaves, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step; the optimizer's arrays are sharded as the parameters are."""
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]  # three buffers, because steps donate them
    return TrainState(params, jax.jit(optimizer.init)(params), *zeros)


@jax.jit
def is_finite(tree: Any) -> Bool[Array, ""]:
    """Return whether all numbers of a tree are finite."""
    found = (jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree))
    return functools.reduce(jnp.logical_and, found, jnp.bool_(True))


@jax.jit
def bit_sum(tree: Any) -> UInt32[Array, ""]:
    """Return a checksum of a tree, the same however it is sharded: the sum of the bits of its numbers, as integers."""
    bits = (jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") for x in jax.tree.leaves(tree))
    return functools.reduce(jnp.add, (jnp.sum(x.astype(jnp.uint32)) for x in bits), jnp.uint32(0))
