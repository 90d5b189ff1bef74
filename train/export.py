"""Export the result of a job: an adapter, a checkpoint, or an adapter merged into its base.

What is written has a temporary name until it has been loaded again, and its logits are those of the trained model.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.adapter import load_adapter, save_adapter
from glm4v_jax.checkpoints.adapter_files import read_adapter
from glm4v_jax.checkpoints.arrays import array_of
from glm4v_jax.checkpoints.atomic_directory import check_room, move_up, new_directory, place_of
from glm4v_jax.checkpoints.hf_write import save_pretrained, total_bytes
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.checkpoints.merge_adapter import extra_tensors, merged_tensors, write_merged
from glm4v_jax.checkpoints.orbax_read import leaves_of, open_weights
from glm4v_jax.checkpoints.orbax_write import by_first
from glm4v_jax.checkpoints.safetensors import LazyTensor
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.distributed import is_first
from glm4v_jax.files import copy_assets
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.lora import drop_lora, leaf_prefixes
from glm4v_jax.model.params import default_dtype, leaf_paths
from train.verify_export import Verified, compare, logits_of, prompt, tolerance_of

_CONTENT = "content"


def check_result(base: str | Path, target: Path, *, is_whole: bool) -> int:
    """Check that a result can be written; all processes call this.

    Returns the bytes of a whole model, which are those of its base; 0 for an adapter. CheckpointError if something else
    is there, or too little disk space is left.
    """
    needed = 0
    if is_whole:
        needed = sum(info.nbytes for info in open_weights(base).values())
    by_first(lambda: check_room(Path(base), target, needed, overwrite=True))
    return needed


def export_adapter(model: Glm4v, base: str | Path, target: Path) -> Verified:
    """Write a trained adapter for PEFT, and verify it, loaded again beside the same base.

    All processes call this, in the model's mesh; the first one writes.

    Args:
      model: its base in the compute dtype or quantised, its adapter in float32.
      base: the checkpoint that the adapter belongs to, which has the tokenizer for the prompt.
      target: output directory; an adapter in it is replaced.

    Raises:
      CheckpointError: the result does not compute the same, or something else is in the directory.
      OSError: the disk refuses.
    """
    by_first(lambda: check_room(Path(base), target, 0, overwrite=True))
    dtype = model.language_model.norm.scale[...].dtype
    batch, plain = prompt(base, model.config), _base_of(model, base)
    trained, before = logits_of(model, batch), logits_of(plain, batch)
    with _new(target, overwrite=True) as directory:
        save_adapter(model, directory, str(base))
        by_first(_wait)
        found = logits_of(load_adapter(plain, directory), batch)
        tolerance = tolerance_of(model.config, "float32", dtype)
        return compare(found, trained, tolerance=tolerance, where=target, before=before)


def _base_of(model: Glm4v, base: str | Path) -> Glm4v:
    """The model without its adapter, with the modules of its base where the adapter has whole ones."""
    plain = drop_lora(model)
    if not model.modules_to_save:
        return plain
    leaves, prefixes = leaves_of(open_weights(base), model.config), leaf_prefixes(model.modules_to_save)

    def own(path: str, leaf: jax.Array) -> jax.Array:
        is_saved = path.startswith(prefixes)
        return array_of(leaves, path, jax.typeof(leaf).sharding.spec, leaf.dtype) if is_saved else leaf

    found, structure = jax.tree.flatten(plain)
    return structure.unflatten(own(*one) for one in zip(leaf_paths(plain), found, strict=True))


def export_model(exported: Glm4v, dtype: DTypeLike, base: str | Path, target: Path) -> Verified:
    """Write a trained model in Hugging Face layout, with all other files of its base.

    Layers of the base that only predict further tokens are copied, as nothing here runs them. All processes call this,
    in the models' mesh; the first one writes. To verify, devices hold the model twice.

    Args:
      exported: the model in the dtypes to write, so that both sides of the comparison are rounded alike.
      dtype: compute dtype of the comparison.
      base: the checkpoint that it was trained from.
      target: output directory; a checkpoint in it is replaced.

    Raises:
      CheckpointError: the result does not compute the same, something else is in the directory, or the disk is full.
      OSError: the disk refuses.
    """
    by_first(lambda: check_room(Path(base), target, 0, overwrite=True))
    config = exported.config
    batch = prompt(base, config)
    expected = logits_of(_cast(exported, jnp.dtype(dtype)), batch)
    with _new(target, overwrite=True) as directory:
        generation, extras = GenerationConfig.from_pretrained(base), extra_tensors(base, config)
        save_pretrained(exported, generation, directory, extras=extras)
        if is_first():
            copy_assets(base, directory)  # config.json too, with fields that other programs read and this one does not
        by_first(_wait)
        found = logits_of(load_model(directory, config, dtype=dtype), batch)
        return compare(found, expected, tolerance=tolerance_of(config, "float32", dtype), where=target)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(model: Glm4v, dtype: np.dtype) -> Glm4v:
    """Cast leaves by one program, not one for each shape; an equal model is not traced again."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model)


