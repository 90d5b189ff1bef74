"""LoRA: small trained matrices beside frozen kernels, `y = x W + alpha / rank * (x A) B` (arXiv 2106.09685).

The matrices are leaves of `nn.Linear`, stacked and sharded over the mesh as its kernel is: a model with an adapter is a
model like any other. `add_lora` adds the leaves, `merge_lora` merges them into the kernels, `is_lora` finds them.
With DoRA a magnitude of each output is trained beside them (arXiv 2402.09353), with rsLoRA the product is scaled by
alpha / sqrt(rank) (arXiv 2312.03732). Whole modules may be trained as well (`modules_to_save`): then their own leaves
change, and the files of the adapter have them (`checkpoints.saved_modules`).
"""

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array
from msgspec import Meta

from glm4v_jax.config.checks import Positive, PositiveNumber, fault, raise_faults, validate
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.errors import ConfigError
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import Linear, subscripts
from glm4v_jax.model.params import (
    DECODER,
    check_pattern,
    leaf_paths,
    linears,
    matching_linears,
    sizes,
    stacked_layers,
)

SavedModule = Literal["lm_head", "embed_tokens", "merger"]
MODULES_TO_SAVE: Mapping[SavedModule, str] = {
    "lm_head": "lm_head.", "embed_tokens": "language_model.embed_tokens.", "merger": "visual.merger.",
}  # fmt: skip
"""Modules that may be trained whole beside an adapter -> how paths of their leaves begin."""

DTYPE = jnp.float32
"""Of an adapter, whatever the compute dtype is: steps of learning rates of 1e-4 and below are lost in bfloat16."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and of what size.

    Attributes:
      rank: of its matrices.
      alpha: the product of the matrices is scaled by alpha / rank.
      target: regular expression that fits the whole path of a linear layer, layers without their numbers:
        "language_model.layers.self_attn.q_proj", "visual.blocks.mlp.gate_up", "visual.merger.proj", "lm_head".
      rslora: scale by alpha / sqrt(rank) instead, so that a larger rank does not learn more slowly.
      dora: train a magnitude for each output as well; every step then reads the frozen kernels twice.
      modules_to_save: train these modules whole, some of "lm_head", "embed_tokens", "merger"; as PEFT does.
    """

    rank: Positive = 8
    alpha: PositiveNumber = 16.0
    target: str = DECODER
    rslora: bool = False
    dora: bool = False
    modules_to_save: Annotated[
        tuple[SavedModule, ...], Meta(description="a list of some of 'lm_head', 'embed_tokens', 'merger'")
    ] = ()

    def __post_init__(self) -> None:
        validate(self)
        check_pattern(self.target, "target")

    @property
    def scale(self) -> float:
        """What the product of the matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def is_lora(path: str) -> bool:
    """Whether a leaf's path is that of a part of an adapter."""
    return path.endswith((".lora_a", ".lora_b", ".lora_magnitude"))


def leaf_prefixes(modules: Iterable[str]) -> tuple[str, ...]:
    """Return how paths of the leaves of these `MODULES_TO_SAVE` begin."""
    return tuple(prefix for name, prefix in MODULES_TO_SAVE.items() if name in modules)


def is_adapted(model: Glm4v, path: str) -> bool:
    """Whether a leaf, by its path, is one that a model's adapter has: one of its matrices, or of a whole module."""
    return is_lora(path) or path.startswith(leaf_prefixes(model.modules_to_save))


def faults_of_modules(modules: Sequence[str], config: Glm4vConfig) -> list[str]:
    """Return why these `MODULES_TO_SAVE` cannot replace those of a model; empty if they can."""
    tied = [name for name in ("lm_head", "embed_tokens") if name in modules]
    if not tied or not config.text_config.tie_word_embeddings:
        return []
    expected = "neither lm_head nor embed_tokens: in this model the two are one (tie_word_embeddings)"
    return [fault("modules_to_save", ", ".join(tied), expected)]


def integer_leaves(leaves: Mapping[str, Array]) -> list[str]:
    """Return the paths of leaves that are quantised."""
    return [path for path, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)]


