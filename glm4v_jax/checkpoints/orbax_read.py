"""Checkpoints in Orbax format: what is in them, read as leaves of the model or as Hugging Face's tensors.

On disk the model is a tree with one leaf for each parameter of each layer (OCDBT, zarr3), whatever layout the layers
had in memory, so that it can be written and read group by group, and onto any mesh. Files beside the weights are in
`assets/`; `custom_metadata` says where the weights came from, and how their tensors were called (see `orbax_write`).
TensorStore reads the leaves, not Orbax, whose reader materialises whole leaves: here each process reads slices.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.atomic_directory import is_unfinished
from glm4v_jax.checkpoints.leaves import Leaves, Slices, TensorLeaves
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, Index, TensorInfo, open_checkpoint
from glm4v_jax.config.checks import fault, raise_faults
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import is_orbax, model_directory

METADATA_KEY = "glm4v_jax"
FORMAT = 1


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
    """

    def __init__(self, directory: Path, config: Glm4vConfig):
        self._directory = directory
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
        expected = hf_mapping.leaf_shapes(config)
        hf_mapping.check_tensors(found.items(), expected, str(directory), spell=str)
        self.infos: Mapping[str, TensorInfo] = {path: found[path] for path in expected}

    def read(self, path: str, index: Slices) -> np.ndarray:
        """Return a slice, without steps, of a leaf as a new array; only the chunks that it needs are read."""
        try:
            if path not in self._stores:
                base = (self._directory / "state").absolute().as_uri()
                kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": path}
                spec = {"driver": "zarr3", "kvstore": kvstore}
                self._stores[path] = tensorstore.open(spec, open=True, read=True, context=self._context).result()
            # TensorStore wants bounds within the array, where NumPy counts from its end or clips them.
            bounds = [entry.indices(length) for entry, length in zip(index, self.infos[path].shape, strict=True)]
            within = tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)
            return self._stores[path][within].read().result()
        except ValueError as error:
            raise CheckpointError(
                f"{self._directory}: {path}: found unreadable data ({error}); expected an array"
            ) from error

    def release(self) -> None:
        """Nothing is kept between reads."""


class OrbaxCheckpoint(Mapping[str, TensorInfo]):
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
        self._parts = hf_mapping.tensor_rules(self.config)
        tensors: Any = [(name, self.leaves.infos[part.path].dtype.name, "") for name, part in self._parts.items()]
        if self.provenance.get("tensors"):
            tensors = _checked_tensors(self.directory, self.provenance, self._parts, self.config)
            known = hf_mapping.wanted(self.config)
            # Some checkpoints have a tied head a second time.
            known.setdefault("lm_head.weight", known["language_model.embed_tokens.weight"])
            self._parts = {name: known[hf_mapping.canonical(name)] for name, *_ in tensors}
        self._infos = {
            name: TensorInfo(self._parts[name].rule.tensor_shape(self._sizes), np.dtype(dtype), Path(file))
            for name, dtype, file in tensors
        }

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

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

    def release(self) -> None:
        """Nothing is kept between reads."""


def _checked_tensors(
    directory: Path, provenance: Mapping[str, Any], parts: Mapping[str, hf_mapping.LeafPart], config: Glm4vConfig
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
            tensors.append(msgspec.convert(entry, tuple[str, hf_mapping.Dtype, str]))
        except msgspec.ValidationError:
            expected = f"name, dtype ({', '.join(hf_mapping.DTYPES)}) and file of a tensor"
            faults.append(fault("tensors", entry, expected))
    where = f"{directory}: {METADATA_KEY}"
    raise_faults(faults, CheckpointError, where=where)
    sizes = hf_mapping.dimensions(config)
    shapes = {hf_mapping.canonical(name): part.rule.tensor_shape(sizes) for name, part in parts.items()}
    found = (
        (name, TensorInfo(shapes.get(hf_mapping.canonical(name), ()), np.dtype(dtype))) for name, dtype, _ in tensors
    )
    hf_mapping.check_tensors(hf_mapping.without_tied_head(config, found), shapes, f"{where}: tensors")
    return tensors


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{path}.{name}" if path else str(name))
