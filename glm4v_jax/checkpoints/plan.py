"""What a model will be in memory, before a weight of it is read: its leaves, their bytes, and whether they fit."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.leaves import Leaves
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import StoredQuantization
from glm4v_jax.devices.memory import Memory, check_memory, memory_of
from glm4v_jax.devices.mesh import platform
from glm4v_jax.errors import ConfigError, MemoryShortageError, naming
from glm4v_jax.files import decimal_size
from glm4v_jax.model import cpu_matmul
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import outputs_first as with_outputs_first
from glm4v_jax.model.params import leaf_paths
from glm4v_jax.model.quantize import (
    QuantConfig,
    bits_of,
    is_scale,
    kernel_path,
    quantize_model,
    with_integers,
)


def abstract_leaves(
    config: Glm4vConfig,
    dtype: DTypeLike,
    *,
    stacked: bool,
    outputs_first: bool = False,
    quantize: QuantConfig | None = None,
    leaves: Leaves | None = None,
) -> tuple[dict[str, Any], Any]:
    """Return path -> shape, dtype and sharding in the current mesh, in the order of `jax.tree.leaves`; and the tree.

    `dtype` is that of floats, `stacked` and `outputs_first` are the layouts of layers and kernels, and `leaves` are
    those of the checkpoint to read, if some of its kernels are in integers.

    Raises:
      ConfigError: `quantize` fits no layer, or is another scheme than that of the checkpoint's integers; or groups do
        not divide by the mesh.
    """
    stored = None if leaves is None else leaves.stored
    if quantize is not None:
        check_scheme(quantize.dtype, stored)

    infos = {} if leaves is None or stored is None else leaves.infos
    scaled = {kernel_path(path): info.shape for path, info in infos.items() if is_scale(path)}
    shapes = tuple((path, infos[path].shape, scale) for path, scale in scaled.items())
    make = _maker(
        config, jnp.dtype(dtype), stacked, outputs_first, quantize, None if stored is None else stored.dtype, shapes
    )  # fmt: skip
    abstract = jax.eval_shape(make)
    arrays, structure = jax.tree.flatten(abstract)
    return dict(zip(leaf_paths(abstract), arrays, strict=True)), structure


@functools.lru_cache(maxsize=32)
def _maker(
    config: Glm4vConfig,
    dtype: np.dtype,
    stacked: bool,
    outputs_first: bool,
    quantize: QuantConfig | None,
    stored: Literal["int8", "int4"] | None,
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...],
) -> Callable[[], Glm4v]:
    """A function that makes the model; the same one for the same arguments, so that JAX traces it once for a mesh.

    A training job asks for it several times before it starts, and so does a process that loads a model again.
    `shapes`: path of each kernel in `stored` integers, its shape, and that of its scale; see also `abstract_leaves`.
    """

    def make() -> Glm4v:
        model = Glm4v.zeros(config, dtype)
        if quantize is not None:
            model = quantize_model(model, quantize)
        if stored is not None:
            own = {hf_mapping.layerless_path(path): (kernel, scale) for path, kernel, scale in shapes}
            model = with_integers(model, own, QuantConfig(stored))
        if outputs_first:
            model = with_outputs_first(model)
        return model if stacked else model.unstacked()

    return make


def check_scheme(scheme: str, stored: StoredQuantization | None) -> None:
    """Check that what a checkpoint has in floats may be quantised beside what it has in integers.

    Raises:
      ConfigError: these have another number of bits.
    """
    if stored is not None and scheme != (own := f"int{stored.bits}"):
        raise ConfigError(
            f"quantize: found {scheme!r} for a checkpoint that is quantised ({stored}); expected nothing, or {own!r} "
            "for the rest of its weights"
        )


def needed_bytes(arrays: Mapping[str, Any], reserve: int) -> int:
    """Return the bytes that a device needs: of weights, of the copies that programs make of them, and `reserve`.

    Args:
      arrays: of `abstract_leaves`.
      reserve: bytes for what else a device holds.
    """
    copied = [
        leaf.update(dtype=jnp.float32)
        for path, leaf in arrays.items()
        if platform() == "cpu" and path.endswith(".kernel") and cpu_matmul.is_copied(leaf)
    ]
    return device_bytes([*arrays.values(), *copied]) + reserve


def device_bytes(leaves: Iterable[Any]) -> int:
    """Return the bytes that a device of the mesh holds of arrays, abstract ones included.

    A CPU keeps every integer in bytes of its own (`quantize.bits_of`).
    """
    in_bytes = platform() == "cpu"

    def nbytes(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return (8 * leaf.dtype.itemsize if in_bytes else bits_of(leaf.dtype)) * math.prod(shape) // 8

    return sum(map(nbytes, leaves))


def check_fits(
    nbytes: int, what: str, place: str, instead: Callable[[], Mapping[str, int]], *, mesh_option: str = "--mesh"
) -> None:
    """Check that this process's devices in the current mesh have room for `nbytes` each, which are for `what`.

    `instead` returns options -> bytes that each device would hold with them. MemoryShortageError, whose message starts
    with `place` and has both numbers, and what would fit.
    """
    mesh = jax.sharding.get_mesh()
    is_host = platform() == "cpu"
    shared = len(mesh.local_devices) if is_host else 1  # all devices of a CPU have one memory

    def advice(memory: Memory) -> str:
        fitting = {name: shared * size for name, size in instead().items() if shared * size <= memory.free}
        found = [f"{name} ({decimal_size(size, 1)})" for name, size in fitting.items()]
        if not is_host and memory.free > 0:
            found.append(f"{mesh_option} with at least {mesh.size * -(-nbytes // memory.free)} such devices")
        return f"what fits: {' or '.join(found)}" if found else ""

    with naming(place, MemoryShortageError):
        check_memory(shared * nbytes, what, memory_of(mesh.local_devices), advice)
