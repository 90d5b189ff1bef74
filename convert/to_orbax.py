"""Convert either format to an Orbax checkpoint, group by group, straight to the sharding of a mesh."""

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from convert.casts import check_cast
from convert.hashes import hashing
from convert.source import Summary, check_cast_of
from glm4v_jax.checkpoints import hf_mapping, orbax_write
from glm4v_jax.checkpoints.arrays import array_of
from glm4v_jax.checkpoints.atomic_directory import check_room
from glm4v_jax.checkpoints.hf_write import PYTORCH
from glm4v_jax.checkpoints.leaves import Leaves, in_groups
from glm4v_jax.checkpoints.load import resolve_dtype
from glm4v_jax.checkpoints.orbax_read import OrbaxCheckpoint, Weights, leaves_of, open_weights
from glm4v_jax.checkpoints.plan import abstract_leaves
from glm4v_jax.checkpoints.safetensors import TensorInfo
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import make_mesh, use_mesh
from glm4v_jax.files import asset_bytes, copy_assets, set_dtype

# An upper bound for what an Orbax checkpoint has for each leaf besides its numbers.
_BYTES_BESIDE_A_LEAF = 4096

_TIED = ("lm_head.weight", "language_model.embed_tokens.weight")
_ROWS_COMPARED = 4096


