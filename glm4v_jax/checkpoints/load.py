"""Load a checkpoint in either format: the model's leaves on their devices, one at a time."""

import collections
import concurrent.futures
import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.adapter import load_adapter
from glm4v_jax.checkpoints.adapter_files import read_adapter
from glm4v_jax.checkpoints.arrays import array_of, int8_of
from glm4v_jax.checkpoints.leaves import TensorLeaves, read_order
from glm4v_jax.checkpoints.orbax_read import leaves_of, open_weights
from glm4v_jax.checkpoints.plan import abstract_leaves, check_fits, needed_bytes
from glm4v_jax.checkpoints.safetensors import TensorInfo
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import stored_quantization
from glm4v_jax.devices.hardware import check_32_bits
from glm4v_jax.devices.memory import cgroup_memory, host_memory
from glm4v_jax.devices.mesh import (
    REPLICATED,
    Rules,
    current_mesh,
    current_rules,
    explicit,
    placed_on,
    platform,
    use_mesh,
)
from glm4v_jax.devices.mesh import spec as partition
from glm4v_jax.errors import ConfigError, naming
from glm4v_jax.files import doubt_of_base
from glm4v_jax.model import cpu_matmul
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import in_order
from glm4v_jax.model.lora import fix_magnitudes
from glm4v_jax.model.params import default_dtype, kernels
from glm4v_jax.model.quantize import (
    QuantConfig,
    check_finite,
    for_inference,
    is_packed,
    is_quantized,
    is_scale,
    quantize_embedding,
    quantize_kernel,
    quantized_leaves,
    scale_axes,
    scale_path,
)
from glm4v_jax.model.rules import rules_for
from glm4v_jax.model.runtime import Runtime

S = TypeVar("S")
T = TypeVar("T")

_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}

INT4_QUALITY = (
    "int4 by rounding costs quality: on the tiny model 98.8% of tokens are those of float32, of int8 99.8%; better are "
    "int8, and checkpoints of compressed-tensors that AWQ or GPTQ quantised"
)
"""The warning beside `--quantize int4`, with the figures that `bench.quant_quality` measured."""

# So many leaves are read ahead: on a CPU, which keeps what is read, more of them, as threads wait for the disk.
_AHEAD = {True: 4, False: 2}

# Pages of files that have been read count as this process's memory; they are given back this often.
_RELEASE_BYTES = 512 << 20


def resolve_dtype(dtype: Any, files: Mapping[str, TensorInfo] | None = None) -> np.dtype:
    """Return the dtype for None (this machine's default), "auto" (the checkpoint's), a name, or what NumPy takes.

    >>> resolve_dtype("bf16")
    dtype(bfloat16)

    Raises:
      ConfigError: it is not float32, bfloat16 or float16, or "auto" without a checkpoint.
    """
    if dtype is None:
        dtype = default_dtype()
    elif isinstance(dtype, str) and dtype == "auto" and files is not None:
        dtype = next(info.dtype for info in files.values() if info.dtype.name in hf_mapping.DTYPES)
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type | np.dtype) else jnp.dtype(dtype).name
    name = _ALIASES.get(name, name)
    if name not in hf_mapping.DTYPES:
        auto = "" if files is None else ", 'auto'"
        raise ConfigError(f"dtype: found {dtype!r}; expected None{auto} or one of {', '.join(hf_mapping.DTYPES)}")
    return jnp.dtype(name)


