"""Read checkpoints in Hugging Face layout, and write single safetensors files. NumPy only.

The `safetensors` library validates a file: that the header is sound, that each tensor's bytes fit its shape and dtype,
and that the tensors cover the data without gap or overlap. The rest is ours because memory has to stay bounded:
the library's NumPy reader copies every tensor and its writer wants all of them at once, and Orbax's reader of
safetensors materialises whole tensors in every process. Here a read is a view of the mapped file, of which a process
touches the pages that it needs, and a write holds one chunk. Added besides: float8, slices of empty tensors, and the
checks between an index and its shards. Pickled weights are never loaded.
"""

import contextlib
import dataclasses
import json
import math
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from glm4v_jax.checkpoints.mapped_file import Buffers, MappedFile
from glm4v_jax.checkpoints.strided_copy import in_order
from glm4v_jax.config.checks import raise_faults
from glm4v_jax.errors import CheckpointError, counted, not_there
from glm4v_jax.files import read_json_object, refuse_adapter

# In the library's order, which also sorts the tensors of a file that it writes. Sub-byte types have no NumPy layout.
_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RANK = {code: rank for rank, code in enumerate(_DTYPES)}

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_LFS_POINTER = b"version https://git-lfs"

CHUNK_BYTES = 8 << 20
"""How much of a tensor is reordered, converted or compared at a time."""

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read; `file` has it, or once had it, without a name where none does."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: Path = Path()

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorInfos(Mapping[str, TensorInfo]):
    """Tensors that can be read, by name; a subclass says which in `_infos`."""

    _infos: Mapping[str, TensorInfo]

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor to write, the values of which exist when its turn comes.

    Attributes:
      shape: the lengths of its dimensions.
      dtype: one that the format can store.
      chunks: return arrays of `dtype` that hold the elements in C order, as many as `shape` has.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        chunks = (chunk.reshape(-1) for chunk in self.chunks())
        return np.concatenate([np.zeros(0, self.dtype), *chunks]).reshape(self.shape)


Tensor = LazyTensor | np.ndarray
"""Anything that can be written."""


