"""A checkpoint's tensors -> the model's leaves on their devices, one tensor at a time."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from glm4v_jax import weights
from glm4v_jax.config import Glm4vConfig
from glm4v_jax.model import Glm4v
from glm4v_jax.safetensors_io import CheckpointFiles, open_checkpoint

_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}
_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def default_dtype() -> DTypeLike:
    """What to compute in here: float32 on a CPU, where bfloat16 decodes several times slower, else bfloat16."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def resolve_dtype(dtype: Any, files: CheckpointFiles | None = None) -> np.dtype:
    """A dtype from None (this machine's default), "auto" (the checkpoint's), a name, or anything NumPy takes.

    Raises:
      ValueError: it is none of float32, bfloat16 and float16.
    """
    if dtype is None:
        dtype = default_dtype()
    elif isinstance(dtype, str) and dtype == "auto" and files is not None:
        dtype = next(iter(files.values())).dtype
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type | np.dtype) else jnp.dtype(dtype).name
    name = _ALIASES.get(name, name)
    if name not in _COMPUTE_DTYPES:
        raise ValueError(f"dtype: found {dtype!r}; expected None, 'auto' or one of {', '.join(_COMPUTE_DTYPES)}")
    return jnp.dtype(name)


def load_model(
    directory: str | Path,
    config: Glm4vConfig,
    *,
    dtype: Any = None,
    stacked: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Glm4v:
    """Read safetensors into a model in the current mesh.

    Every tensor is checked against the table before the first is read. Host memory holds one tensor at a time; a device
    holds the model, its leaves being filled in place.

    Args:
      directory: a checkpoint in Hugging Face layout.
      config: of the model.
      dtype: see `resolve_dtype`.
      stacked: the layout of the layers (see `layers`).
      progress: called with the bytes read so far and in all, after each tensor.

    Raises:
      CheckpointError: files are missing, truncated or corrupt, or tensors do not fit the configuration.
    """
    files = open_checkpoint(directory)
    sources = weights.match(config, {name: info.shape for name, info in files.items()}, str(directory))
    dtype = resolve_dtype(dtype, files)

    def make() -> Glm4v:
        model = Glm4v.init(config, dtype=dtype)
        return model if stacked else model.unstacked()

    abstract, structure = jax.tree.flatten(jax.eval_shape(make))
    index = {path: i for i, path in enumerate(leaf_paths(jax.tree.unflatten(structure, abstract)))}
    leaves: list[Any] = list(abstract)
    sizes = weights.dimensions(config)
    done, total = 0, sum(files[source.tensor].nbytes for source in sources)
    for source in sources:
        path, layer = _leaf(source, stacked)
        tensor = source.rule.to_leaf(files.read(source.tensor), sizes)
        leaves[index[path]] = _fill(leaves[index[path]], tensor, layer, source.rule.part)
        done += files[source.tensor].nbytes
        if progress is not None:
            progress(done, total)
    return jax.tree.unflatten(structure, leaves)


def leaf_paths(model: Glm4v) -> Iterator[str]:
    """The leaves' paths, in the order of `jax.tree.leaves`: "language_model.layers.stacked.mlp.down.kernel"."""
    for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]:
        yield ".".join(str(key.name) for key in path if getattr(key, "name", "value") != "value")


def _leaf(source: weights.Source, stacked: bool) -> tuple[str, int | None]:
    """The path of a source's leaf, and its index along the layer axis if the leaf has one."""
    if source.layer is None:
        return source.rule.leaf, None
    for group in ("language_model.layers.", "visual.blocks."):
        if source.rule.leaf.startswith(group):
            where = "stacked" if stacked else str(source.layer)
            return f"{group}{where}.{source.rule.leaf.removeprefix(group)}", source.layer if stacked else None
    raise AssertionError(source.rule.leaf)


def _fill(leaf: Any, tensor: np.ndarray, layer: int | None, part: tuple[int, int] | None) -> Array:
    """Put a tensor into its place of a leaf, which is still abstract if this is the first to arrive."""
    if layer is None and part is None:
        sharding = NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        # A copy even where a CPU could share the memory: it is a mapped file, which others may change.
        return jax.device_put(np.asarray(tensor, leaf.dtype), sharding, may_alias=False)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        leaf = jnp.zeros(leaf.shape, leaf.dtype, out_sharding=leaf.sharding)
    start = [0] * leaf.ndim
    if part is not None:
        axis, number = part
        tensor = np.expand_dims(tensor, axis)
        start[axis + (layer is not None)] = number
    if layer is not None:
        tensor = tensor[None]
        start[0] = layer
    return _update(leaf, np.ascontiguousarray(tensor), np.asarray(start, np.int32))


@functools.partial(jax.jit, donate_argnums=0)
def _update(leaf: Array, tensor: Array, start: Array) -> Array:
    update = jax.sharding.reshard(tensor.astype(leaf.dtype), jax.typeof(leaf).sharding)
    return jax.lax.dynamic_update_slice(leaf, update, tuple(start))