def export_merged(
    base: str | Path,
    adapter: str | Path,
    target: Path,
    *,
    written: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    max_shard_size: int | str = "5GB",
) -> Verified | None:
    """Merge an adapter into the weights of its base, in floats, and write a checkpoint in Hugging Face layout.

    From files to files, tensor by tensor; only the verification needs devices, onto which the base with its adapter,
    and then the result, are loaded in the current mesh. All processes call this; the first one writes.

    Args:
      base: a checkpoint in either format; if the adapter was trained beside a quantised base, the unquantised one.
      adapter: a directory of `adapter.save_adapter`, or of PEFT.
      target: output directory; it appears when it is complete and verified.
      written: dtype of the result, as a name; by default that of each tensor of the base.
      overwrite: replace a checkpoint that is there.
      verify: load the result and compare its logits with those of the base with its adapter.
      max_shard_size: of one file, as "5GB", "200MiB" or a number of bytes.

    Raises:
      CheckpointError: base and adapter do not fit or are damaged, the result does not compute the same, the output
        directory is not empty, or the disk is full.
      OSError: the disk refuses.
    """
    tensors = merged_tensors(base, adapter, written)
    by_first(lambda: check_room(Path(base), target, total_bytes(tensors), overwrite=overwrite))
    with _new(target, overwrite=overwrite) as directory:
        by_first(lambda: write_merged(base, tensors, directory, max_shard_size=max_shard_size))
        if not verify:
            return None
        return _verified(base, adapter, directory, tensors, target)


def _verified(
    base: str | Path,
    adapter: str | Path,
    directory: Path,
    tensors: Mapping[str, LazyTensor],
    target: Path,
) -> Verified:
    config, dtype = Glm4vConfig.from_pretrained(base), default_dtype()
    batch = prompt(base, config)
    model = load_model(base, config, dtype=dtype)
    before = logits_of(model, batch)
    trained = logits_of(load_adapter(model, adapter), batch)
    del model
    found = logits_of(load_model(directory, config, dtype=dtype), batch)
    pairs = read_adapter(adapter, config).pairs
    changed = (tensor.dtype for name, tensor in tensors.items() if hf_mapping.canonical(name) in pairs)
    written = next(changed, dtype)
    return compare(found, trained, tolerance=tolerance_of(config, written, dtype), where=target, before=before)


@contextlib.contextmanager
def _new(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to fill and verify, whose content is moved to `target` when the body is done.

    The first process creates and moves it; the others get its name, or its error.
    """
    with contextlib.ExitStack() as stack:
        name = by_first(lambda: _make(stack.enter_context(new_directory(target, overwrite=overwrite))))
        content = place_of(target).parent / name / _CONTENT
        yield content
        by_first(lambda: move_up(content))
        by_first(stack.close)


def _make(aside: Path) -> str:
    # A checkpoint does not load from a directory whose own name says that it is unfinished.
    (aside / _CONTENT).mkdir()
    return aside.name


def _wait() -> None:
    """Nothing: `by_first` makes the other processes wait until the first one has written."""
