"""Checkpoints in Orbax format: what is in them, read as leaves of the model or as Hugging Face's tensors.

On disk the model is a tree with one leaf for each parameter of each layer (OCDBT, zarr3), whatever layout the layers
had in memory, so that it can be written and read group by group, and onto any mesh. Files beside the weights are in
`assets/`; `custom_metadata` says where the weights came from, and how their tensors were called (see `orbax_write`).
TensorStore reads the leaves, not Orbax, whose reader materialises whole leaves: here each process reads slices.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import ml_dtypes
import msgspec
import numpy as np

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.atomic_directory import is_unfinished
from glm4v_jax.checkpoints.compressed_tensors import (
    PACKED,
    SCALE,
    SHAPE,
    ExpectedTensors,
    ScaleLayout,
    expected_tensors,
    pack,
    stored_leaves,
)
from glm4v_jax.checkpoints.leaves import Leaves, Slices, TensorLeaves
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, Index, TensorInfo, TensorInfos, open_checkpoint
from glm4v_jax.checkpoints.strided_copy import copy
from glm4v_jax.config.checks import fault, raise_faults
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import FIELD, StoredQuantization, stored_quantization
from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import is_orbax, model_directory
from glm4v_jax.model.quantize import is_scale, kernel_path, scale_path

METADATA_KEY = "glm4v_jax"
FORMAT = 1

_Integers = Literal["int8", "int32", "int64"]
"""Of the tensors that quantised weights are stored as."""


Weights: TypeAlias = "CheckpointFiles | OrbaxCheckpoint"
"""The tensors of a checkpoint in either format, in Hugging Face's terms."""


def open_weights(directory: str | Path) -> Weights:
    """Open a checkpoint in either format; nothing but headers is read.

    Raises:
      CheckpointError: it is in neither format, damaged, left by an interrupted conversion, or not downloaded.
    """
    directory = model_directory(directory)
    if is_unfinished(directory):
        raise CheckpointError(f"{directory}: found an unfinished conversion; expected a complete checkpoint")
    return OrbaxCheckpoint(directory) if is_orbax(directory) else open_checkpoint(directory)


def leaves_of(files: Weights, config: Glm4vConfig) -> Leaves:
    """Return the weights as leaves of a model of this configuration.

    Raises:
      CheckpointError: it is not a checkpoint of such a model; all tensors that do not fit are listed.
    """
    if isinstance(files, OrbaxCheckpoint):
        return files.leaves if config == files.config else OrbaxLeaves(files.directory, config)
    return TensorLeaves(files, config)


class OrbaxLeaves:
    """The leaves of an Orbax checkpoint.

    Raises:
      CheckpointError: it cannot be read, or its leaves are not those of a model of this configuration; all that do not
        fit are listed.
      ConfigError: weights are quantised in a way that is not read here.
    """

    def __init__(self, directory: Path, config: Glm4vConfig):
        import tensorstore  # where they are used: importing both takes as long as reading the tiny model
        from orbax.checkpoint import v1 as ocp

        self._directory = directory
        self.stored = stored_quantization(directory)
        self._context = tensorstore.Context()
        self._stores: dict[str, Any] = {}
        try:
            described = ocp.metadata(directory.absolute())
        except Exception as error:  # Orbax raises what its parts do: JSON, TensorStore and file errors
            raise CheckpointError(
                f"{directory}: found unreadable metadata ({error}); expected an Orbax checkpoint"
            ) from error
        if not isinstance(described.metadata, Mapping):  # Orbax has logged why
            raise CheckpointError(f"{directory}: found damaged metadata; expected an Orbax checkpoint")
        self.custom_metadata: Mapping[str, Any] = described.custom_metadata or {}
        found = {path: TensorInfo(tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in _flat(described.metadata)}
        self.extras: Mapping[str, TensorInfo] = {
            path: info for path, info in found.items() if path.startswith(hf_mapping.EXTRA)
        }
        found = {path: info for path, info in found.items() if path not in self.extras}
        hf_mapping.check_depths(config, found, str(directory))
        scales = [path for path in found if is_scale(path)]
        if bool(scales) != (self.stored is not None):
            expected_field = f"the scheme of {scales[0]}" if scales else "nothing: no weight is quantised"
            raise CheckpointError(f"{directory}: {FIELD}: found {self.stored or 'nothing'}; expected {expected_field}")
        quantized: dict[str, TensorInfo] = {}
        if self.stored is not None:
            quantized = stored_leaves(config, self.stored, [kernel_path(path) for path in scales])
            _check_scheme(self.stored, quantized, found, f"{directory}: {FIELD}")
        expected = hf_mapping.leaf_shapes(config) | {path: info.shape for path, info in quantized.items()}
        dtypes = {path: (info.dtype.name,) for path, info in quantized.items()}
        hf_mapping.check_tensors(found.items(), expected, str(directory), spell=str, dtypes=dtypes)
        self.infos: Mapping[str, TensorInfo] = {path: found[path] for path in expected}

    def read(self, path: str, index: Slices) -> np.ndarray:
        """Return a slice, without steps, of a leaf as a new array; only the chunks that it needs are read."""
        info = self.infos.get(path) or self.extras[path]
        dtype = np.dtype(np.int8) if info.dtype == ml_dtypes.int4 else info.dtype
        lengths = (len(range(*i.indices(length))) for i, length in zip(index, info.shape, strict=True))
        out = np.empty(tuple(lengths), dtype)
        self.fill(out, path, index)
        return out

    def has_pairs(self, path: str) -> bool:
        """Never: there is a byte for each integer."""
        del path
        return False

    def fill(self, out: np.ndarray, path: str, index: Slices) -> None:
        """Write a slice, without steps, of a leaf into an array, as its dtype; see `read`."""
        import tensorstore

        try:
            if path not in self._stores:
                base = (self._directory / "state").absolute().as_uri()
                kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": path}
                spec = {"driver": "zarr3", "kvstore": kvstore}
                self._stores[path] = tensorstore.open(spec, open=True, read=True, context=self._context).result()
            # TensorStore wants bounds within the array, where NumPy counts from its end or clips them.
            info = self.infos.get(path) or self.extras[path]
            bounds = [entry.indices(length) for entry, length in zip(index, info.shape, strict=True)]
            within = tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)
            values = self._stores[path][within][tensorstore.d[:].translate_to[0]]
            if out.dtype in (info.dtype, np.int8):
                tensorstore.array(out).write(values).result()
            else:
                copy(out, values.read().result())
        except ValueError as error:
            raise CheckpointError(
                f"{self._directory}: {path}: found unreadable data ({error}); expected an array"
            ) from error

    def release(self) -> None:
        """Nothing is kept between reads."""

    def bypass_cache(self) -> None:
        """TensorStore decides."""


