"""The result of a job: an adapter, a checkpoint, or an adapter merged into its base; each is verified by its logits.

What is written has another name until it has been loaded again and said what the trained model says.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from glm4v_jax.checkpoints.adapter import load_adapter, save_adapter
from glm4v_jax.checkpoints.atomic_directory import check_room, move_up, new_directory, place_of
from glm4v_jax.checkpoints.hf_write import save_pretrained, total_bytes
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.checkpoints.merge_adapter import MergedTensor, merged_tensors, write_merged
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.checkpoints.orbax_write import by_first
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.distributed import is_first
from glm4v_jax.files import copy_assets
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.lora import drop_lora
from glm4v_jax.model.params import default_dtype
from train.verify_export import Verified, compare, logits_of, prompt, tolerance_of

_CONTENT = "content"


def check_result(base: str | Path, target: Path, *, is_whole: bool) -> None:
    """Check the place of a result; all processes call this.

    Args:
      base: the checkpoint that is trained.
      target: directory of the result.
      is_whole: whether that is a model as large as its base; an adapter is small.

    Raises:
      CheckpointError: it is taken by something else, or the disk is too full.
    """
    needed = 0
    if is_whole:
        needed = sum(info.nbytes for info in open_weights(base).values())
    by_first(lambda: check_room(Path(base), target, needed, overwrite=True))


def export_adapter(model: Glm4v, base: str | Path, target: Path) -> Verified:
    """Write a trained adapter for PEFT, once it computes the same when it is loaded again beside the same base.

    All processes call this, in the model's mesh; the first one writes.

    Args:
      model: as it computes: its base in the compute dtype or quantised, its adapter in float32.
      base: the checkpoint that the adapter belongs to, which has the tokenizer for the prompt.
      target: directory of the adapter; one that is there is replaced.

    Raises:
      CheckpointError: the adapter does not come back as it was, or the place is taken by something else.
      OSError: the disk refuses.
    """
    by_first(lambda: check_room(Path(base), target, 0, overwrite=True))
    dtype = model.language_model.norm.scale[...].dtype
    batch, plain = prompt(base, model.config), drop_lora(model)
    trained, before = logits_of(model, batch), logits_of(plain, batch)
    with _new(target, overwrite=True) as directory:
        save_adapter(model, directory, str(base))
        by_first(_wait)
        found = logits_of(load_adapter(plain, directory), batch)
        tolerance = tolerance_of(model.config, "float32", dtype)
        return compare(found, trained, tolerance=tolerance, where=target, before=before)


def export_model(exported: Glm4v, dtype: DTypeLike, base: str | Path, target: Path) -> Verified:
    """Write a trained model in Hugging Face layout, with all that its base has beside the weights.

    All processes call this, in the models' mesh; the first one writes. The device holds what is loaded again besides.

    Args:
      exported: the model in the dtypes that it is to be written in: what that rounds is rounded on both sides.
      dtype: that is computed in to verify.
      base: the checkpoint that it was made from.
      target: the directory; a checkpoint that is there is replaced.

    Raises:
      CheckpointError: what was written does not compute the same, the place is taken by something else, or the disk
        is full.
      OSError: the disk refuses.
    """
    by_first(lambda: check_room(Path(base), target, 0, overwrite=True))
    config = exported.config
    batch = prompt(base, config)
    expected = logits_of(jax.tree.map(lambda leaf: leaf.astype(dtype), exported), batch)
    with _new(target, overwrite=True) as directory:
        save_pretrained(exported, GenerationConfig.from_pretrained(base), directory)
        if is_first():
            copy_assets(base, directory)
            config.save_pretrained(directory)
        by_first(_wait)
        found = logits_of(load_model(directory, config, dtype=dtype), batch)
        return compare(found, expected, tolerance=tolerance_of(config, "float32", dtype), where=target)


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

    From files to files, tensor by tensor; only verifying takes a device, on which the base with its adapter, and then
    the result, are loaded in the current mesh. All processes call this; the first one writes.

    Args:
      base: a checkpoint in either format; if the adapter was trained beside a quantised one, that which it was made of.
      adapter: a directory of `adapter.save_adapter`, or of PEFT.
      target: the directory to make; it appears when it is complete and verified.
      written: dtype of the result, as a name; by default every tensor has the base's.
      overwrite: replace a checkpoint that is there.
      verify: load the result and compare its logits with those of the base with its adapter.
      max_shard_size: of one file, as "5GB", "200MiB" or a number of bytes.

    Raises:
      CheckpointError: base and adapter do not fit or are damaged, the result does not compute the same, the target is
        taken, or the disk is full.
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
    tensors: dict[str, MergedTensor],
    target: Path,
) -> Verified:
    config, dtype = Glm4vConfig.from_pretrained(base), default_dtype()
    batch = prompt(base, config)
    model = load_model(base, config, dtype=dtype)
    before = logits_of(model, batch)
    trained = logits_of(load_adapter(model, adapter), batch)
    del model
    found = logits_of(load_model(directory, config, dtype=dtype), batch)
    written = next(tensor.dtype for tensor in tensors.values() if tensor.pair is not None)
    return compare(found, trained, tolerance=tolerance_of(config, written, dtype), where=target, before=before)


@contextlib.contextmanager
def _new(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to fill and to look at, the content of which is at `target` when the body is done, and not before.

    The first process has it in hand; the others go by what it says.
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
    """For the first process to have written."""
