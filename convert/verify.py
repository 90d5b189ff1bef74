"""Compare two checkpoints tensor by tensor, whatever their formats, in bounded memory."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.orbax_read import Weights, open_weights
from glm4v_jax.checkpoints.safetensors import TensorInfo
from glm4v_jax.config.checks import raise_faults
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError

_CHUNK = 1 << 22
"""Numbers compared at a time."""


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """The comparison of one tensor.

    Attributes:
      name: as the table spells it, without "model."
      left, right: dtype and shape, as "bfloat16 [64, 64]"; None where the tensor is missing.
      left_checksum, right_checksum: SHA-256 of dtype, shape and the little-endian bytes in C order, in hexadecimal.
      unequal: how many numbers differ in a bit; None where the shapes differ.
      max_difference: the largest absolute difference; infinite where only one side is NaN; None where shapes differ.
    """

    name: str
    left: str | None
    right: str | None
    left_checksum: str | None
    right_checksum: str | None
    unequal: int | None
    max_difference: float | None

    @property
    def is_equal(self) -> bool:
        """Whether dtype, shape and bits are the same."""
        return self.left == self.right and self.unequal == 0

    def is_close(self, tolerance: float) -> bool:
        """Return whether the shape is the same and no number differs by more than `tolerance`; dtypes may differ."""
        return self.is_equal or (self.max_difference is not None and self.max_difference <= tolerance)


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a comparison.

    Attributes:
      left, right: the directories.
      tensors: one report for each name on either side.
      nbytes: bytes compared, of both sides.
      left_checksum, right_checksum: SHA-256 over the names and checksums of all tensors in order: equal for equal
        checkpoints of any format and shards.
    """

    left: Path
    right: Path
    tensors: tuple[TensorReport, ...]
    nbytes: int
    left_checksum: str
    right_checksum: str

    def different(self, tolerance: float = 0.0) -> tuple[TensorReport, ...]:
        """Return the tensors that differ, or with a tolerance those that differ by more."""
        return tuple(t for t in self.tensors if not (t.is_close(tolerance) if tolerance else t.is_equal))


def verify(left: str | Path, right: str | Path, *, progress: Callable[[int, int], None] | None = None) -> Report:
    """Compare two checkpoints, each a directory with safetensors or an Orbax checkpoint.

    Names are compared without their prefixes. A copy of the embedding that stands for a tied head is skipped, as both
    loaders do. Tensors need not fit the configurations, which are not compared.

    Args:
      left, right: the directories.
      progress: called with bytes compared and bytes in all, of both sides.

    Raises:
      CheckpointError: one of them cannot be read, or has a tensor under two names.
    """
    left, right = Path(left), Path(right)
    ours, theirs = open_weights(left), open_weights(right)
    names, other_names = _canonical(left, ours), _canonical(right, theirs)
    total = sum(ours[name].nbytes for name in names.values()) + sum(theirs[n].nbytes for n in other_names.values())
    done, reports = 0, []
    for key in sorted(names.keys() | other_names.keys()):
        name, other = names.get(key), other_names.get(key)
        reports.append(_compare(key, ours, name, theirs, other))
        done += (0 if name is None else ours[name].nbytes) + (0 if other is None else theirs[other].nbytes)
        if progress is not None:
            progress(done, total)
    checksum = _overall((report.name, report.left_checksum) for report in reports)
    other_checksum = _overall((report.name, report.right_checksum) for report in reports)
    return Report(left, right, tuple(reports), done, checksum, other_checksum)


def _overall(checksums: Iterable[tuple[str, str | None]]) -> str:
    lines = "".join(f"{checksum}  {name}\n" for name, checksum in checksums if checksum is not None)
    return hashlib.sha256(lines.encode()).hexdigest()


def _canonical(directory: Path, files: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Name without prefix -> name in the checkpoint."""
    tied = Glm4vConfig.from_pretrained(directory).text_config.tie_word_embeddings
    names: dict[str, str] = {}
    faults = []
    for name in files:
        first = names.setdefault(hf_mapping.canonical(name), name)
        if first != name:
            faults.append(f"{name}: found besides {first}; expected one of them")
    raise_faults(faults, CheckpointError, where=str(directory))
    if tied:
        names.pop("lm_head.weight", None)
    return names


def _compare(key: str, ours: Weights, name: str | None, theirs: Weights, other: str | None) -> TensorReport:
    left, right = _Side.read(ours, name), _Side.read(theirs, other)
    unequal, most = None, None
    if left.array is not None and right.array is not None and left.array.shape == right.array.shape:
        unequal, most = _differences(left.array, right.array)
    checksum = left.checksum()
    # If every bit agrees, so do the checksums.
    other_checksum = checksum if unequal == 0 and left.description == right.description else right.checksum()
    for files in (ours, theirs):
        files.release()
    return TensorReport(key, left.description, right.description, checksum, other_checksum, unequal, most)


class _Side(NamedTuple):
    """A tensor of one of the checkpoints; None where that has none."""

    description: str | None
    array: np.ndarray | None

    @classmethod
    def read(cls, files: Weights, name: str | None) -> "_Side":
        if name is None:
            return cls(None, None)
        return cls(f"{files[name].dtype.name} {list(files[name].shape)}", files.read(name))

    def checksum(self) -> str | None:
        if self.array is None:
            return None
        digest = hashlib.sha256(f"{self.description}\n".encode())
        for chunk in _rows(self.array):
            digest.update(chunk.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def _differences(left: np.ndarray, right: np.ndarray) -> tuple[int, float]:
    """Count the numbers that differ between two arrays of one shape, in bits or else in value; and by how much."""
    unequal, most = 0, 0.0
    for x, y in zip(_rows(left), _rows(right), strict=True):
        if x.dtype == y.dtype:
            differ = _words(x) != _words(y)
            if not differ.any():
                continue
        a, b = x.reshape(-1).astype(np.float64), y.reshape(-1).astype(np.float64)
        with np.errstate(invalid="ignore"):
            apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        apart[np.isnan(apart)] = np.inf
        unequal += int(differ.sum() if x.dtype == y.dtype else np.count_nonzero(apart))
        most = max(most, float(apart.max()))
    return unequal, most


def _rows(array: np.ndarray) -> Iterator[np.ndarray]:
    """Contiguous chunks along the first dimension, the same for equal shapes whatever the dtypes."""
    array = np.atleast_1d(array)
    count = max(1, _CHUNK * len(array) // max(1, array.size))
    for start in range(0, len(array), count):
        yield np.ascontiguousarray(array[start : start + count])


def _words(array: np.ndarray) -> np.ndarray:
    """The bits of each number, as an unsigned integer."""
    return array.reshape(-1).view(f"u{array.dtype.itemsize}")
