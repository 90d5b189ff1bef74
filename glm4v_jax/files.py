"""Files: those beside a checkpoint's weights, fingerprints of large ones, and how any are read and written."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from glm4v_jax.errors import CheckpointError, counted, not_there

ASSETS = "assets"
"""Folder of an Orbax checkpoint for the files that lie beside the weights in Hugging Face's layout."""

_SUFFIXES = (".json", ".jinja", ".md", ".model", ".tiktoken", ".txt")
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "README")
_NOT_ASSETS = (".index.json",)


ADAPTER_CONFIG = "adapter_config.json"
"""What marks the directory of an adapter, in PEFT's format."""


def is_hub_name(name: str | pathlib.Path) -> bool:
    """Return whether a text reads like the name of a model on the hub.

    >>> is_hub_name("zai-org/GLM-4.1V-9B-Thinking"), is_hub_name("./GLM-4.1V-9B-Thinking")
    (True, False)
    """
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) is not None


def model_directory(name: str | pathlib.Path) -> pathlib.Path:
    """Return the directory of a model: `name` itself, or where the local Hugging Face cache has the model `name`.

    The `assets` of an Orbax checkpoint stand for the checkpoint: programs that know the Hugging Face layout alone are
    given that folder. Nothing is downloaded. What is neither is returned as it is, for its reader to refuse, unless it
    reads like a name on the hub.

    Raises:
      CheckpointError: it reads like a name on the hub, of a model that has not been downloaded.
    """
    directory = pathlib.Path(name)
    if directory.exists() or not is_hub_name(name):
        return _around_assets(directory)
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(name), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"found {name}, which is neither a directory nor in the local Hugging Face cache; expected a checkpoint; "
            f"download it first: hf download {name}"
        ) from error


def _around_assets(directory: pathlib.Path) -> pathlib.Path:
    """The Orbax checkpoint that a folder is the assets of, or the folder itself."""
    for place in (directory, directory.resolve()):
        if place.name == ASSETS and is_orbax(place.parent) and not is_orbax(place):
            return place.parent
    return directory


def check_config(directory: pathlib.Path) -> None:
    """Check that an existing directory has the configuration of a model.

    Raises:
      CheckpointError: it has none; the message says what it is instead, or where the model is.
    """
    if (assets_directory(directory) / "config.json").is_file():
        return
    refuse_adapter(directory)
    found = f"{directory}: found no config.json; expected the directory of a checkpoint"
    # What a training job and a conversion leave in their output directories.
    for name, file in (("model", "config.json"), ("adapter", ADAPTER_CONFIG)):
        if (directory / name / file).is_file():
            found = f"{found}; did you mean {directory / name}?"
    raise CheckpointError(found)


def refuse_adapter(directory: pathlib.Path) -> None:
    """Check that a directory that lacks a file of a model's is not that of an adapter; CheckpointError if it is."""
    if (directory / ADAPTER_CONFIG).is_file():
        base = read_json_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
        raise CheckpointError(
            f"{directory}: found an adapter; expected a model: pass --model {base} --adapter {directory}; in Python, "
            f"from_pretrained({base!r}, adapter={str(directory)!r})"
        )


def base_of(adapter: str | pathlib.Path) -> str:
    """Return the model that an adapter names as its base, which must be on this machine.

    Raises:
      CheckpointError: it names none that is.
    """
    name = read_json_object(pathlib.Path(adapter) / ADAPTER_CONFIG, "an adapter of PEFT").get("base_model_name_or_path")
    if not isinstance(name, str) or not model_directory(name).is_dir():
        raise CheckpointError(
            f"--model: found nothing, and {name!r} as the base of {adapter}; expected the base model's directory"
        )
    return name


def other_base(adapter: str | pathlib.Path, model: str | pathlib.Path) -> str | None:
    """Return the model that an adapter names as its base, if that is not `model` by its place or its name.

    A copy elsewhere has the same name, in the local Hugging Face cache as "models--OWNER--NAME"; but every training job
    names its result "model".

    Raises:
      CheckpointError: there is no adapter.
    """
    named = read_json_object(pathlib.Path(adapter) / ADAPTER_CONFIG, "an adapter of PEFT").get(
        "base_model_name_or_path"
    )
    if not isinstance(named, str) or not named:
        return None
    base, place = pathlib.Path(named), pathlib.Path(model).resolve()
    is_same = any(part == base.name or part.endswith(f"--{base.name}") for part in place.parts)
    return None if (is_same and base.name != "model") or base.resolve() == place else named


