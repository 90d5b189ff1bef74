"""What training changes and what it leaves alone: a model's leaves by path, and the way back to the model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from glm4v_jax.errors import ConfigError
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.lora import is_lora
from glm4v_jax.model.params import leaf_paths
from glm4v_jax.model.quantize import is_scale
from glm4v_jax.model.runtime import Structure

Leaves = dict[str, Array]
"""Path -> array: "language_model.layers.stacked.mlp.down.kernel"."""


class TrainState(NamedTuple):
    """What a step changes.

    params: what is trained, float32 whatever the model computes in.
    opt_state: the optimiser's, of these.
    step: int32, batches taken.
    skipped: int32, how many of them were left out because of their gradients.
    streak: int32, how many of them one after another until now.
    """

    params: Leaves
    opt_state: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    streak: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model is put together of its leaves; equal ones hash alike, so that programs take them as static."""

    structure: Structure
    paths: tuple[str, ...]

    @classmethod
    def of(cls, model: Glm4v) -> Self:
        """Of a model, abstract or not."""
        return cls(Structure(jax.tree.structure(model)), tuple(leaf_paths(model)))

    def model(self, params: Mapping[str, Array], frozen: Mapping[str, Array], dtype: DTypeLike) -> Glm4v:
        """The model of these leaves, those of them in `dtype` that it computes with.

        An adapter's leaves stay float32, as PEFT keeps them beside a half-precision or quantised base
        (`autocast_adapter_dtype`), and each layer casts its own where it multiplies, as autocast does. Quantised
        kernels and their scales stay what they are.
        """
        leaves = [_cast(path, params[path] if path in params else frozen[path], dtype) for path in self.paths]
        return jax.tree.unflatten(self.structure.treedef, leaves)

    def exported(
        self, params: Mapping[str, Array], frozen: Mapping[str, Array], dtypes: Mapping[str, DTypeLike]
    ) -> Glm4v:
        """The model of these leaves, each in the dtype that it had; those of an adapter keep float32."""
        leaves = [params[path].astype(dtypes[path]) if path in params else frozen[path] for path in self.paths]
        return jax.tree.unflatten(self.structure.treedef, leaves)


def _cast(path: str, leaf: Array, dtype: DTypeLike) -> Array:
    is_kept = is_lora(path) or is_scale(path) or jnp.issubdtype(leaf.dtype, jnp.integer)
    return leaf if is_kept else leaf.astype(dtype)


def split(model: Glm4v, is_trained: Callable[[str], bool]) -> tuple[Leaves, Leaves]:
    """The leaves that are trained, in float32, and those that are not, as they are.

    Raises:
      ConfigError: none is trained.
    """
    leaves = dict(zip(leaf_paths(model), jax.tree.leaves(model), strict=True))
    params = {path: leaf.astype(jnp.float32) for path, leaf in leaves.items() if is_trained(path)}
    if not params:
        raise ConfigError("found no parameter to train; expected some that are not frozen")
    return params, {path: leaf for path, leaf in leaves.items() if path not in params}


def init_state(params: Leaves, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the optimiser's arrays are split over the mesh as the parameters are."""
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]  # no two of them one buffer: steps give theirs away
    return TrainState(params, jax.jit(optimizer.init)(params), *zeros)
