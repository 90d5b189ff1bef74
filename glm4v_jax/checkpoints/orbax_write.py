"""Checkpoints in Orbax format, written group by group, so that no more than a few groups are ever in memory.

A checkpoint appears under its name when it is complete, see `atomic_directory.new_directory`. Where several processes
share a mesh all of them call these functions, and each writes what its devices hold.
"""

import contextlib
import datetime
import importlib.metadata
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from glm4v_jax import files
from glm4v_jax.checkpoints.atomic_directory import check_room, move_up, new_directory, place_of
from glm4v_jax.checkpoints.hf_write import save_config, save_generation_config
from glm4v_jax.checkpoints.leaves import ModelLeaves, in_groups
from glm4v_jax.checkpoints.orbax_read import FORMAT, METADATA_KEY
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.errors import CheckpointError
from glm4v_jax.model.glm4v import Glm4v

GROUP_BYTES = 256 << 20
"""How much is written at a time, while the next group is read."""

# Small, because a process that wants a slice of a leaf reads whole chunks.
_CHUNK_BYTES = 32 << 20
# Devices that hold copies of a leaf write a part each, unless parts are smaller: then one writes all of it. Orbax
# slices on the devices, with programs for each shape and part: hundreds to compile where most leaves are small.
PART_BYTES = 1 << 20
# Small, because data stay in memory until there are enough of them for a file.
_FILE_BYTES = 128 << 20
_ORBAX = "orbax"
# Of removing what threads still write: pause in seconds, attempts, and how many in a row must find nothing.
_PAUSE, _ATTEMPTS, _QUIET = 0.05, 100, 4
_ERRNO = re.compile(r"os_error_code='(\d+)'")


class GroupWriter:
    """Write leaves into an empty directory, one group while the next is read."""

    def __init__(self, directory: Path):
        """Set up; nothing is written yet.

        Args:
          directory: shared by all processes; a checkpoint when `finish` has returned.
        """
        self._directory = directory
        self._response: Any = None
        self._context = ocp.Context()
        # Weights do not compress well, and it takes longer than writing them does.
        self._context.array.saving.use_compression = False
        self._context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
        self._context.array.saving.min_slice_bytes_for_replica_parallel = PART_BYTES
        self._context.array.saving.ocdbt_target_data_file_size = _FILE_BYTES
        # The arrays belong to the writer: nobody changes them.
        self._context.memory.deepcopy_host_arrays = False

    def write(self, leaves: Mapping[str, Array], metadata: Mapping[str, Any] | None = None) -> None:
        """Begin to write leaves; one of the groups brings the `metadata` of the checkpoint.

        Raises:
          OSError: the disk refuses this group or the one before.
        """
        self.wait()
        tree: dict[str, Any] = {}
        for path, leaf in leaves.items():
            *parents, name = path.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = leaf
        custom = None if metadata is None else {METADATA_KEY: metadata}
        with self._context, os_errors(self._directory):
            self._response = ocp.partial.save_async(self._directory / _ORBAX, tree, custom_metadata=custom)

    def wait(self) -> None:
        """Wait until the group that has been begun is on disk; OSError if the disk refuses it."""
        response, self._response = self._response, None
        if response is not None:
            with os_errors(self._directory):
                response.result()

    def finish(self) -> None:
        """Make a checkpoint of the groups.

        Raises:
          CheckpointError: in other processes than the first, which could not do its part.
          OSError: the disk refuses it.
        """
        self.wait()
        with self._context, os_errors(self._directory):
            ocp.partial.finalize(self._directory / _ORBAX)
        by_first(lambda: move_up(self._directory / _ORBAX))

    def abandon(self) -> None:
        """Wait for the group that has been begun, whether it fails or not, and remove everything."""
        with contextlib.suppress(Exception):
            self.wait()
        # Orbax raises when the first of its threads fails, while the others still make files.
        quiet = 0
        for _ in range(_ATTEMPTS):
            left = list(self._directory.glob(f"{_ORBAX}*"))
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            quiet = 0 if left else quiet + 1
            if quiet == _QUIET:
                break
            time.sleep(_PAUSE)


