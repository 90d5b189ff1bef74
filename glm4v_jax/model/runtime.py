"""The model ready to run: flattened leaves of its parts on a mesh, and the programs that take them.

A module crosses the border of `jax.jit` as the list of its leaves: flattening a tree of NNX objects at every call would
cost more than a decode step of a small model (298 ms against 0.8 ms a dispatch for the 9B's `nnx.jit`). Models of equal
structure share compiled programs.

Dimensions: B sequences, T tokens, D hidden size, R vision rows of L patches, N merged vision tokens.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Generic, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from glm4v_jax.batch import VisionRows
from glm4v_jax.config.checks import raise_faults
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh as meshes
from glm4v_jax.devices.hardware import check_32_bits
from glm4v_jax.devices.stored_programs import WithKinds
from glm4v_jax.model.decoder import TextDecoder
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import Linear
from glm4v_jax.model.params import leaf_paths
from glm4v_jax.model.vision import VisionEncoder

M = TypeVar("M")

MIN_FEATURES = 64
"""The fewest merged tokens that `encode` returns, padding included."""


class Structure:
    """A tree structure that hashes in no time: `_structure` makes equal ones the same object."""

    def __init__(self, treedef: Any):
        self.treedef = treedef

    def __repr__(self) -> str:
        return f"Structure({self.treedef})"


@functools.cache
def _structure(treedef: Any) -> Structure:
    return Structure(treedef)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat(WithKinds, Generic[M]):
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

    def released(self) -> "Flat[M]":
        """The same without arrays: shapes, dtypes and shardings stand for them."""
        leaves: list[Any] = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in self.leaves]
        return Flat(leaves, self.structure)


@dataclasses.dataclass
class Runtime:
    """A model on its mesh: what engine, slots, feature pool, warm-up and evaluation during training stand on.

    >>> with meshes.use_mesh():
    ...     runtime = Runtime.of(random_module(Glm4vConfig.tiny(), seed=0, dtype="float32"))
    >>> runtime.dtype.name, runtime.text.module.config.hidden_size
    ('float32', 64)

    `checkpoints.load.load_runtime` reads one from a checkpoint.

    Attributes:
      config: of the model.
      mesh: where the leaves are.
      rules: of the programs on it.
      visual, text, head: ViT with merger, decoder, and head; no head where it is tied to the embedding.
      generation_config: the checkpoint's defaults for generation.
    """

    config: Glm4vConfig
    mesh: Mesh
    visual: Flat[VisionEncoder]
    text: Flat[TextDecoder]
    head: Flat[Linear] | None
    generation_config: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    rules: meshes.Rules = dataclasses.field(default_factory=meshes.current_rules)

    @classmethod
    def of(cls, module: Glm4v, mesh: Mesh | None = None, generation_config: GenerationConfig | None = None) -> Self:
        """Flatten a module whose arrays are on `mesh`, by default the current one, for the current rules.

        Raises:
          ConfigError: JAX has integers of 64 bits.
        """
        check_32_bits()
        with meshes.use_mesh(mesh) as mesh:
            head = None if module.lm_head is None else Flat.of(module.lm_head)
            return cls(
                module.config, mesh, Flat.of(module.visual), Flat.of(module.language_model), head,
                generation_config or GenerationConfig(),
            )  # fmt: skip

    @property
    def module(self) -> Glm4v:
        """The functional module, around the same arrays: for `jax.jit`, `jax.grad` and training."""
        head = None if self.head is None else self.head.module
        return Glm4v(self.config, self.visual.module, self.text.module, head)

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype."""
        return compute_dtype(self.text)

    @functools.cached_property
    def is_stacked(self) -> bool:
        """Whether the decoder's layers are stacked and scanned."""
        return self.text.module.layers.is_stacked

    def on_mesh(self) -> contextlib.AbstractContextManager[Mesh]:
        """Run the body in the runtime's mesh and rules, whatever this thread has set."""
        return meshes.use_mesh(self.mesh, self.rules)

    def updated(self, module: Glm4v) -> Self:
        """The same model with other weights: compiled programs take them as they took these.

        Raises:
          ConfigError: a leaf is missing or new, or has another shape, dtype or sharding; the message names it.
        """
        old, new = (dict(zip(leaf_paths(one), jax.tree.leaves(one), strict=True)) for one in (self.module, module))
        raise_faults(_misfits(old, new))
        with self.on_mesh():
            updated = self.of(module, self.mesh, self.generation_config)
        if jax.tree.structure(updated.module) != jax.tree.structure(self.module):
            raise_faults(["module: found a model of another structure; expected that of the one it replaces"])
        return updated

    def released(self) -> Self:
        """The same model without weights, so that their memory is free; `updated` gives it others."""
        head = None if self.head is None else self.head.released()
        return dataclasses.replace(self, visual=self.visual.released(), text=self.text.released(), head=head)

    @property
    def is_released(self) -> bool:
        """Whether there are no weights."""
        return isinstance(self.text.leaves[0], jax.ShapeDtypeStruct)