def doubt_of_base(adapter: str | pathlib.Path, model: str | pathlib.Path) -> str | None:
    """Return a warning where an adapter names another model as its base, see `other_base`."""
    named = other_base(adapter, model)
    said = f"{adapter}: found {named} as its base model; expected {model}"
    return None if named is None else f"{said}: it is of use only if both have the same weights"


def is_orbax(directory: str | pathlib.Path) -> bool:
    """Return whether a directory holds a checkpoint in Orbax format, complete or not."""
    directory = pathlib.Path(directory)
    return (directory / "_CHECKPOINT_METADATA").is_file() or (directory / "orbax.checkpoint").is_file()


def assets_directory(directory: str | pathlib.Path) -> pathlib.Path:
    """Return the directory of a checkpoint's configuration, tokenizer and processor files.

    Raises:
      CheckpointError: see `model_directory`.
    """
    directory = model_directory(directory)
    return directory / ASSETS if is_orbax(directory) and (directory / ASSETS).is_dir() else directory


def asset_files(directory: str | pathlib.Path) -> list[pathlib.Path]:
    """Return the files that a conversion copies, relative to `assets_directory(directory)`, sorted.

    Configurations, tokenizer, templates, model card and licence; not weights, their index, hidden files, or folders
    other than that of named templates.
    """
    root = assets_directory(directory)
    found = [path for path in root.iterdir() if path.is_file() and _is_asset(path.name)]
    found += (root / "additional_chat_templates").glob("*.jinja")
    return sorted(path.relative_to(root) for path in found)


def asset_bytes(directory: str | pathlib.Path) -> int:
    """Return the bytes of `asset_files`."""
    root = assets_directory(directory)
    return sum((root / path).stat().st_size for path in asset_files(directory))


def copy_assets(source: str | pathlib.Path, target: str | pathlib.Path) -> None:
    """Copy `asset_files` of one checkpoint into a directory, which is made if need be."""
    root, target = assets_directory(source), pathlib.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in asset_files(source):
        (target / path.parent).mkdir(exist_ok=True)
        shutil.copyfile(root / path, target / path)


def _is_asset(name: str) -> bool:
    if name.startswith(".") or name.endswith(_NOT_ASSETS):
        return False
    return name.endswith(_SUFFIXES) or name.startswith(_NAMES)


def read_json_object(path: pathlib.Path, part_of: str = "a checkpoint in Hugging Face layout") -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
      path: the file.
      part_of: what a missing file should have been part of.

    Raises:
      CheckpointError: the file is missing, is not JSON, or holds something else than an object.
    """
    if not path.is_file():
        raise CheckpointError(not_there(path, part_of))
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: found invalid JSON ({error}); expected an object") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found a JSON {type(data).__name__}; expected an object")
    return data


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file, which replaces what was there when it is complete."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def set_dtype(path: pathlib.Path, dtype: str) -> None:
    """Replace every dtype in a config.json by this one, which it then has: other programs guess where none is named."""
    config = _with_dtype(read_json_object(path), dtype)
    if not config.keys() & {"dtype", "torch_dtype"}:
        config["dtype"] = dtype
    write_json(path, config)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed


def read_text(path: pathlib.Path) -> str:
    """Read a UTF-8 text file, without a byte order mark.

    Raises:
      CheckpointError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: found invalid UTF-8 ({error}); expected a text") from error
    except OSError as error:
        raise CheckpointError(f"{path}: found an unreadable file ({error}); expected a text") from error


_ENCODING_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_MODEL_FILES = ("config.json", "generation_config.json", *_ENCODING_FILES)
_ORBAX = ("_CHECKPOINT_METADATA", "orbax.checkpoint", "state")

