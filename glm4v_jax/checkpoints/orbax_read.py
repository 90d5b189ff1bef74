"""Checkpoints in Orbax format: what is in them, read as leaves of the model or as Hugging Face's tensors.

On disk the model is a tree with one leaf for each parameter of each layer (OCDBT, zarr3), whatever layout the layers
had in memory, so that it can be written and read group by group, and onto any mesh. Files beside the weights are in
`assets/`; `custom_metadata` tells where the weights came from, and how their tensors were called (see
`checkpoint_write`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.atomic_directory import is_unfinished
from glm4v_jax.checkpoints.leaves import LeafInfo, Leaves, Slices, TensorLeaves
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, Index, TensorInfo, open_checkpoint
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import is_orbax

__all__ = ["OrbaxCheckpoint", "is_orbax", "leaves_of", "open_weights"]

METADATA_KEY = "glm4v_jax"
FORMAT = 1


def open_weights(directory: str | Path) -> "CheckpointFiles | OrbaxCheckpoint":
    """The tensors of a checkpoint in either format, by the names that Hugging Face's layout gives them.

    Raises:
      CheckpointError: it is in neither format, damaged, or what an interrupted conversion has left.
    """
    if is_unfinished(directory):
        raise CheckpointError(f"{directory}: found what an unfinished conversion left; expected a complete checkpoint")
    return OrbaxCheckpoint(directory) if is_orbax(directory) else open_checkpoint(directory)


def leaves_of(files: "CheckpointFiles | OrbaxCheckpoint", config: Glm4vConfig) -> Leaves:
    """The same as leaves of a model of this configuration.

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
            raise CheckpointError(f"{directory}: not a readable Orbax checkpoint ({error})") from error
        if not isinstance(described.metadata, Mapping):  # Orbax has logged why
            raise CheckpointError(f"{directory}: not a readable Orbax checkpoint: its metadata are damaged")
        self.custom_metadata: Mapping[str, Any] = described.custom_metadata or {}
        found = dict(_flat(described.metadata))
        expected = _expected(config)
        problems = [f"unexpected: {path} {list(leaf.shape)}" for path, leaf in found.items() if path not in expected]
        infos: dict[str, LeafInfo] = {}
        for path, (shape, tensors) in expected.items():
            if path not in found:
                problems.append(f"missing: {path} {list(shape)}")
                continue
            leaf = found[path]
            dtype = np.dtype(leaf.dtype)
            if tuple(leaf.shape) != shape:
                problems.append(f"misshapen: {path} has shape {list(leaf.shape)}, expected {list(shape)}")
            elif dtype.name not in hf_mapping.DTYPES:
                wanted = ", ".join(hf_mapping.DTYPES)
                problems.append(f"of a wrong dtype: {path} is {dtype.name}, expected one of {wanted}")
            infos[path] = LeafInfo(shape, dtype, int(np.prod(shape)) * dtype.itemsize, tensors)
        self.infos: Mapping[str, LeafInfo] = infos
        if problems:
            listed = "; ".join(sorted(problems))
            raise CheckpointError(f"{directory}: {len(problems)} leaves do not fit the configuration: {listed}")

    def read(self, path: str, index: Slices) -> np.ndarray:
        """A slice of a leaf, without steps, with an array of its own; only the chunks that it needs are read."""
        try:
            if path not in self._stores:
                base = (self._directory / "state").absolute().as_uri()
                kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": path}
                spec = {"driver": "zarr3", "kvstore": kvstore}
                self._stores[path] = tensorstore.open(spec, open=True, read=True, context=self._context).result()
            # TensorStore wants bounds that are within the array, where NumPy counts from its end or cuts them off.
            bounds = [entry.indices(length) for entry, length in zip(index, self.infos[path].shape, strict=True)]
            within = tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)
            return self._stores[path][within].read().result()
        except ValueError as error:
            raise CheckpointError(f"{self._directory}: {path}: cannot be read ({error})") from error

    def release(self) -> None:
        """Nothing is kept between reads."""