def _misfits(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is wrong with leaves that are to replace others."""
    faults = [f"{path}: found no such leaf; expected one" for path in old.keys() - new.keys()]
    faults += [f"{path}: found a leaf that the model does not have; expected none" for path in new.keys() - old.keys()]
    for path in (path for path in old if path in new):
        before, after = old[path], new[path]
        (found, expected) = (f"{leaf.dtype.name} {list(leaf.shape)}" for leaf in (after, before))
        if found == expected and not after.sharding.is_equivalent_to(before.sharding, after.ndim):
            found, expected = (
                f"{leaf.sharding.spec} of mesh {dict(leaf.sharding.mesh.shape)}" for leaf in (after, before)
            )
        if found != expected:
            faults.append(f"{path}: found {found}; expected {expected}")
    return sorted(faults)


class HasRuntime(Protocol):
    """What the transformers-shaped classes are to the rooms below them."""

    runtime: Runtime


def runtime_of(model: Runtime | HasRuntime) -> Runtime:
    """The runtime itself, or that of a model in the reference's shape."""
    return model if isinstance(model, Runtime) else model.runtime


def random_module(config: Glm4vConfig, seed: int, dtype: DTypeLike) -> Glm4v:
    """Initialise a model in the current mesh, by one program: run eagerly, every initialiser would be compiled."""
    return _random_module(config, jax.random.key(seed), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _random_module(config: Glm4vConfig, key: Key[Array, ""], dtype: np.dtype) -> Glm4v:
    return Glm4v.init(config, rngs=nnx.Rngs(params=key), dtype=dtype)


def compute_dtype(part: Flat[TextDecoder] | Flat[VisionEncoder]) -> np.dtype:
    """The dtype of a part's last norm, which is never quantised."""
    module = part.module
    norm = module.norm if isinstance(module, TextDecoder) else module.post_layernorm
    return norm.scale.dtype


def encode_rows(
    visual: Flat[VisionEncoder], merge_size: int, rows: VisionRows, dropout_key: Array | None = None
) -> Float[Array, "N D"]:
    """Encode packed rows [R, L] of patches of a batch, in the current mesh; `encode_media` encodes one by one.

    Returns:
      Merged tokens, N the power of two that holds the flattened [R * L / merge_size^2].
    """
    return encode(visual, rows, num_features(rows.segment_ids.size, merge_size), dropout_key)


def num_features(patches: int, merge_size: int) -> int:
    """The N of `encode_rows` for rows of `patches` patches in all, padding included."""
    cells = patches // merge_size**2
    return max(MIN_FEATURES, 1 << (cells - 1).bit_length())


@functools.partial(jax.jit, static_argnames="num_tokens")
def encode(
    visual: Flat[VisionEncoder], rows: VisionRows, num_tokens: int, dropout_key: Array | None = None
) -> Float[Array, "N D"]:
    """Packed patches -> [num_tokens, D] merged tokens, flattened, replicated and padded with zeros.

    `num_tokens` comes from a coarse bucket set, so that prompt lengths and image sizes do not multiply into programs.
    """
    features = meshes.reshard(visual.module(rows, dropout_key=dropout_key), None, None, None)
    flat = features.reshape(-1, features.shape[-1])
    return jnp.pad(flat, ((0, num_tokens - flat.shape[0]), (0, 0)))