def to_orbax(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    hash_files: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write a checkpoint of either format as an Orbax checkpoint.

    Nothing is written before every tensor has been checked against the table. Host memory holds two groups of leaves,
    or the largest leaf twice. The directory appears under its name when it is complete; until then it is
    `.NAME.unfinished`, which a later run replaces. Where JAX runs in several processes all of them call this, on
    directories that they share, and each reads what its own devices hold.

    Args:
      source: a directory in Hugging Face layout, or an Orbax checkpoint.
      target: the directory to make.
      dtype: float32, bfloat16 or float16 to cast to; every tensor's own by default.
      mesh: whose sharding the checkpoint is written with; by default one device, or with several processes all
        devices along `fsdp`. A checkpoint loads onto any mesh, but reads fastest onto the one it was written with.
      overwrite: replace a checkpoint that is at `target`, once the new one is complete.
      dry_run: check everything and write nothing.
      hash_files: record the SHA-256 of the source's weight files in the checkpoint.
      progress: called with bytes of the source converted so far and in all, after each group.

    Raises:
      CheckpointError: the source is damaged or does not fit its configuration, `dtype` cannot hold its numbers, the
        target is taken, or the disk is full.
      ConfigError: the configuration is not a GLM-4.1V's, or does not divide by the mesh.
    """
    started = time.perf_counter()
    source, target = Path(source), Path(target)
    config = Glm4vConfig.from_pretrained(source)
    files = open_weights(source)
    leaves = leaves_of(files, config)
    check_cast_of(source, leaves.stored, dtype)
    cast = None if dtype is None else resolve_dtype(dtype, files)
    found = {**leaves.infos, **leaves.extras}
    infos = {path: info._replace(dtype=cast or info.dtype) for path, info in found.items()}
    nbytes = sum(info.nbytes for info in infos.values())
    if mesh is None:
        mesh = make_mesh(fsdp=jax.device_count() if jax.process_count() > 1 else 1)
    with use_mesh(mesh):
        abstract, _ = abstract_leaves(config, np.float32, stacked=False, leaves=leaves)
    needed = nbytes + asset_bytes(source) + _BYTES_BESIDE_A_LEAF * len(infos)
    orbax_write.by_first(lambda: check_room(source, target, needed, overwrite=overwrite, dry_run=dry_run))
    names, notes = _names(files, config)
    read = 0

    def count(number: int) -> None:
        nonlocal read
        read += number

    if not dry_run:
        paths = [file.path for file in files.files] if hash_files and not isinstance(files, OrbaxCheckpoint) else []
        with (
            hashing(paths) as hashes,
            orbax_write.new_checkpoint(target, overwrite=overwrite) as (writer, assets),
        ):
            if jax.process_index() == 0:
                copy_assets(source, assets)
                if cast is not None:
                    set_dtype(assets / "config.json", cast.name)
            done, total = 0, sum(info.nbytes for info in found.values())
            groups = list(in_groups(infos, orbax_write.GROUP_BYTES))
            for group in groups:
                large = sum(infos[path].nbytes for path in group) > orbax_write.GROUP_BYTES
                if large:
                    writer.wait()  # so that memory does not hold another group besides this large leaf
                with use_mesh(mesh):
                    arrays = _read(leaves, infos, abstract, group, count)
                    if cast is not None:
                        _check_casts(files, config, found, arrays)
                last = group is groups[-1]
                writer.write(arrays, _provenance(files, names, cast, hashes) if last else None)
                if large:
                    writer.wait()
                del arrays
                release_memory()
                done += sum(found[path].nbytes for path in group)
                if progress is not None:
                    progress(done, total)
    seconds = time.perf_counter() - started
    return Summary(source, target, len(names), nbytes, read, 0, seconds, dry_run, tuple(notes))


def release_memory() -> None:
    """Give memory that large arrays no longer use back to the system.

    JAX lets go of memory that it has taken over from NumPy when Python collects garbage, or when it makes its next
    array. The GNU allocator then keeps what came in smaller blocks, more with every thread that frees some: 1.6 GiB
    after a dozen groups of 256 MiB. Other allocators are left alone.
    """
    gc.collect(0)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _read(
    leaves: Leaves,
    infos: Mapping[str, TensorInfo],
    abstract: Mapping[str, Any],
    group: list[str],
    count: Callable[[int], None],
) -> dict[str, Array]:
    """Read a group of leaves onto their devices, and give back the host memory that this took."""
    arrays = {}
    for path in group:
        with np.errstate(over="ignore"):  # `_check_casts` reports it
            # Of an extra layer nothing says how it would be sharded.
            spec = abstract[path].sharding.spec if path in abstract else PartitionSpec()
            arrays[path] = array_of(leaves, path, spec, infos[path].dtype, count=count)
        jax.block_until_ready(arrays[path])
    leaves.release()
    return arrays


def _check_casts(
    files: Weights, config: Glm4vConfig, found: Mapping[str, TensorInfo], arrays: Mapping[str, Array]
) -> None:
    """Refuse leaves with numbers that a cast made infinite; only tensors of leaves with infinities are read again.

    Raises:
      CheckpointError: in all processes; the message names the tensor.
    """
    suspects = {path for path, array in arrays.items() if array.dtype != found[path].dtype and not _is_finite(array)}
    if not suspects:
        return
    parts = hf_mapping.wanted(config)
    for name in files:
        key = hf_mapping.canonical(name)
        path = parts[key].path if key in parts else f"{hf_mapping.EXTRA}{key}"
        if path in suspects:
            check_cast(files.read(name), arrays[path].dtype, name)


@jax.jit
def _is_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


def _names(files: Weights, config: Glm4vConfig) -> tuple[list[str], list[str]]:
    """The tensors that the checkpoint will have, and notes about those that are skipped."""
    head = next((name for name in files if hf_mapping.canonical(name) == _TIED[0]), None)
    if not config.text_config.tie_word_embeddings or head is None:
        return list(files), []
    embedding = next(name for name in files if hf_mapping.canonical(name) == _TIED[1])
    if files[head][:2] == files[embedding][:2] and _equal(files, head, embedding):
        return list(files), []
    note = f"{head} is skipped: it differs from {embedding}, to which the configuration ties it"
    return [name for name in files if name != head], [note]


def _equal(files: Weights, one: str, other: str) -> bool:
    """Return whether two tensors of one shape have the same bits."""
    for start in range(0, files[one].shape[0], _ROWS_COMPARED):
        rows = slice(start, start + _ROWS_COMPARED)
        if files.read(one, rows).tobytes() != files.read(other, rows).tobytes():
            return False
    files.release()
    return True


def _provenance(
    files: Weights, names: list[str], cast: np.dtype | None, hashes: Callable[[], dict[str, str]]
) -> dict[str, Any]:
    """Describe the source: names, dtypes, shards and metadata, enough to write the same safetensors again."""
    if isinstance(files, OrbaxCheckpoint):
        listed = files.provenance.get("source", {}).get("files", [])
    else:
        digests = hashes()
        listed = [
            {"name": file.path.name, "bytes": file.path.stat().st_size, "sha256": digests.get(file.path.name)}
            for file in files.files
        ]
    return orbax_write.provenance(
        source={"directory": files.directory.absolute().name, "files": listed},
        metadata=PYTORCH | files.metadata,
        cast=None if cast is None else cast.name,
        tensors=[[name, (cast or files[name].dtype).name, files[name].file.name] for name in names],
    )
