"""One way to read either format, in Hugging Face's terms, and to learn what its safetensors were like."""

from typing import TypeAlias

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.hf_shards import PYTORCH, shard_name
from glm4v_jax.checkpoints.orbax_read import OrbaxCheckpoint, open_weights
from glm4v_jax.checkpoints.safetensors import CheckpointFiles
from glm4v_jax.config.model import Glm4vConfig

Reader: TypeAlias = CheckpointFiles | OrbaxCheckpoint

__all__ = ["Reader", "check_tensors", "metadata_of", "open_weights", "shards_of"]


def shards_of(files: Reader) -> dict[str, list[str]]:
    """File name -> tensors, as they are or were distributed; the files are numbered anew, in their order.

    All in one where the checkpoint never was in safetensors.
    """
    where = {name: info.file.name for name, info in files.items()}
    if isinstance(files, OrbaxCheckpoint):
        where = {name: file for name, _, file in files.provenance.get("tensors", [])} or dict.fromkeys(files, "")
    shards = [[name for name in files if where[name] == file] for file in sorted(set(where.values()))]
    return {shard_name(i, len(shards)): names for i, names in enumerate(shards)}


def metadata_of(files: Reader) -> dict[str, str]:
    """What the safetensors say of themselves; transformers wants a "format"."""
    if isinstance(files, OrbaxCheckpoint):
        return PYTORCH | dict(files.provenance.get("metadata", {}))
    merged = dict(PYTORCH)
    for file in files.files:
        merged |= file.metadata
    return merged


def check_tensors(files: Reader, config: Glm4vConfig) -> list[hf_mapping.Source]:
    """What every tensor is, by the table.

    Raises:
      CheckpointError: tensors are missing, unexpected, doubled, misshapen or of a wrong dtype; all of them are listed.
    """
    shapes = {name: info.shape for name, info in files.items()}
    dtypes = {name: info.dtype for name, info in files.items()}
    places = {name: info.file.name for name, info in files.items()}
    return hf_mapping.match(config, shapes, str(files.directory), dtypes, places)