class OrbaxCheckpoint(Mapping[str, TensorInfo]):
    """An Orbax checkpoint in Hugging Face's terms: tensors by name, in their layout, dtype and order there.

    Names, dtypes and order are those of the checkpoint that was converted; where there was none, those that
    transformers writes. No data are read before `read`.

    Raises:
      CheckpointError: it is unfinished, cannot be read, is not that of a model of its configuration, or its notes
        about names and dtypes do not fit it.
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
        if self.provenance.get("tensors"):
            _check_notes(self.directory, self.provenance, self.config)
            rules = _known(self.config)
            listed = self.provenance["tensors"]
            self._places = {name: rules[hf_mapping.canonical(name)] for name, *_ in listed}
            self._infos = {name: self._info(name, dtype) for name, dtype, _ in listed}
        else:
            self._places = hf_mapping.tensor_rules(self.config)
            self._infos = {name: self._info(name, None) for name in self._places}

    def _info(self, name: str, dtype: str | None) -> TensorInfo:
        rule, layer = self._places[name]
        kept = np.dtype(dtype) if dtype is not None else self.leaves.infos[rule.path(layer)].dtype
        shape = rule.tensor_shape(self._sizes)
        return TensorInfo(shape, kept, int(np.prod(shape)) * kept.itemsize, self.directory)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def read(self, name: str, index: Index = ...) -> np.ndarray:
        """Returns a tensor or a basic slice of it, often as a view in no order; KeyError if there is none.

        Of the two largest, embedding and head, a slice along the first dimension reads no more than itself.

        Raises:
          CheckpointError: the data are damaged.
        """
        rule, layer = self._places[name]
        path = rule.path(layer)
        wanted = [slice(None)] * len(rule.axes()[1])
        tensor_axes, leaf_axes = rule.axes()
        first = index[0] if isinstance(index, tuple) and index else index
        if isinstance(first, slice) and first.step in (None, 1) and tensor_axes[0] in leaf_axes:
            wanted[leaf_axes.index(tensor_axes[0])] = first
            index = (slice(None), *index[1:]) if isinstance(index, tuple) else ...
            sizes = self._sizes | {tensor_axes[0][0]: len(range(*first.indices(self._infos[name].shape[0])))}
        else:
            sizes = self._sizes
        if rule.part is not None:
            axis, number = rule.part
            wanted.insert(axis, slice(number, number + 1))
        leaf = self.leaves.read(path, tuple(wanted))
        if rule.part is not None:
            leaf = leaf.squeeze(rule.part[0])
        return rule.to_tensor(leaf, sizes)[index].astype(self._infos[name].dtype, copy=False)

    def release(self) -> None:
        """Nothing is kept between reads."""


def _known(config: Glm4vConfig) -> dict[str, tuple[hf_mapping.Rule, int | None]]:
    """Name, without prefix, -> rule and layer of every tensor that a checkpoint may have."""
    rules = hf_mapping.wanted(config)
    if config.text_config.tie_word_embeddings:
        # Some checkpoints have the tied head a second time.
        rules["lm_head.weight"] = rules["language_model.embed_tokens.weight"]
    return rules


def _check_notes(directory: Path, provenance: Mapping[str, Any], config: Glm4vConfig) -> None:
    """Refuse notes about the source that name other tensors than a model of this configuration has.

    Raises:
      CheckpointError: all that is wrong with them.
    """
    known, listed = _known(config), provenance["tensors"]
    problems = [
        f"{key} is {provenance[key]!r}, expected a JSON object"
        for key in ("metadata", "source")
        if not isinstance(provenance.get(key, {}), Mapping)
    ]
    named: dict[str, str] = {}
    for entry in listed if isinstance(listed, list) else [listed]:
        if not isinstance(entry, list) or len(entry) != 3 or not all(isinstance(part, str) for part in entry):
            problems.append(f"an entry is {entry!r}, expected name, dtype and file of a tensor")
            continue
        name, dtype, _ = entry
        key = hf_mapping.canonical(name)
        if key not in known:
            problems.append(f"unexpected: {name}")
        if dtype not in hf_mapping.DTYPES:
            problems.append(f"of a wrong dtype: {name} is {dtype}, expected one of {', '.join(hf_mapping.DTYPES)}")
        if key in named:
            problems.append(f"doubled: {named[key]} and {name}")
        named[key] = name
    problems += [f"missing: {key}" for key in hf_mapping.wanted(config) if key not in named]
    if problems:
        raise CheckpointError(f"{directory}: its list of tensors does not fit it: {'; '.join(problems)}")


def _expected(config: Glm4vConfig) -> dict[str, tuple[tuple[int, ...], int]]:
    """Path -> shape, and number of tensors, of every leaf."""
    sizes = hf_mapping.dimensions(config)
    parts: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rule, layer in hf_mapping.wanted(config).values():
        path = rule.path(layer)
        parts[path] = parts.get(path, 0) + 1
        shapes[path] = rule.leaf_shape(sizes)
        if rule.part is not None:
            axis, _ = rule.part
            shapes[path] = (*shapes[path][:axis], parts[path], *shapes[path][axis:])
    return {path: (shapes[path], parts[path]) for path in shapes}


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{path}.{name}" if path else str(name))