def _check_scheme(
    stored: StoredQuantization, quantized: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo], where: str
) -> None:
    """Check that the scheme is that of some quantised leaf: where it is that of none, it is no leaf that is wrong.

    Raises:
      CheckpointError: it is not.
    """
    for of_scales in (False, True):
        pairs = [
            (path, info, found[path])
            for path, info in quantized.items()
            if is_scale(path) == of_scales and path in found
        ]
        if pairs and all((info.shape, info.dtype) != (own.shape, own.dtype) for _, info, own in pairs):
            path, info, own = pairs[0]
            would, is_ = (f"{each.dtype.name} {list(each.shape)}" for each in (info, own))
            raise CheckpointError(
                f"{where}: found {stored}, of which {path} would be {would}; expected the scheme in which it is {is_}"
            )


class OrbaxCheckpoint(TensorInfos):
    """An Orbax checkpoint in Hugging Face's terms: tensors by name, in their layout, dtype and order there.

    Names, dtypes, files and order are those of the checkpoint that was converted; where there was none, those that
    transformers writes. No data are read before `read`.

    Raises:
      CheckpointError: it is unfinished, cannot be read, is not that of a model of its configuration, or its provenance
        does not fit it.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if ".partial_save" in self.directory.name or not (self.directory / "state").is_dir():
            raise CheckpointError(f"{directory}: found an unfinished Orbax checkpoint; expected a complete one")
        self.config = Glm4vConfig.from_pretrained(self.directory)
        self.leaves = OrbaxLeaves(self.directory, self.config)
        self.provenance: Mapping[str, Any] = self.leaves.custom_metadata.get(METADATA_KEY, {})
        if not isinstance(self.provenance, Mapping):
            raise CheckpointError(f"{directory}: {METADATA_KEY}: found {self.provenance!r}; expected a JSON object")
        if (version := self.provenance.get("format", FORMAT)) != FORMAT:
            raise CheckpointError(f"{directory}: found format {version}; expected {FORMAT}, or a newer glm4v_jax")
        self._sizes = hf_mapping.dimensions(self.config)
        wanted = hf_mapping.wanted(self.config)
        quantized = [name for name, part in wanted.items() if scale_path(part.path) in self.leaves.infos]
        expected = expected_tensors(self.config, quantized, self.leaves.stored, str(directory))
        for path, info in self.leaves.extras.items():
            part = hf_mapping.extra_part(path.removeprefix(hf_mapping.EXTRA), len(info.shape))
            expected.parts[part.rule.tensor], expected.shapes[part.rule.tensor] = part, info.shape
            expected.dtypes[part.rule.tensor] = (info.dtype.name,)
        if self.provenance.get("tensors"):
            tensors = _checked_tensors(self.directory, self.provenance, expected, self.config)
        elif quantized:
            raise CheckpointError(f"{directory}: {METADATA_KEY}: tensors: found nothing; expected those in safetensors")
        else:
            names = hf_mapping.tensor_rules(self.config).items()
            tensors = [(name, self.leaves.infos[part.path].dtype.name, "") for name, part in names]
        # Some checkpoints have a tied head a second time.
        embedding = "language_model.embed_tokens.weight"
        parts = {"lm_head.weight": expected.parts[embedding]} | expected.parts
        shapes = {"lm_head.weight": expected.shapes[embedding]} | expected.shapes
        self._parts = {name: parts[hf_mapping.canonical(name)] for name, *_ in tensors}
        self._infos = {
            name: TensorInfo(shapes[hf_mapping.canonical(name)], np.dtype(dtype), Path(file))
            for name, dtype, file in tensors
        }

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata that the safetensors files had."""
        return dict(self.provenance.get("metadata", {}))

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Return a tensor or a basic slice of it, often as a view in no order.

        Of the two largest, embedding and head, a slice along the first dimension reads no more than itself.

        Raises:
          KeyError: there is no such tensor.
          CheckpointError: the data are damaged.
        """
        rule, path = self._parts[name].rule, self._parts[name].path
        if rule.suffix:
            return self._stored_tensor(name)[index]
        tensor_axes, leaf_axes = rule.axes()
        wanted = [slice(None)] * len(leaf_axes)
        sizes = self._sizes
        first = index[0] if isinstance(index, tuple) and index else index
        if isinstance(first, slice) and first.step in (None, 1) and tensor_axes[0] in leaf_axes:
            wanted[leaf_axes.index(tensor_axes[0])] = first
            index = (slice(None), *index[1:]) if isinstance(index, tuple) else ...
            sizes = sizes | {tensor_axes[0][0]: len(range(*first.indices(self._infos[name].shape[0])))}
        if rule.part is not None:
            axis, number = rule.part
            wanted.insert(axis, slice(number, number + 1))
        leaf = self.leaves.read(path, tuple(wanted))
        if rule.part is not None:
            leaf = leaf.squeeze(rule.part[0])
        return rule.to_tensor(leaf, sizes)[index].astype(self._infos[name].dtype, copy=False)

    def _stored_tensor(self, name: str) -> np.ndarray:
        """One of the tensors that a quantised weight is stored as."""
        rule, path, stored = self._parts[name].rule, self._parts[name].path, self.leaves.stored
        info, shape = self._infos[name], rule.tensor_shape(self._sizes)
        assert stored is not None
        if rule.suffix == SHAPE:
            return np.array(shape, info.dtype)
        if rule.suffix == SCALE:
            layout = ScaleLayout.of(rule, stored, self._sizes)
            return layout.read(self._leaf(scale_path(path)), info.shape[1]).astype(info.dtype)
        if not stored.symmetric:
            raise CheckpointError(
                f"{self.directory}: {name}: found integers less their zero points; expected the safetensors that they "
                "were converted from"
            )
        values = rule.to_tensor(self._leaf(path)[rule.index], self._sizes)
        return pack(values, stored.bits) if rule.suffix == PACKED else values

    def _leaf(self, path: str) -> np.ndarray:
        return self.leaves.read(path, (slice(None),) * len(self.leaves.infos[path].shape))

    def release(self) -> None:
        """Nothing is kept between reads."""


def _checked_tensors(
    directory: Path, provenance: Mapping[str, Any], expected: ExpectedTensors, config: Glm4vConfig
) -> list[tuple[str, str, str]]:
    """Name, dtype and file of the tensors that a checkpoint was converted from.

    Raises:
      CheckpointError: the provenance is malformed, or the tensors are not those of a model of this configuration; all
        faults are listed.
    """
    faults = [
        fault(key, provenance[key], "a JSON object")
        for key in ("metadata", "source")
        if not isinstance(provenance.get(key, {}), Mapping)
    ]
    listed = provenance["tensors"]
    tensors: list[tuple[str, str, str]] = []
    for entry in listed if isinstance(listed, list) else [listed]:
        try:
            tensors.append(msgspec.convert(entry, tuple[str, hf_mapping.Dtype | _Integers, str]))
        except msgspec.ValidationError:
            dtypes = ", ".join(hf_mapping.DTYPES + get_args(_Integers))
            fields = f"name, dtype ({dtypes}) and file of a tensor"
            faults.append(fault("tensors", entry, fields))
    where = f"{directory}: {METADATA_KEY}"
    raise_faults(faults, CheckpointError, where=where)
    found = (
        (name, TensorInfo(expected.shapes.get(hf_mapping.canonical(name), ()), np.dtype(dtype)))
        for name, dtype, _ in tensors
    )
    listed = hf_mapping.without_tied_head(config, found)
    hf_mapping.check_tensors(listed, expected.shapes, f"{where}: tensors", dtypes=expected.dtypes)
    return tensors


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{path}.{name}" if path else str(name))
