"""Either format -> an Orbax checkpoint, group by group, straight to the sharding of a mesh."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from convert import memory
from convert.casts import check_cast
from convert.hashes import Hashes, hashing
from convert.source import Reader, metadata_of
from convert.summary import Summary
from glm4v_jax.checkpoints import hf_mapping, orbax_write
from glm4v_jax.checkpoints.atomic_directory import check_room
from glm4v_jax.checkpoints.leaves import LeafInfo, Leaves, array_of, in_groups
from glm4v_jax.checkpoints.load import abstract_leaves, resolve_dtype
from glm4v_jax.checkpoints.orbax_read import OrbaxCheckpoint, leaves_of, open_weights
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import make_mesh, use_mesh
from glm4v_jax.files import asset_files, assets_directory, copy_assets, say_dtype

# What a checkpoint has besides numbers is small beside them, and never larger than this for each leaf.
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
    or one of the two largest leaves twice. The directory appears under its name when it is complete; until then it is
    `.NAME.unfinished`, which a later run replaces. Where JAX runs in several processes all of them call this, on
    directories that they share, and each reads what its own devices hold.

    Args:
      source: a directory in Hugging Face layout, or an Orbax checkpoint.
      target: the directory to make.
      dtype: float32, bfloat16 or float16 to cast to; every tensor's own by default.
      mesh: whose sharding the checkpoint is written with; by default one device, or with several processes all
        devices along `fsdp`. A checkpoint loads onto any mesh, but reads fastest onto the one it was written with.
      overwrite: replace what is at `target`, once the new checkpoint is complete.
      dry_run: check everything and write nothing.
      hash_files: note the SHA-256 of the source's weight files in the checkpoint.
      progress: called with bytes of the source converted so far and in all, after each group.

    Raises:
      CheckpointError: the source is damaged or does not fit its configuration, `dtype` cannot hold its numbers, the
        target is taken, or the disk is full.
      ConfigError: the configuration is not a GLM-4.1V's, or does not divide by the mesh.
    """
    started = time.perf_counter()
    source, target = Path(source), Path(target)
    files = open_weights(source)
    config = Glm4vConfig.from_pretrained(source)
    leaves = leaves_of(files, config)
    cast = None if dtype is None else resolve_dtype(dtype, files)
    infos = {path: _as(info, cast) for path, info in leaves.infos.items()}
    nbytes = sum(info.nbytes for info in infos.values())
    if mesh is None:
        mesh = make_mesh(fsdp=jax.device_count() if jax.process_count() > 1 else 1)
    with use_mesh(mesh):
        abstract, _ = abstract_leaves(config, np.float32, stacked=False)
    beside = assets_directory(source)
    needed = nbytes + sum((beside / path).stat().st_size for path in asset_files(source))
    needed += _BYTES_BESIDE_A_LEAF * len(infos)
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
                    say_dtype(assets / "config.json", cast.name)
            done, total = 0, sum(info.nbytes for info in leaves.infos.values())
            groups = list(in_groups(infos, orbax_write.GROUP_BYTES))
            for group in groups:
                large = sum(infos[path].nbytes for path in group) > orbax_write.GROUP_BYTES
                if large:
                    writer.wait()  # not this large leaf, and another group besides
                with use_mesh(mesh):
                    arrays = _read(leaves, infos, abstract, group, count)
                    if cast is not None:
                        _check_casts(files, config, leaves, arrays)
                last = group is groups[-1]
                writer.write(arrays, _provenance(files, names, cast, hashes) if last else None)
                if large:
                    writer.wait()
                del arrays
                memory.release()
                done += sum(leaves.infos[path].nbytes for path in group)
                if progress is not None:
                    progress(done, total)
    seconds = time.perf_counter() - started
    return Summary(source, target, len(names), nbytes, read, 0, seconds, dry_run, tuple(notes))


def _as(info: LeafInfo, cast: np.dtype | None) -> LeafInfo:
    dtype = info.dtype if cast is None else cast
    return info._replace(dtype=dtype, nbytes=int(np.prod(info.shape)) * dtype.itemsize)


def _read(
    leaves: Leaves,
    infos: Mapping[str, LeafInfo],
    abstract: Mapping[str, Any],
    group: list[str],
    count: Callable[[int], None],
) -> dict[str, Array]:
    """A group of leaves on their devices; what reading them took of the host's memory is given back."""
    arrays = {}
    for path in group:
        with np.errstate(over="ignore"):  # `_check_casts` has more to say
            arrays[path] = array_of(leaves, path, abstract[path].sharding.spec, infos[path].dtype, count=count)
        jax.block_until_ready(arrays[path])
    leaves.release()
    return arrays


def _check_casts(files: Reader, config: Glm4vConfig, leaves: Leaves, arrays: Mapping[str, Array]) -> None:
    """Refuse leaves with numbers that were finite before they were cast; tensors are read again only on suspicion.

    Raises:
      CheckpointError: in all processes; the message names the tensor.
    """
    suspects = {
        path for path, array in arrays.items() if array.dtype != leaves.infos[path].dtype and not _is_finite(array)
    }
    if not suspects:
        return
    wanted = hf_mapping.wanted(config)
    for name in files:
        rule, layer = wanted.get(hf_mapping.canonical(name), (None, None))
        if rule is not None and (path := rule.path(layer)) in suspects:
            check_cast(files.read(name), arrays[path].dtype, name)


@jax.jit
def _is_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


def _names(files: Reader, config: Glm4vConfig) -> tuple[list[str], list[str]]:
    """The tensors that the checkpoint stands for, and notes about those that it leaves out."""
    head = next((name for name in files if hf_mapping.canonical(name) == _TIED[0]), None)
    if not config.text_config.tie_word_embeddings or head is None:
        return list(files), []
    embedding = next(name for name in files if hf_mapping.canonical(name) == _TIED[1])
    if files[head][:2] == files[embedding][:2] and _equal(files, head, embedding):
        return list(files), []
    note = f"{head} is left out: it differs from {embedding}, to which the configuration ties it"
    return [name for name in files if name != head], [note]


def _equal(files: Reader, one: str, other: str) -> bool:
    """Whether two tensors of one shape have the same bits."""
    for start in range(0, files[one].shape[0], _ROWS_COMPARED):
        rows = slice(start, start + _ROWS_COMPARED)
        if files.read(one, rows).tobytes() != files.read(other, rows).tobytes():
            return False
    files.release()
    return True


def _provenance(files: Reader, names: list[str], cast: np.dtype | None, hashes: Hashes) -> dict[str, Any]:
    """What the checkpoint tells of its source: enough to make it again, names, dtypes, shards and all."""
    if isinstance(files, OrbaxCheckpoint):
        shards = {name: file for name, _, file in files.provenance.get("tensors", [])}
        listed = files.provenance.get("source", {}).get("files", [])
    else:
        shards = {name: files[name].file.name for name in names}
        digests = hashes.result()
        listed = [
            {"name": file.path.name, "bytes": file.path.stat().st_size, "sha256": digests.get(file.path.name)}
            for file in files.files
        ]
    return orbax_write.provenance(
        source={"directory": files.directory.absolute().name, "files": listed},
        metadata=metadata_of(files),
        cast=None if cast is None else cast.name,
        tensors=[[name, (cast or files[name].dtype).name, shards.get(name, "")] for name in names],
    )
