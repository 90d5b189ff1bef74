"""A checkpoint, in either format -> the model's leaves on their devices, one at a time."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from glm4v_jax import weights
from glm4v_jax.checkpoint import leaves_of, open_weights
from glm4v_jax.config import Glm4vConfig
from glm4v_jax.leaves import array_of
from glm4v_jax.mesh import platform
from glm4v_jax.model import Glm4v
from glm4v_jax.safetensors_io import TensorInfo

_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}
_COMPUTE_DTYPES = weights.DTYPES

_LAYER = re.compile(rf"({'|'.join(map(re.escape, weights.LAYER_GROUPS))})(\d+)\.")

# The system's memory for what has been read of a file is given back this often, so that it does not look like ours.
_RELEASE_BYTES = 512 << 20


def default_dtype() -> DTypeLike:
    """What to compute in here: float32 on a CPU, where bfloat16 decodes several times slower, else bfloat16."""
    return jnp.float32 if platform() == "cpu" else jnp.bfloat16


def resolve_dtype(dtype: Any, files: Mapping[str, TensorInfo] | None = None) -> np.dtype:
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
    """Read a checkpoint into a model in the current mesh, whatever mesh it was written from.

    Every tensor is checked against the table before the first is read. Host memory holds one leaf of one layer at a
    time, and of it what this process's devices hold; a device holds the model, stacked leaves being filled in place.

    Args:
      directory: a checkpoint, in Hugging Face layout or in Orbax format.
      config: of the model.
      dtype: see `resolve_dtype`.
      stacked: the layout of the layers (see `layers`).
      progress: called with the bytes read so far and in all, after each leaf.

    Raises:
      CheckpointError: files are missing, truncated or corrupt, or tensors do not fit the configuration.
    """
    files = open_weights(directory)
    leaves = leaves_of(files, config)
    dtype = resolve_dtype(dtype, files)
    abstract, structure = abstract_leaves(config, dtype, stacked=stacked)
    arrays: dict[str, Any] = dict(abstract)
    done, released, total = 0, 0, sum(info.nbytes for info in leaves.infos.values())
    for path, info in leaves.infos.items():
        target, layer = _stacked_path(path) if stacked else (path, None)
        spec = abstract[target].sharding.spec
        if layer is None:
            arrays[target] = array_of(leaves, path, spec, dtype)
        else:
            array = array_of(leaves, path, PartitionSpec(*spec[1:]), dtype)
            arrays[target] = _put_layer(arrays[target], array, layer)
        done += info.nbytes
        if done - released > _RELEASE_BYTES:
            jax.block_until_ready(arrays[target])
            leaves.release()
            released = done
        if progress is not None:
            progress(done, total)
    return jax.tree.unflatten(structure, [arrays[path] for path in abstract])


def abstract_leaves(config: Glm4vConfig, dtype: DTypeLike, *, stacked: bool) -> tuple[dict[str, Any], Any]:
    """Path -> shape, dtype and sharding in the current mesh, in the order of `jax.tree.leaves`; and the structure."""

    def make() -> Glm4v:
        model = Glm4v.init(config, dtype=dtype)
        return model if stacked else model.unstacked()

    abstract = jax.eval_shape(make)
    leaves, structure = jax.tree.flatten(abstract)
    return dict(zip(leaf_paths(abstract), leaves, strict=True)), structure


def leaf_paths(model: Glm4v) -> Iterator[str]:
    """The leaves' paths, in the order of `jax.tree.leaves`: "language_model.layers.stacked.mlp.down.kernel"."""
    for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]:
        yield ".".join(str(key.name) for key in path if getattr(key, "name", "value") != "value")


def _stacked_path(path: str) -> tuple[str, int | None]:
    """The path that a layer's leaf has where layers are stacked, and the layer."""
    if (found := _LAYER.match(path)) is None:
        return path, None
    return f"{found[1]}stacked.{path[found.end() :]}", int(found[2])


def _put_layer(stacked: Any, leaf: Array, layer: int) -> Array:
    """Put a layer's leaf into its place of a stacked leaf, which is still abstract if this is the first to arrive."""
    if isinstance(stacked, jax.ShapeDtypeStruct):
        stacked = jnp.zeros(stacked.shape, stacked.dtype, out_sharding=stacked.sharding)
    return _update(stacked, leaf, np.int32(layer))


@functools.partial(jax.jit, donate_argnums=0)
def _update(stacked: Array, leaf: Array, layer: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, leaf, layer, 0)