_WHOLE, _SAMPLES, _SAMPLE = 1 << 20, 64, 1 << 12

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What the system says when it cannot take more of a file that is open."""


def fingerprint(path: str | pathlib.Path, whole: int = _WHOLE) -> str:
    """Return a digest of a file, or of all files of a directory, that changes with the content.

    Of files of more than `whole` bytes it covers the size and 64 samples of 4 KiB, so that a checkpoint takes no time:
    a change of a few bytes may go unnoticed, a training step does not.

    Raises:
      OSError: something cannot be read.
    """
    path = pathlib.Path(path)
    files = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
    return _fingerprint(path, files, whole)


def model_fingerprint(directory: str | pathlib.Path) -> str:
    """Return the `fingerprint` of the files that make a model, whatever else is in its directory.

    These are weights and their index, or the state of an Orbax checkpoint, and the files of configuration, generation,
    tokenizer, templates and processors.

    Raises:
      OSError: something cannot be read.
    """
    directory = model_directory(directory)
    files = [path for pattern in _MODEL_FILES for path in assets_directory(directory).glob(pattern)]
    if is_orbax(directory):
        files += [path for name in _ORBAX for path in (directory / name, *(directory / name).rglob("*"))]
    else:
        # The weights that `checkpoints.safetensors.open_checkpoint` reads.
        single = directory / "model.safetensors"
        files += [single] if single.is_file() else directory.glob("*.safetensors*")
    return _fingerprint(directory, [path for path in files if path.is_file()])


def encoding_fingerprint(directory: str | pathlib.Path) -> str:
    """Return a digest of a model's files that decide how text and media become tokens and patches, read whole.

    Raises:
      OSError: something cannot be read.
    """
    assets = assets_directory(model_directory(directory))
    files = [path for pattern in _ENCODING_FILES for path in assets.glob(pattern) if path.is_file()]
    return _fingerprint(assets, files, sys.maxsize)


def _fingerprint(root: pathlib.Path, files: Iterable[pathlib.Path], whole: int = _WHOLE) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for file in sorted(files):
        size = file.stat().st_size
        name = "" if file == root else str(file.relative_to(root))
        hashed.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        with file.open("rb") as content:
            if size <= whole:
                while block := content.read(_WHOLE):
                    hashed.update(block)
                continue
            for number in range(_SAMPLES):
                content.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
                hashed.update(content.read(_SAMPLE))
    return hashed.hexdigest()


@contextlib.contextmanager
def made_directory(path: pathlib.Path) -> Iterator[None]:
    """Make a directory; if the body fails, remove what is still empty of it and of the parents that were made.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with contextlib.suppress(KeyError), made_directory(pathlib.Path(directory, "runs", "first")):
    ...         raise KeyError
    ...     os.listdir(directory)
    []
    """
    place = pathlib.Path(os.path.abspath(path))
    missing = list(itertools.takewhile(lambda each: not each.exists(), (place, *place.parents)))
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it
            for directory in missing:
                directory.rmdir()
        raise


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the name of a file to write, which replaces `path` at the end of the block, or is removed if that fails.

    Raises:
      OSError: raised inside, or by the replacement; it names `path` instead of the temporary file.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming_file(path):
            yield aside
            os.replace(aside, path)
    except BaseException as error:
        # On a read-only file system the first error says more.
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and str(error.filename) == str(aside):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def naming_file(path: pathlib.Path) -> Iterator[None]:
    """Name a file in an error of writing it: Python names one that it cannot open, and not one that a disk refuses."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def to_json(value: Any, **options: Any) -> str:
    """Return `json.dumps`, with null for infinities and NaN, which JSON does not have.

    >>> to_json({"loss": float("nan")})
    '{"loss": null}'
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def size_text(nbytes: int, digits: int = 2) -> str:
    """Format bytes in the largest binary unit of which there is at least one.

    >>> size_text(5 << 28)
    '1.25 GiB'
    """
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{nbytes} B" if units[0] == "B" else f"{value:.{digits}f} {units[0]}"


def decimal_size(nbytes: int, digits: int = 2) -> str:
    """Format bytes in the largest decimal unit of which there is at least one.

    >>> decimal_size(1_500_000_000)
    '1.50 GB'
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return counted(nbytes, "byte")


def is_same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Return whether two paths are the same existing file."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
