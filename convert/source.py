"""What the conversions share: the source's shards, whether it can be cast, and the figures of a conversion."""

import dataclasses
from pathlib import Path

from glm4v_jax.checkpoints.hf_write import Plan, shard_name
from glm4v_jax.checkpoints.orbax_read import Weights
from glm4v_jax.config.quantization import StoredQuantization
from glm4v_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of one conversion.

    Attributes:
      source, target: the directories.
      tensors: how many there are, in Hugging Face's terms.
      nbytes: bytes of the tensors as written, by all processes together.
      bytes_read: bytes of tensors that this process read (not counting the hashes of whole files).
      files: number of weight files of the target; 0 in Orbax format.
      seconds: wall clock.
      dry_run: nothing was written.
      notes: what a person should know besides, a sentence each.
    """

    source: Path
    target: Path
    tensors: int
    nbytes: int
    bytes_read: int
    files: int
    seconds: float
    dry_run: bool
    notes: tuple[str, ...] = ()


def check_cast_of(source: Path, stored: StoredQuantization | None, dtype: object) -> None:
    """Check that a source to cast has floats; ConfigError if it is quantised."""
    if stored is not None and dtype is not None:
        raise ConfigError(f"--dtype: found {dtype} for {source}, which is quantised ({stored}); expected nothing")


def shards_of(files: Weights) -> Plan:
    """Return file name -> tensors, as they are or were distributed; the files are renumbered in their order.

    A single file where the checkpoint never was in safetensors.
    """
    shards: dict[str, list[str]] = {}
    for name, info in files.items():
        shards.setdefault(info.file.name, []).append(name)
    return {shard_name(i, len(shards)): shards[file] for i, file in enumerate(sorted(shards))}