def on_mesh_of(model: Glm4v) -> contextlib.AbstractContextManager[object]:
    """Run the body in the mesh that a model is on; in the current one where its arrays are traced or abstract."""
    sharding = getattr(jax.tree.leaves(model)[-1], "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return mesh.use_mesh(sharding.mesh)
    return contextlib.nullcontext()


def has_lora(model: Glm4v) -> bool:
    """Whether any layer has an adapter, or a whole module belongs to one."""
    return bool(model.modules_to_save) or any(
        linear.lora_a is not None for found in linears(model).values() for linear in found
    )


def copy_without_lora(model: Glm4v) -> Glm4v:
    """Copy the modules around the same arrays; ConfigError if there is an adapter, which a second one would replace."""
    if has_lora(model):
        raise ConfigError("found a model that has an adapter; expected one without: merge it first (lora.merge_lora)")
    return jax.tree.map(lambda x: x, model)


def set_lora(linear: Linear, a: Array, b: Array, scale: float) -> None:
    """Give a linear layer an adapter: a [*inputs, R], b [R, *outputs], both with the layers first if it is stacked."""
    linear.lora_a, linear.lora_b, linear.lora_scale = nnx.Param(a), nnx.Param(b), scale


def set_magnitude(linear: Linear, magnitude: Array) -> None:
    """Give the adapter of a linear layer a magnitude [*outputs] (DoRA); where it is NaN, the norm of its kernel."""
    linear.lora_magnitude = nnx.Param(_with_norms(linear, magnitude))


def unset_lora(linear: Linear) -> None:
    """Leave a linear layer without its adapter."""
    linear.lora_a = linear.lora_b = linear.lora_magnitude = linear.lora_gain = linear.lora_key = None
    linear.lora_scale = linear.lora_dropout = 0.0


@jax.jit
def output_norms(linear: Linear) -> Array:
    """`Linear.output_norms` in the partition of a parameter, [*outputs]; of stacked layers with the layers first."""
    return _each(lambda linear: mesh.reshard(linear.output_norms(), *linear.out_axes), linear)


@jax.jit
def _with_norms(linear: Linear, magnitude: Array) -> Array:
    return jnp.where(jnp.isnan(magnitude), output_norms(linear), magnitude)


@jax.jit
def _gain(linear: Linear) -> Array:
    assert linear.lora_magnitude is not None
    return linear.lora_magnitude[...] / output_norms(linear)


def _each(function: Callable[[Linear], Array], linear: Linear) -> Array:
    """Call a function with a linear layer, or with each of those that are stacked in it."""
    return function(linear) if stacked_layers(linear) is None else jax.lax.map(function, linear)


def fix_magnitudes(model: Glm4v) -> Glm4v:
    """Replace the magnitudes of DoRA by what they come to, for inference: a number for each output.

    New modules around the same arrays. Kernels are read once more, here, and no longer in every forward pass.
    """
    result = jax.tree.map(lambda x: x, model)
    for found in linears(result).values():
        for linear in found:
            if linear.lora_magnitude is not None:
                with on_mesh_of(model):
                    gain = _gain(linear)
                linear.lora_magnitude, linear.lora_gain = None, nnx.Param(gain)
    return result


def with_dropout(model: Glm4v, key: Array, rate: float) -> Glm4v:
    """Let what adapters see of their inputs drop out at a rate, for a training step; new modules, the same arrays.

    Every layer gets a key of its own from that of the step.
    """
    result = jax.tree.map(lambda x: x, model)
    for path, found in linears(result).items():
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        for index, linear in enumerate(found):
            if linear.lora_a is not None:
                layers = stacked_layers(linear)
                keys = jax.random.fold_in(own, index) if layers is None else jax.random.split(own, layers)
                linear.lora_key, linear.lora_dropout = nnx.Param(keys), rate
    return result


def add_lora(model: Glm4v, config: LoraConfig, seed: int = 0) -> Glm4v:
    """Add a new adapter, which does not change what the model computes yet; new modules around the same arrays.

    Initialised as by PEFT: A from U(-1, 1) / sqrt(inputs) (`kaiming_uniform_(a=sqrt(5))`), each layer's from a key of
    its own, the same in both layouts and on every mesh; B is 0. Both are float32.

    Args:
      model: on its mesh; inside `jax.eval_shape` it may be abstract, in the current mesh.
      config: which layers, and of what size.
      seed: of the random numbers.

    Raises:
      ConfigError: the pattern matches no linear layer, or one of a module that is trained whole; such a module is
        quantised, or the model has none of its own; or there is an adapter already.
    """
    result = copy_without_lora(model)
    chosen = matching_linears(result, config.target, "target")
    result.modules_to_save = config.modules_to_save
    check_modules(result, chosen)

    with on_mesh_of(model):
        drawn = _drawn(chosen, jax.random.key(seed), config.rank)
    for path, leaves in drawn.items():
        for linear, (a, b) in zip(chosen[path], leaves, strict=True):
            set_lora(linear, a, b, config.scale)
            if config.dora:  # that of the kernel, as B is 0
                with on_mesh_of(model):
                    linear.lora_magnitude = nnx.Param(output_norms(linear))
    return result


def check_modules(model: Glm4v, chosen: Iterable[str] = ()) -> None:
    """Check that a model's whole modules can be trained beside adapters of the chosen linear layers.

    Raises:
      ConfigError: one is quantised, the model's head is its embedding, or a layer of one is chosen.
    """
    prefixes = leaf_prefixes(model.modules_to_save)
    if not prefixes:
        return
    faults = faults_of_modules(model.modules_to_save, model.config)
    leaves = dict(zip(leaf_paths(model), jax.tree.leaves(model), strict=True))
    if integers := integer_leaves({path: leaf for path, leaf in leaves.items() if path.startswith(prefixes)}):
        faults.append(fault("modules_to_save", integers[0], "one in floats: integers cannot be trained"))
    if both := [path for path in chosen if f"{path}.".startswith(prefixes)]:
        faults.append(fault("target", both[0], "no layer of modules_to_save, which are trained whole"))
    raise_faults(faults)


def drop_lora(model: Glm4v) -> Glm4v:
    """Remove the matrices of the adapter, and keep its whole modules; new modules around the same arrays."""
    result = jax.tree.map(lambda x: x, model)
    result.modules_to_save = ()
    for found in linears(result).values():
        for linear in found:
            unset_lora(linear)
    return result


def merge_lora(model: Glm4v) -> Glm4v:
    """Merge the adapter into its kernels, `W + scale A B` in float32, cast back; without one, copy the modules.

    With DoRA each output's column of that sum gets its magnitude as its norm.
    New modules; kernels without an adapter are the same arrays. Old and new kernels are in memory, and one layer's in
    float32.

    Raises:
      ConfigError: a kernel with an adapter is quantised, and would be rounded again.
    """
    result = jax.tree.map(lambda x: x, model)
    merge_in_place(result)
    return result


def merge_in_place(model: Glm4v) -> None:
    """As `merge_lora`, in the modules themselves: kernels that nothing else holds are freed one after the other."""
    model.modules_to_save = ()
    for path, found in linears(model).items():
        for linear in found:
            if linear.lora_a is not None and linear.lora_b is not None:
                if linear.kernel_scale is not None:
                    raise ConfigError(
                        f"{path}: found a quantised kernel; expected one in floats: merge into the model that was "
                        "quantised"
                    )
                with on_mesh_of(model):
                    linear.kernel = nnx.Param(_merged(linear))
                unset_lora(linear)


@functools.partial(jax.jit, static_argnames="rank")
def _drawn(chosen: dict[str, list[Linear]], key: Array, rank: int) -> dict[str, list[tuple[Array, Array]]]:
    """A and B of linear layers by path; layers have the same numbers whether they are stacked or not.

    One program, with all keys from one call: each draw would be compiled by itself.
    """
    counts = {path: stacked_layers(found[0]) or len(found) for path, found in chosen.items()}
    numbers = [(zlib.crc32(path.encode()), i) for path, count in counts.items() for i in range(count)]
    fold_in = jax.random.fold_in
    keys = jax.vmap(lambda path, layer: fold_in(fold_in(key, path), layer))(*np.array(numbers, np.uint32).T)
    drawn, first = {}, 0
    for path, count in counts.items():
        drawn[path] = _new(chosen[path], keys[first : first + count], rank)
        first += count
    return drawn


def _new(found: list[Linear], keys: Array, rank: int) -> list[tuple[Array, Array]]:
    """A and B of the linear layers of one path, each layer's with a key of its own."""
    inputs, outputs = sizes(found[0])
    bound = 1 / math.sqrt(math.prod(inputs))
    a_axes, b_axes = (*found[0].in_axes, None), (None, *found[0].out_axes)

    def draw(key: Array) -> Array:
        a = jax.random.uniform(key, (*inputs, rank), DTYPE, -bound, bound)
        return mesh.reshard(a, *a_axes)

    def zeros(*layers: int) -> Array:
        axes = (*(None for _ in layers), *b_axes)
        return mesh.reshard(jnp.zeros((*layers, rank, *outputs), DTYPE), *axes)

    every = jax.vmap(draw)(keys)
    if (layers := stacked_layers(found[0])) is not None:
        return [(every, zeros(layers))]
    return [(every[i], zeros()) for i in range(len(found))]


@jax.jit
def _merged(linear: Linear) -> Array:
    """The kernel with its adapter in it, in its dtype and partition; stacked layers one after the other."""
    inputs = len(linear.in_axes)
    ins, outs, both = subscripts(inputs, len(linear.out_axes), linear.leading)

    def merge(linear: Linear) -> Array:
        assert linear.lora_a is not None and linear.lora_b is not None
        kernel = linear.kernel[...]
        product = jnp.einsum(
            f"{ins}r,r{outs}->{both}", linear.lora_a[...].astype(jnp.float32), linear.lora_b[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST, out_sharding=mesh.spec(*linear.axes),
        )  # fmt: skip
        merged = kernel.astype(jnp.float32) + linear.lora_scale * product
        if (gain := linear.gain()) is not None:
            gain = mesh.reshard(gain, *linear.out_axes)
            merged *= jnp.expand_dims(gain, tuple(range(linear.leading, linear.leading + inputs)))
        return merged.astype(kernel.dtype)

    return _each(merge, linear)