def load_runtime(
    directory: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    stacked: bool | None = None,
    quantize: QuantConfig | str | None = None,
    adapter: str | Path | None = None,
    reserve: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Runtime:
    """Load a checkpoint, in Hugging Face layout or in Orbax format, the latter from whatever mesh it was saved on.

    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> load_runtime(TINY_CHECKPOINT, dtype="float32").config.text_config.hidden_size
    128

    Args:
      directory: config.json, safetensors with their index if there are several, and generation_config.json; or what
        `glm4v convert to-orbax` makes; or the name of a model in the local Hugging Face cache. Nothing is downloaded.
      dtype: float32, bfloat16 or float16; "auto" for the checkpoint's; by default float32 on a CPU, else bfloat16.
      mesh: where the model lives (`devices.mesh.make_mesh`), its axes Explicit or Auto; one device by default.
      rules: by which the weights are sharded; by default the current ones, or `rules_for` where the mesh does not have
        their axes. Programs on Auto axes have none: they are partitioned as their weights are.
      stacked: layout of the layers (see `model.layers`); by default one by one on a CPU, stacked elsewhere.
      quantize: keep all that is large as "int8", or the decoder's kernels as "int4"; a `QuantConfig` says which, and
        how. What a checkpoint has in integers stays as it is, and only the same scheme is accepted for the rest.
      adapter: directory of an adapter in PEFT's format, which is applied beside the weights; see `load_adapter`.
      reserve: bytes that a device needs besides the weights, as for caches.
      progress: called with bytes read and bytes in all, after each leaf.

    Raises:
      CheckpointError: no such checkpoint, or its files or tensors are damaged or do not fit its configuration; or there
        is something wrong with the adapter.
      ConfigError: its configuration is not a GLM-4.1V's, or `quantize` cannot be done.
      MemoryShortageError: it does not fit into memory; nothing has been read.
    """
    config, generation_config = Glm4vConfig.from_pretrained(directory), GenerationConfig.from_pretrained(directory)
    mesh = current_mesh() if mesh is None else mesh
    if rules is None:
        current = current_rules()
        rules = current if set(current.axes) <= set(mesh.axis_names) else rules_for(config, mesh)
    with use_mesh(explicit(mesh), rules) as read_on:
        if stacked is None:
            stacked = platform() != "cpu"
        outputs_first = platform() == "tpu"
        if (stored := stored_quantization(directory)) is not None:
            with naming(directory, ConfigError):
                for_inference(stored.dtype)  # which not every platform has
        if adapter is not None:
            read_adapter(adapter, config)  # an adapter that does not fit shows before the weights are read
        module = load_model(
            directory, config, dtype=dtype, stacked=stacked, outputs_first=outputs_first,
            quantize=for_inference(quantize), reserve=reserve, progress=progress,
        )  # fmt: skip
        if adapter is not None:
            module = fix_magnitudes(load_adapter(module, adapter))
        with use_mesh(mesh, rules if mesh == read_on else REPLICATED):
            runtime = Runtime.of(placed_on(module, mesh), generation_config=generation_config)
        for note in _doubts(directory, adapter, runtime):
            warnings.warn(note, stacklevel=3)
        for note in _cautions(module, runtime.dtype, None if stored else for_inference(quantize)):
            warnings.warn(note, stacklevel=3)
    return runtime


def _doubts(directory: str | Path, adapter: str | Path | None, runtime: Runtime) -> Iterator[str]:
    """What files that can be loaded say of each other all the same, as those of several models do."""
    if adapter is not None and (note := doubt_of_base(adapter, directory)) is not None:
        yield note
    ends, size = runtime.generation_config.eos_token_id, runtime.config.text_config.vocab_size
    if ends and min(ends) >= size:
        said = f"{directory}: eos_token_id: found {list(ends)}; expected ids below {size}, the size of the vocabulary"
        yield f"{said}: no answer will end by itself"


def _cautions(module: Glm4v, dtype: np.dtype, quantize: QuantConfig | None) -> Iterator[str]:
    """What a user should know of a model in these numbers; without `quantize` also of one that others quantised."""
    if dtype == jnp.float16:
        yield "float16 overflows in GLM-4 models of this size; prefer bfloat16 or float32"
    if quantize is not None and quantize.dtype == "int4":
        yield INT4_QUALITY
    if platform() == "cpu" and not cpu_matmul.FEW_TOKENS and (is_quantized(module) or dtype == jnp.bfloat16):
        yield (
            f"jax {jax.__version__}: weights in bfloat16, int8 and int4 are slower on a CPU than with jax 0.12 or "
            "newer, which needs Python 3.12"
        )


def load_model(
    directory: str | Path,
    config: Glm4vConfig,
    *,
    dtype: Any = None,
    stacked: bool = True,
    outputs_first: bool = False,
    quantize: QuantConfig | None = None,
    reserve: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Glm4v:
    """Read a checkpoint into a model in the current mesh, whatever mesh it was written from.

    Every tensor is checked against the table before the first is read. Host memory holds this process's shards of a few
    leaves of a layer at a time, of small ones those of all layers; a device holds its shards of the model, and large
    stacked leaves are filled in place.

    Args:
      directory: a checkpoint, in Hugging Face layout or in Orbax format.
      config: of the model.
      dtype: see `resolve_dtype`.
      stacked: the layout of the layers (see `layers`).
      outputs_first: the order of kernels (see `kernel_order`).
      quantize: the kernels to quantise, one after the other: only one at a time exists in floats. What the checkpoint
        has in integers is read as it is.
      reserve: bytes that a device needs besides the weights.
      progress: called with the bytes read so far and in all, after each leaf.

    Raises:
      CheckpointError: files are missing, truncated or corrupt, tensors do not fit the configuration, or numbers to
        quantise are not finite.
      ConfigError: `quantize` fits no linear layer, does not divide by the mesh, or is another scheme than that of the
        checkpoint's integers; or JAX has integers of 64 bits.
      MemoryShortageError: see `check_fits`.
    """
    check_32_bits()
    files = open_weights(directory)
    leaves = leaves_of(files, config)
    dtype = resolve_dtype(dtype, files)
    abstract, structure = abstract_leaves(
        config, dtype, stacked=stacked, outputs_first=outputs_first, quantize=quantize, leaves=leaves
    )

    stored = leaves.stored

    def instead() -> dict[str, int]:
        ways: dict[str, tuple[Any, QuantConfig | None]] = {}
        if dtype == jnp.float32:
            ways["--dtype bfloat16"] = jnp.bfloat16, quantize
        if quantize is None:
            scheme = "int8" if stored is None else f"int{stored.bits}"
            if (scheme, platform()) != ("int4", "tpu"):  # which is refused
                ways[f"--quantize {scheme}"] = dtype, for_inference(scheme)
        found = {}
        for option, (floats, scheme_of_kernels) in ways.items():
            others, _ = abstract_leaves(config, floats, stacked=stacked, quantize=scheme_of_kernels, leaves=leaves)
            found[option] = needed_bytes(others, reserve)
        return found

    numbers = dtype.name if quantize is None else quantize.dtype
    if quantize is None and stored is not None:
        numbers = f"{stored.dtype} and {numbers}"
    needed, total = needed_bytes(abstract, reserve), sum(info.nbytes for info in leaves.infos.values())
    check_fits(needed, f"weights in {numbers}", str(directory), instead)
    if total > _room(needed):
        leaves.bypass_cache()
    linears = kernels(structure.unflatten(list(abstract.values())))
    arrays: dict[str, Any] = dict(abstract)
    done, released = 0, 0

    def spec_of(path: str) -> PartitionSpec:
        if (linear := linears.get(hf_mapping.layerless_path(path))) is not None:
            return partition(*linear.in_axes, *linear.out_axes)
        target, layer = hf_mapping.stacked_path(path) if stacked else (path, None)
        spec = abstract[target].sharding.spec
        return spec if layer is None else PartitionSpec(*spec[1:])

    one_cpu = platform() == "cpu" and jax.sharding.get_mesh().size == 1

    def in_floats(paths: Sequence[str]) -> bool:
        """Whether a leaf is floats on its devices, which quantise it there: only one at a time shall be."""
        target, _ = hf_mapping.stacked_path(paths[0]) if stacked else (paths[0], None)
        if scale_path(target) not in abstract or scale_path(paths[0]) in leaves.infos:
            return False
        on_host = one_cpu and len(paths) == 1 and isinstance(leaves, TensorLeaves)
        return not on_host or abstract[target].dtype != jnp.int8

    def read(paths: Sequence[str]) -> tuple[Array, ...]:
        """A leaf, or all layers of one; and its scale, if it is in integers."""
        path, source = paths[0], paths if len(paths) > 1 else paths[0]
        target, _ = hf_mapping.stacked_path(path) if stacked else (path, None)
        linear = linears.get(hf_mapping.layerless_path(path))
        if scale_path(target) not in abstract:
            return (array_of(leaves, source, spec_of(path), dtype),)
        if in_floats(paths):  # not rounded to `dtype` first
            kernel = array_of(leaves, source, spec_of(path), leaves.infos[path].dtype)
            if linear is None:
                return quantize_embedding(kernel)
            own = QuantConfig("int8") if abstract[target].dtype == jnp.int8 else quantize
            assert own is not None
            return quantize_kernel(kernel, linear.in_axes, linear.out_axes, own)
        if scale_path(path) not in leaves.infos:
            assert isinstance(leaves, TensorLeaves)
            return int8_of(leaves, path, spec_of(path), [1] if linear is None else range(len(linear.in_axes)))
        assert stored is not None and linear is not None
        scale = leaves.infos[scale_path(path)]
        scales = array_of(leaves, scale_path(path), partition(*scale_axes(linear, len(scale.shape))), scale.dtype)
        axis = len(linear.in_axes) - 1
        if leaves.has_pairs(path) and is_packed(leaves.infos[path].shape[axis] // scale.shape[axis]):
            return array_of(leaves, path, spec_of(path), np.dtype(np.uint8), pairs_along=axis), scales
        integers = array_of(leaves, path, spec_of(path), np.dtype(np.int8))
        return quantized_leaves(integers, scales, axis, QuantConfig(stored.dtype))

    parts = read_order(leaves.infos, stacked)
    ahead = [paths for paths in parts if not in_floats(paths)]
    with contextlib.closing(_ahead(read, ahead, _AHEAD[platform() == "cpu"])) as found:
        for paths in parts:
            path, *others = paths
            target, layer = hf_mapping.stacked_path(path) if stacked else (path, None)
            linear = linears.get(hf_mapping.layerless_path(path))
            leaf = read(paths) if in_floats(paths) else next(found)
            made = dict(zip((target, scale_path(target)), leaf, strict=False))
            del leaf
            if scale_path(path) in leaves.infos:
                done += leaves.infos[scale_path(path)].nbytes
            for name, array in made.items():
                if linear is not None and array.ndim == len(linear.axes) + bool(others):
                    array = in_order(array, linear, 0, linear.leading)
                arrays[name] = array if layer is None or others else _put_layer(arrays[name], array, layer)
            del made
            for each in (path, *others):
                done += leaves.infos[each].nbytes
                if progress is not None:
                    progress(done, total)
            if done - released > _RELEASE_BYTES:
                jax.block_until_ready(arrays[target])
                leaves.release()
                released = done
    if quantize is not None or stored is not None:
        check_finite({path: array for path, array in arrays.items() if is_scale(path)}, str(directory))
    return jax.tree.unflatten(structure, [arrays[path] for path in abstract])


def _room(needed: int) -> float:
    """Return the bytes of the page cache that this host has room for beside what is to be loaded."""
    memories = [memory.free for memory in (host_memory(), cgroup_memory()) if memory is not None]
    on_host = needed * len(jax.sharding.get_mesh().local_devices) if platform() == "cpu" else 0
    return min(memories, default=math.inf) - on_host


def _ahead(function: Callable[[S], T], items: Iterable[S], count: int = 2) -> Generator[T, None, None]:
    """Call a function that reads with each item, in order, in threads that are this many results ahead.

    An error of the function is raised in the place of its result; no thread outlives the iterator.
    """
    mesh, rules, errors = jax.sharding.get_mesh(), current_rules(), np.geterr()
    pending = collections.deque[concurrent.futures.Future[T]]()

    def call(item: S) -> T:
        with use_mesh(mesh, rules), np.errstate(**errors):  # type: ignore[arg-type]  # a thread inherits none of them
            return function(item)

    with concurrent.futures.ThreadPoolExecutor(count, _READER) as threads:
        try:
            for item in items:
                pending.append(threads.submit(call, item))
                if len(pending) > count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


_READER = "glm4v-read-ahead"
"""How the names of threads that read begin."""


def _put_layer(stacked: Any, leaf: Array, layer: int) -> Array:
    """Write a layer's leaf into a stacked leaf, which is allocated when the first layer arrives."""
    if isinstance(stacked, jax.ShapeDtypeStruct):
        stacked = jnp.zeros(stacked.shape, stacked.dtype, out_sharding=stacked.sharding)
    return _update(stacked, leaf, np.int32(layer))


@functools.partial(jax.jit, donate_argnums=0)
def _update(stacked: Array, leaf: Array, layer: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, leaf, layer, 0)
