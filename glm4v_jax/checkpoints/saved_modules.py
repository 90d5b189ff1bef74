"""Whole modules in an adapter (`modules_to_save` of PEFT): trained, saved and loaded beside its matrices.

Such a module replaces the model's own. Its tensors have the names and layouts that they have in a checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.hf_mapping import LeafPart
from glm4v_jax.config.checks import fault, raise_faults
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.devices.distributed import to_host
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.model import lora
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import in_order
from glm4v_jax.model.nn import Embed, Linear
from glm4v_jax.model.params import kernels, leaf_paths
from glm4v_jax.model.quantize import QuantConfig, quantize_embedding, quantize_kernel


def named_modules(names: Sequence[str], config: Glm4vConfig, where: str) -> tuple[str, ...]:
    """Return the names in `lora.MODULES_TO_SAVE` of those that an adapter names, as PEFT matches them: by their end.

    Raises:
      CheckpointError: a name is of another module.
    """
    full = {"lm_head": "lm_head", "embed_tokens": "model.language_model.embed_tokens", "merger": "model.visual.merger"}
    found, faults = set(), []
    for name in names:
        ours = next((key for key, module in full.items() if f".{module}".endswith(f".{name}")), None)
        if ours is None:
            faults.append(fault("modules_to_save", name, f"some of {', '.join(full)}"))
        else:
            found.add(ours)
    faults += lora.faults_of_modules(sorted(found), config)
    raise_faults(faults, CheckpointError, where=where)
    return tuple(name for name in lora.MODULES_TO_SAVE if name in found)


def parts_of(config: Glm4vConfig, modules: Sequence[str]) -> Iterator[tuple[str, LeafPart]]:
    """Yield the name of every tensor of these modules, as transformers writes it, and what it fills."""
    prefixes = lora.leaf_prefixes(modules)
    for name, part in hf_mapping.tensor_rules(config).items():
        if part.path.startswith(prefixes):
            yield name, part


def saved_tensors(model: Glm4v) -> dict[str, np.ndarray]:
    """Return name -> tensor of the model's saved modules, on the host; all processes call this.

    Raises:
      ConfigError: one is quantised.
    """
    if not model.modules_to_save:
        return {}
    sizes, prefixes = hf_mapping.dimensions(model.config), lora.leaf_prefixes(model.modules_to_save)
    leaves = {
        path: leaf
        for path, leaf in zip(leaf_paths(model), jax.tree.leaves(model), strict=True)
        if path.startswith(prefixes) and not lora.is_lora(path)
    }
    if lora.integer_leaves(leaves):
        raise ConfigError("modules_to_save: found a quantised module, which was rounded; expected one in floats")
    linears = kernels(model)
    with lora.on_mesh_of(model):
        leaves |= {path: in_order(leaves[path], one, one.leading, 0) for path, one in linears.items() if path in leaves}
    host = dict(zip(leaves, to_host(list(leaves.values())), strict=True))
    return {
        name: part.rule.to_tensor(host[part.path][part.rule.index], sizes)
        for name, part in parts_of(model.config, model.modules_to_save)
    }


def put_saved(
    model: Glm4v, modules: Sequence[str], tensors: Mapping[str, np.ndarray], *, keep_dtype: bool = False
) -> None:
    """Replace modules of a model, in place; rounded to int8 where its own are quantised.

    `modules` are names in `lora.MODULES_TO_SAVE`, `tensors` canonical name -> tensor of all of them; an abstract model
    gets abstract leaves. `keep_dtype`: the tensors' own, for training, where the model's are floats of others.
    """
    model.modules_to_save = tuple(modules)
    sizes, shapes = hf_mapping.dimensions(model.config), hf_mapping.leaf_shapes(model.config)
    leaves: dict[str, np.ndarray] = {}
    for name, part in parts_of(model.config, modules):
        values = part.rule.to_leaf(tensors[hf_mapping.canonical(name)], sizes)
        if part.rule.index:
            leaf = leaves.setdefault(part.path, np.empty(shapes[part.path], values.dtype))
            leaf[part.rule.index] = values
        else:
            leaves[part.path] = values
    for path, values in leaves.items():
        *names, last = path.split(".")
        module: Any = model
        for name in names:
            module = getattr(module, name)
        own = getattr(module, last)[...]
        if not keep_dtype and jnp.issubdtype(own.dtype, jnp.floating):
            values = values.astype(own.dtype)
        if isinstance(module, Linear) and last == "kernel":
            replace_kernel(module, values)
        elif isinstance(module, Embed):
            _replace_table(module, values)
        else:
            setattr(module, last, nnx.Param(_put_like(values, own)))


def replace_kernel(linear: Linear, kernel: np.ndarray) -> None:
    """Give a linear layer another kernel, in floats, inputs first; rounded to int8 where its own is quantised.

    It keeps its dtype otherwise.
    """
    own = linear.kernel[...]
    if isinstance(own, jax.core.Tracer):
        linear.kernel = nnx.Param(_abstract_like(kernel, own))
        return
    new = _put(kernel, linear, own)
    if linear.kernel_scale is not None:
        new, scale = quantize_kernel(new, linear.in_axes, linear.out_axes, QuantConfig("int8"))
        linear.kernel_scale = nnx.Param(scale)
    linear.kernel = nnx.Param(in_order(new, linear, 0, linear.leading))


def _replace_table(embed: Embed, table: np.ndarray) -> None:
    own = embed.embedding[...]
    if embed.embedding_scale is None or isinstance(own, jax.core.Tracer):
        embed.embedding = nnx.Param(_put_like(table, own))
        return
    new, scale = quantize_embedding(_put_like(table, own))
    embed.embedding, embed.embedding_scale = nnx.Param(new), nnx.Param(scale)


def _put(kernel: np.ndarray, linear: Linear, own: Array) -> Array:
    spec = mesh.spec(*linear.in_axes, *linear.out_axes)
    sharding = jax.sharding.NamedSharding(own.sharding.mesh, spec)
    return jax.make_array_from_callback(kernel.shape, sharding, kernel.__getitem__, dtype=kernel.dtype)


def _abstract_like(values: np.ndarray, own: Array) -> Array:
    """The leaf of an abstract model that these values replace: it stays an integer where it is one."""
    return own.astype(values.dtype) if jnp.issubdtype(own.dtype, jnp.floating) else own


def _put_like(values: np.ndarray, own: Array) -> Array:
    """Values in the partition of a leaf of the same shape."""
    if isinstance(own, jax.core.Tracer):
        return _abstract_like(values, own)
    return jax.make_array_from_callback(values.shape, own.sharding, values.__getitem__, dtype=values.dtype)