@contextlib.contextmanager
def new_checkpoint(target: Path, *, overwrite: bool) -> Iterator[tuple[GroupWriter, Path]]:
    """Yield a writer, and a folder for assets, of a checkpoint that appears when the body is done, and not before.

    The first process makes, moves and removes directories; the others wait for it.

    Raises:
      CheckpointError: another process is writing it, the disk is full, or the first process could not do its part.
    """
    with without_orbax_log(), contextlib.ExitStack() as stack:
        name = by_first(lambda: stack.enter_context(new_directory(target, overwrite=overwrite)).name)
        directory = place_of(target).parent / name
        writer = GroupWriter(directory)
        try:
            yield writer, directory / files.ASSETS
            writer.finish()
        except BaseException:
            # Before the directory is removed, or a thread that still writes would make it again.
            writer.abandon()
            raise
        by_first(stack.close)


def by_first(action: Callable[[], str | None]) -> str:
    """Run an action in the first process, and return its result in all; if it fails, all fail.

    Raises:
      CheckpointError: in the other processes; in the first, what `action` raises.
    """
    if jax.process_count() == 1:
        return action() or ""
    answer = ""
    failure: BaseException | None = None
    if jax.process_index() == 0:
        try:
            answer = action() or ""
        except BaseException as error:  # an interrupt too: the others are waiting
            failure = error
    content = np.zeros(1 + 4096, np.uint8)
    content[0] = failure is not None
    encoded = (str(failure) or type(failure).__name__ if failure is not None else answer).encode()[: content.size - 1]
    content[1 : 1 + len(encoded)] = np.frombuffer(encoded, np.uint8)
    content = multihost_utils.broadcast_one_to_all(content)
    if failure is not None:
        raise failure
    text = bytes(content[1:]).rstrip(b"\0").decode(errors="replace")
    if content[0]:
        raise CheckpointError(f"in the first process: {text}")
    return text


def provenance(**more: Any) -> dict[str, Any]:
    """Return what every checkpoint says of its origin: format, versions and date; and `more`."""
    names = ("glm4v_jax", "jax", "orbax-checkpoint")
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in names},
        **more,
    }


def save_model(
    model: Glm4v,
    directory: str | Path,
    *,
    assets: str | Path | None = None,
    generation_config: GenerationConfig | None = None,
    overwrite: bool = False,
) -> None:
    """Write a live model, its layers in either layout and on any mesh, as an Orbax checkpoint.

    Args:
      model: on its mesh; `Glm4vForConditionalGeneration.module`, or one that is being trained.
      directory: the checkpoint to make.
      assets: a checkpoint whose tokenizer, processor and generation configuration travel along.
      generation_config: to keep with it instead.
      overwrite: replace the checkpoint that is there, once the new one is complete.

    Raises:
      CheckpointError: the directory is taken, the disk cannot hold the model, or it has an adapter or quantised
        kernels, which a checkpoint cannot hold.
    """
    target = Path(directory)
    leaves = ModelLeaves(model)
    total = sum(info.nbytes for info in leaves.infos.values())
    by_first(lambda: check_room(Path(assets) if assets else None, target, total, overwrite=overwrite))
    with new_checkpoint(target, overwrite=overwrite) as (writer, folder):
        if jax.process_index() == 0:
            if assets is not None:
                files.copy_assets(assets, folder)
            save_config(model.config, folder, leaves.infos)
            if generation_config is not None:
                save_generation_config(generation_config, folder)
        groups = list(in_groups(leaves.infos, GROUP_BYTES))
        for group in groups:
            arrays = {path: leaves.array(path) for path in group}
            writer.write(arrays, provenance() if group is groups[-1] else None)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


@contextlib.contextmanager
def os_errors(directory: Path) -> Iterator[None]:
    """Turn a TensorStore error about what the system refused into Python's `OSError`."""
    try:
        yield
    except Exception as error:
        found = _ERRNO.search(str(error))
        if isinstance(error, OSError) or found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(directory)) from error


@contextlib.contextmanager
def without_orbax_log() -> Iterator[None]:
    """Silence Orbax's threads: each logs the error that ends it, traceback and all, besides raising it."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
