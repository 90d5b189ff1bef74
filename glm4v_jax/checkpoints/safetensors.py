"""Reading checkpoints in Hugging Face layout, and writing single safetensors files. NumPy only.

The `safetensors` library judges a file: it checks that the header is sound, that each tensor's bytes fit its shape and
dtype, and that the tensors cover the data without gap or overlap. This module adds what the library's NumPy side lacks
(release 0.8): views into the mapped file instead of copies, float8, slices of empty tensors, messages that say what was
found and expected, and the checks between an index and its shards. Pickled weights are never loaded.
"""

import contextlib
import json
import math
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from glm4v_jax.checkpoints.strided_copy import in_order
from glm4v_jax.errors import CheckpointError

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

PIECE_BYTES = 8 << 20
"""How much of a tensor is put in order, converted or compared at a time."""

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


class TensorInfo(NamedTuple):
    """What a file says about one of its tensors."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int
    file: Path


class ArraySource(Protocol):
    """Something to write: a NumPy array, a JAX array, or anything that becomes a NumPy array when its turn comes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the dimensions."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """One of the dtypes that NumPy or ml_dtypes has and the format can store."""
        ...

    def __array__(self) -> np.ndarray: ...


@runtime_checkable
class PiecewiseSource(Protocol):
    """An `ArraySource` that need not exist as a whole: its pieces, in order, hold its elements in C order."""

    def pieces(self) -> Iterator[np.ndarray]:
        """Arrays of the announced dtype; together as many elements as the announced shape has."""
        ...


class SafetensorsFile(Mapping[str, TensorInfo]):
    """The tensors of one safetensors file, by name in the order of their bytes, checked and mapped on construction.

    The file must not be changed in place while it or an array of it lives (replacing it by renaming is safe).

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
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {_damage(self.path)} ({error})") from error
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror or error}; expected a safetensors file") from error

        self._infos: dict[str, TensorInfo] = {}
        for name, (shape, code) in zip(names, headers, strict=True):
            if code not in _DTYPES:
                raise CheckpointError(f"{self.path}: {name}: found dtype {code}; expected one of {', '.join(_DTYPES)}")
            dtype = _DTYPES[code]
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            self._infos[name] = TensorInfo(tuple(shape), dtype, nbytes, self.path)
        # The tensors, in the order of their offsets, fill the file from the header's end to its own.
        offset = len(self._bytes) - sum(info.nbytes for info in self._infos.values())
        self._offsets: dict[str, int] = {}
        for name, info in self._infos.items():
            self._offsets[name] = offset
            offset += info.nbytes

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Returns a tensor or a basic slice of it as a read-only view of the mapped file; KeyError if there is none.

        Nothing is copied: pages come from disk when the view is used, those of the slice only.
        """
        info = self._infos[name]
        view: np.ndarray = np.ndarray(info.shape, info.dtype, buffer=self._bytes, offset=self._offsets[name])
        return np.asarray(view[index])

    def release(self) -> None:
        """Gives the pages that views have touched back to the system; later views read them again.

        Mapped pages count as this process's memory for as long as nothing else wants it, so that reading a file from
        one end to the other looks like holding all of it.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED)