class SafetensorsFile(TensorInfos):
    """The tensors of one safetensors file, by name in the order of their bytes, checked and mapped on construction.

    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> file = SafetensorsFile(next(TINY_CHECKPOINT.glob("*.safetensors")))
    >>> name = next(iter(file))
    >>> file.read(name).shape == file[name].shape
    True

    The file must not be changed in place while it or an array of it lives (replacing it by renaming is safe).

    Attributes:
      path: of the file.
      metadata: of its header.
      mapped: its bytes.

    Raises:
      CheckpointError: the file cannot be read, is truncated or corrupt, or holds a dtype that NumPy cannot.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="np") as opened:
                self.metadata: dict[str, str] = dict(opened.metadata() or {})
                names = opened.offset_keys()
                headers = [(opened.get_slice(name).get_shape(), opened.get_slice(name).get_dtype()) for name in names]
            self.mapped = MappedFile(self.path)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {_damage(self.path)} ({error})") from error
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: found {error.strerror or error}; expected a safetensors file"
            ) from error

        self._infos: dict[str, TensorInfo] = {}
        for name, (shape, code) in zip(names, headers, strict=True):
            if code not in _DTYPES:
                raise CheckpointError(f"{self.path}: {name}: found dtype {code}; expected one of {', '.join(_DTYPES)}")
            self._infos[name] = TensorInfo(tuple(shape), _DTYPES[code], self.path)
        # The tensors, in the order of their offsets, fill the file from the header's end to its own.
        offset = len(self.mapped.memory) - sum(info.nbytes for info in self._infos.values())
        self._offsets: dict[str, int] = {}
        for name, info in self._infos.items():
            self._offsets[name] = offset
            offset += info.nbytes

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Return a tensor or a basic slice of it as a read-only view of the mapped file.

        Nothing is copied: pages come from disk when the view is used, those of the slice only.

        Raises:
          KeyError: there is no such tensor.
        """
        info = self._infos[name]
        view: np.ndarray = np.ndarray(info.shape, info.dtype, buffer=self.mapped.memory, offset=self._offsets[name])
        return np.asarray(view[index])

    def release(self) -> None:
        """Give the pages that views have touched back to the system; later views read them again.

        Mapped pages count as this process's memory for as long as nothing else wants it, so that reading a file from
        one end to the other looks like holding all of it.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.memory.madvise(mmap.MADV_DONTNEED)


class CheckpointFiles(TensorInfos):
    """The tensors of a checkpoint, by name, from all of its files. Made by `open_checkpoint`."""

    def __init__(self, directory: Path, files: list[SafetensorsFile]):
        self.directory = directory
        self.files = tuple(files)
        self._buffers = Buffers()
        self._file_of = {name: file for file in files for name in file}
        self._infos = {name: file[name] for name, file in self._file_of.items()}

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Return a tensor or a basic slice of it as a read-only view; see `SafetensorsFile.read`."""
        return self._file_of[name].read(name, index)

    def fetched(self, view: np.ndarray) -> contextlib.AbstractContextManager[np.ndarray]:
        """Give an array equal to a view that `read` made, or to any other array; see `MappedFile.fetched`."""
        mapped = next((file.mapped for file in self.files if file.mapped.holds(view)), None)
        return contextlib.nullcontext(view) if mapped is None else mapped.fetched(view, self._buffers)

    def bypass_cache(self) -> None:
        """Let `fetched` read past the page cache; see `MappedFile.bypass_cache`."""
        for file in self.files:
            file.mapped.bypass_cache()

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all files together."""
        return {key: value for file in self.files for key, value in file.metadata.items()}

    def release(self) -> None:
        """Give the pages that views have touched back to the system; see `SafetensorsFile.release`."""
        for file in self.files:
            file.release()


def open_checkpoint(directory: str | Path) -> CheckpointFiles:
    """Open `model.safetensors` or, without it, the shards that `model.safetensors.index.json` names.

    The reference prefers the single file too.

    Raises:
      CheckpointError: there is no such directory or no such file in it, or the files are damaged or contradict the
        index; one error lists all faults.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: found no directory; expected that of a checkpoint (nothing is downloaded)")
    if (directory / _SINGLE).is_file():
        return CheckpointFiles(directory, [SafetensorsFile(directory / _SINGLE)])
    if (directory / _INDEX).is_file():
        return _open_shards(directory, _read_index(directory / _INDEX))

    refuse_adapter(directory)
    expected = f"expected {_SINGLE}, or {_INDEX} and its shards"
    if shards := sorted(path.name for path in directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory}: found {_listed(shards, 5)} without an index; {expected}")
    if pickled := sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern)):
        raise CheckpointError(
            f"{directory}: found pickled weights only ({_listed(pickled, 5)}), which are never loaded because "
            f"unpickling runs code from the file; {expected}"
        )
    if (directory / "config.json").is_file():
        expected = f"{expected}; assets of an Orbax checkpoint have their weights only where they are, inside it"
    raise CheckpointError(f"{directory}: found no weights; {expected}")


