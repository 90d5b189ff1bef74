"""What a conversion did."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of one conversion.

    source, target: the directories.
    tensors: how many there are, in Hugging Face's terms.
    nbytes: bytes of the tensors as written, those of all processes together.
    bytes_read: bytes of tensors that this process read (the hashes of whole files not counted).
    files: how many weight files the target has, or 0 where that has no meaning.
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