class CheckpointFiles(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint, by name, wherever they lie. Made by `open_checkpoint`."""

    def __init__(self, directory: Path, files: list[SafetensorsFile]):
        self.directory = directory
        self.files = tuple(files)
        self._file_of = {name: file for file in files for name in file}

    def __getitem__(self, name: str) -> TensorInfo:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Returns a tensor or a basic slice of it as a read-only view; see `SafetensorsFile.read`."""
        return self._file_of[name].read(name, index)

    def release(self) -> None:
        """Gives the pages that views have touched back to the system; see `SafetensorsFile.release`."""
        for file in self.files:
            file.release()


def open_checkpoint(directory: str | Path) -> CheckpointFiles:
    """Opens `model.safetensors` or, without it, the shards that `model.safetensors.index.json` names, in that order
    like the reference.

    Raises:
        CheckpointError: there is no such directory or no such file in it, or the files are damaged or contradict the
            index; one error tells all faults.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: found no directory; expected that of a checkpoint (nothing is downloaded)")
    if (directory / _SINGLE).is_file():
        return CheckpointFiles(directory, [SafetensorsFile(directory / _SINGLE)])
    if (directory / _INDEX).is_file():
        return _open_shards(directory, _read_index(directory / _INDEX))

    expected = f"expected {_SINGLE}, or {_INDEX} and its shards"
    if shards := sorted(path.name for path in directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory}: found {_listed(shards, 5)} without an index; {expected}")
    if pickled := sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern)):
        raise CheckpointError(
            f"{directory}: found pickled weights only ({_listed(pickled, 5)}), which are never loaded because "
            f"unpickling runs code from the file; {expected}"
        )
    raise CheckpointError(f"{directory}: found no weights; {expected}")


def _read_index(path: Path) -> dict[str, str]:
    """Returns the map from tensor name to shard file name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: found no readable JSON ({error}); expected a checkpoint's index") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
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
            faults.append(f"shard {shard}, which the index names for {count} tensors, is missing")
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
            faults.append(f"tensor {name} is in {len(shards)} shards: {', '.join(shards)}")
        elif name not in weight_map:
            faults.append(f"tensor {name} of shard {shards[0]} is not in the index")
    for name, shard in weight_map.items():
        if shard in files and shard not in found[name]:
            where = f"; it is in {', '.join(found[name])}" if found[name] else ""
            faults.append(f"tensor {name} is not in shard {shard}, where the index puts it{where}")
    if faults:
        raise CheckpointError(f"{directory}: found {'; '.join(faults)}; expected shards as in {_INDEX}")
    return CheckpointFiles(directory, list(files.values()))


def in_pieces(array: np.ndarray, dtype: np.dtype[Any] | None = None) -> Iterator[np.ndarray]:
    """Contiguous pieces of an array, along its first dimension, as `dtype`: what is not in order is copied by pieces.

    A piece has `PIECE_BYTES` or a single row.
    """
    dtype = array.dtype if dtype is None else dtype
    array = np.atleast_1d(array)
    rows = max(1, PIECE_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        yield in_order(array[start : start + rows], dtype)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, ArraySource],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a file equal to the library's byte for byte, one tensor at a time.

    Shapes and dtypes are asked for first and values one after the other, so that arrays on a device need host memory
    for the largest of them only (the library wants the addresses of all at once), and a `PiecewiseSource` for a piece.
    The file appears under its name when it is complete.

    Args:
        path: of the file.
        tensors: what to write, by name.
        metadata: text by text, for the header.
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
                    # A function of its own, so that a tensor is gone before the next one is asked for.
                    _write_tensor(writer, file, path, name, tensors[name], entry, progress)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def written_order(tensors: Mapping[str, ArraySource]) -> list[str]:
    """The names of tensors in the order in which `write_safetensors` asks for them, once each."""
    return [name for name, _ in sorted(_codes(Path(), tensors).items(), key=_library_order)]


def _codes(path: Path, tensors: Mapping[str, ArraySource]) -> dict[str, str]:
    codes = {}
    for name, tensor in tensors.items():
        code = _CODES.get(np.dtype(tensor.dtype).newbyteorder("<"))
        if code is None or name == "__metadata__":
            what = f"dtype {tensor.dtype}" if code is None else "a reserved name"
            raise CheckpointError(f"{path}: {name}: found {what}; expected a tensor of {', '.join(_DTYPES)}")
        codes[name] = code
    return codes


def _library_order(item: tuple[str, str]) -> tuple[int, str]:
    name, code = item
    return -_RANK[code], name


def _write_tensor(
    writer: Executor,
    file: BinaryIO,
    path: Path,
    name: str,
    tensor: ArraySource,
    entry: dict[str, Any],
    progress: Callable[[int], None] | None,
) -> None:
    """Writes a tensor, each piece while the next is made."""
    writing: Future[int] | None = None
    for piece in _data(path, name, tensor, entry):
        if writing is not None:
            writing.result()
        writing = writer.submit(file.write, piece)
        if progress is not None:
            progress(len(piece))
    if writing is not None:
        writing.result()


def _data(path: Path, name: str, tensor: ArraySource, entry: dict[str, Any]) -> Iterator[memoryview]:
    """A tensor's bytes; fails where they are others than the header has announced."""
    dtype, count, size = _DTYPES[entry["dtype"]], 0, math.prod(entry["shape"])
    if isinstance(tensor, PiecewiseSource):
        pieces = tensor.pieces()
    else:
        array = np.asarray(tensor)
        if list(array.shape) != entry["shape"] or array.dtype.newbyteorder("<") != dtype:
            expected = f"{dtype} {entry['shape']} as announced"
            raise CheckpointError(f"{path}: {name}: found {array.dtype} {list(array.shape)}; expected {expected}")
        pieces = in_pieces(array, dtype)
    for piece in pieces:
        count += piece.size
        if piece.dtype != dtype or count > size:
            raise CheckpointError(f"{path}: {name}: found {count:,} of {piece.dtype}; expected {size:,} of {dtype}")
        yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
    if count != size:
        raise CheckpointError(f"{path}: {name}: found {count:,} numbers; expected {size:,} as announced")


def _damage(path: Path) -> str:
    """Says in words and numbers what is wrong with a file that the library refuses."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        text = file.read(length) if 8 + length <= size else b""
    if start == _LFS_POINTER:
        return "found a Git LFS pointer; expected the file that it stands for (git lfs pull)"
    if size < 8:
        return f"file has {size:,} bytes; expected at least 8, which hold the length of the header"
    if 8 + length > size:
        return f"file has {size:,} bytes; its first 8 promise {8 + length:,} up to the end of the header"
    # Whatever else is wrong with the header is told by the library's own words.
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        promised = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0)
        if promised != size:
            return f"file has {size:,} bytes; its header promises {promised:,}"
    return "found a corrupt header; expected that of a safetensors file"


def _listed(items: list[str], most: int) -> str:
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more