def _read_index(path: Path) -> dict[str, str]:
    """Return the map from tensor name to shard file name."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: found no 'weight_map'; expected an object from tensor names to file names")
    for name, shard in weight_map.items():
        # A path would let an index reach out of its directory.
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{path}: {name}: found shard {shard!r}; expected the name of a file beside it")
    return weight_map


def _open_shards(directory: Path, weight_map: dict[str, str]) -> CheckpointFiles:
    files: dict[str, SafetensorsFile] = {}
    faults: list[str] = []
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            count = sum(1 for file in weight_map.values() if file == shard)
            faults.append(not_there(shard, f"a shard of {counted(count, 'tensor')}"))
            continue
        try:
            files[shard] = SafetensorsFile(directory / shard)
        except CheckpointError as error:
            faults.append(str(error).removeprefix(f"{directory}{os.sep}"))

    found = defaultdict(list)
    for shard, file in files.items():
        for name in file:
            found[name].append(shard)
    for name, shards in found.items():
        if len(shards) > 1:
            faults.append(f"{name}: found in {' and in '.join(shards)}; expected in one shard")
        elif name not in weight_map:
            faults.append(f"{name}: found in {shards[0]}; expected in the index too")
    for name, shard in weight_map.items():
        if shard in files and shard not in found[name]:
            where = f"in {' and in '.join(found[name])}" if found[name] else "no such tensor"
            faults.append(f"{name}: found {where}; expected in {shard}")
    raise_faults(faults, CheckpointError, where=f"{directory}: shards do not match {_INDEX}")
    return CheckpointFiles(directory, list(files.values()))


def in_chunks(array: np.ndarray, dtype: np.dtype[Any] | None = None) -> Iterator[np.ndarray]:
    """Return contiguous chunks of an array along its first dimension, as `dtype`; only what is out of order is copied.

    A chunk has `CHUNK_BYTES`, or is a single row.
    """
    dtype = array.dtype if dtype is None else dtype
    array = np.atleast_1d(array)
    rows = max(1, CHUNK_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        yield in_order(array[start : start + rows], dtype)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a file equal to the library's byte for byte, one tensor at a time.

    Host memory holds one chunk of a `LazyTensor` and one more being written, where the library wants the addresses of
    all tensors at once. The file appears under its name when it is complete.

    Args:
      path: of the file.
      tensors: what to write, by name; each `LazyTensor` is asked for its values once.
      metadata: of the header, text by text.
      progress: called with the number of bytes just written.

    Raises:
      CheckpointError: a dtype, a name or the metadata cannot be stored; what was at `path` is then untouched.
    """
    path = Path(path)
    metadata = dict(metadata or {})
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"{path}: metadata: found {key!r}: {value!r}; expected text for both")
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    codes = _codes(path, tensors)
    for name in written_order(tensors):
        code = codes[name]
        shape = [int(length) for length in tensors[name].shape]
        end = offset + int(np.prod(shape, dtype=np.int64)) * _DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned

    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file, ThreadPoolExecutor(1) as writer:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, entry in header.items():
                if name != "__metadata__":
                    # A function of its own, so that a tensor's memory is free before the next one is asked for.
                    _write_tensor(writer, file, path, name, tensors[name], _DTYPES[entry["dtype"]], progress)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def written_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors in the order in which `write_safetensors` writes them."""
    codes = _codes(Path(), tensors)
    return sorted(codes, key=lambda name: (-_RANK[codes[name]], name))


def _codes(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> the format's code of its dtype."""
    codes = {}
    for name, tensor in tensors.items():
        code = _CODES.get(np.dtype(tensor.dtype).newbyteorder("<"))
        if code is None or name == "__metadata__":
            what = f"dtype {tensor.dtype}" if code is None else "a reserved name"
            raise CheckpointError(f"{path}: {name}: found {what}; expected a tensor of {', '.join(_DTYPES)}")
        codes[name] = code
    return codes


def _write_tensor(
    writer: Executor,
    file: BinaryIO,
    path: Path,
    name: str,
    tensor: Tensor,
    dtype: np.dtype[Any],
    progress: Callable[[int], None] | None,
) -> None:
    """Write a tensor, each chunk while the next is made.

    Raises:
      CheckpointError: a `LazyTensor` has other chunks than it announced.
    """
    writing: Future[int] | None = None
    count, size = 0, math.prod(tensor.shape)
    chunks = tensor.chunks() if isinstance(tensor, LazyTensor) else in_chunks(np.asarray(tensor), dtype)
    for chunk in chunks:
        count += chunk.size
        if chunk.dtype != dtype or count > size:
            raise CheckpointError(f"{path}: {name}: found {count:,} of {chunk.dtype}; expected {size:,} of {dtype}")
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        if writing is not None:
            writing.result()
        writing = writer.submit(file.write, data)
        if progress is not None:
            progress(len(data))
    if writing is not None:
        writing.result()
    if count != size:
        raise CheckpointError(f"{path}: {name}: found {count:,} numbers; expected {size:,} as announced")


def _damage(path: Path) -> str:
    """Describe in numbers what is wrong with a file that the library refuses."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        text = file.read(length) if 8 + length <= size else b""
    if start == _LFS_POINTER:
        return "found a Git LFS pointer; expected the file itself: run git lfs pull"
    if size < 8:
        return f"found {counted(size, 'byte')}; expected at least 8, which hold the length of the header"
    if 8 + length > size:
        return f"found {counted(size, 'byte')}; expected {8 + length:,} up to the end of the header, as the first 8 say"
    # The library's own message covers whatever else is wrong with the header.
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        promised = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0)
        if promised != size:
            return f"found {counted(size, 'byte')}; expected {promised:,}, as the header says"
    return "found a corrupt header; expected that of a safetensors file"


def _listed(items: list[str], most: int) -> str:
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more
