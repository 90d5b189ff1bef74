"""List what is in a checkpoint: tensors, shapes, dtypes, shardings, bytes per device of a mesh. No data are read."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.compressed_tensors import SCALE, SHAPE, ScaleLayout, match, parameters_of
from glm4v_jax.checkpoints.orbax_read import OrbaxCheckpoint, Weights, open_weights
from glm4v_jax.checkpoints.plan import check_scheme
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import stored_quantization
from glm4v_jax.devices.mesh import AXES
from glm4v_jax.model.quantize import scale_path
from glm4v_jax.planning.parameter_layout import check_mesh, parameter_layout

_MODULE = re.compile(r"^(lm_head|(?:language_model|visual)\.[a-z_]+)")


@dataclasses.dataclass(frozen=True)
class Group:
    """The tensors of one rule of the table: one per layer, or a single one.

    Attributes:
      name: as the table spells it, `{i}` for the layer.
      count: how many tensors.
      shape, dtype: of each; dtypes separated by "/" where the layers have several.
      parameters, nbytes: of all of them; of a quantised weight, its integers have the parameters.
      leaf: of the model, with the index after it of a part of a fused one, as `[:, 1]`; none of a weight's shape, or of
        an extra layer (`hf_mapping`).
      sharding: mesh axes of each dimension of the leaf, "-" where it is not sharded.
      device_bytes: what one device of the mesh holds of all of them, in the checkpoint's dtype or quantised.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    nbytes: int
    leaf: str
    sharding: tuple[str, ...]
    device_bytes: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The content of a checkpoint.

    Attributes:
      directory: of the checkpoint.
      format: "safetensors" or "orbax".
      mesh: axis -> devices.
      groups: in the table's order.
      modules: module -> parameters, a parent before its children.
    """

    directory: Path
    format: str
    mesh: dict[str, int]
    groups: tuple[Group, ...]
    modules: dict[str, int]

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return sum(group.count for group in self.groups)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(group.parameters for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(group.nbytes for group in self.groups)

    @property
    def device_bytes(self) -> int:
        """Bytes that one device of the mesh holds."""
        return sum(group.device_bytes for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Return the content for JSON."""
        totals = {name: getattr(self, name) for name in ("tensors", "parameters", "nbytes", "device_bytes")}
        groups = [dataclasses.asdict(group) for group in self.groups]
        head = {"directory": str(self.directory), "format": self.format, "mesh": self.mesh}
        return {**head, **totals, "modules": self.modules, "groups": groups}


def inspect(directory: str | Path, mesh: dict[str, int] | None = None, quantize: str = "none") -> Inspection:
    """Read the headers of a checkpoint in either format; no data, and no devices are needed for the mesh.

    Args:
      directory: of the checkpoint.
      mesh: axis -> devices; one of each by default.
      quantize: the scheme by which the weights will be quantised as they are loaded, for the bytes per device.

    Raises:
      CheckpointError: files are missing, truncated or corrupt, or tensors do not fit the configuration.
      ConfigError: the configuration is not a GLM-4.1V's, or does not divide by the mesh.
    """
    directory = Path(directory)
    config = Glm4vConfig.from_pretrained(directory)
    files = open_weights(directory)
    stored, sizes = stored_quantization(directory), hf_mapping.dimensions(config)
    matched = match(config, files, str(directory), stored)
    mesh = dict.fromkeys(AXES, 1) | (mesh or {})
    check_mesh(config, mesh, quantize)
    leaves = {leaf.path: leaf for leaf in parameter_layout(config)}
    names: dict[hf_mapping.Rule, list[str]] = {}
    for name, part in matched.items():
        names.setdefault(part.rule, []).append(name)
    groups = []
    for rule, members in names.items():
        infos = [files[name] for name in members]
        leaf = leaves[rule.leaf]
        if stored is not None and rule.suffix == SCALE:
            dropped = ScaleLayout.of(rule, stored, sizes).dropped
            kept = [names for axis, names in enumerate(leaf.axes) if axis not in dropped]
            leaf = dataclasses.replace(leaf, path=scale_path(leaf.path), axes=tuple(kept))
        if rule.suffix == SHAPE:
            leaf = dataclasses.replace(leaf, path="", axes=())
        groups.append(
            Group(
                name=rule.tensor,
                count=len(members),
                shape=infos[0].shape,
                dtype="/".join(sorted({info.dtype.name for info in infos})),
                parameters=len(members) * parameters_of(rule, sizes),
                nbytes=sum(info.nbytes for info in infos),
                leaf=leaf.path if rule.part is None else f"{leaf.path}[{':, ' * rule.part[0]}{rule.part[1]}]",
                sharding=tuple("+".join(axes) or "-" for axes in leaf.axes),
                device_bytes=0 if rule.suffix == SHAPE else sum(info.nbytes // leaf.shards(mesh) for info in infos),
            )
        )
    groups += _extras(config, files)
    if quantize != "none":
        check_scheme(quantize, stored)
        groups = _quantized(groups, config, quantize, mesh)
    kind = "orbax" if isinstance(files, OrbaxCheckpoint) else "safetensors"
    return Inspection(directory, kind, mesh, tuple(groups), _modules(groups))


def _extras(config: Glm4vConfig, files: Weights) -> Iterator[Group]:
    """The tensors of extra layers, one by one: no leaf has them."""
    for name, info in files.items():
        key = hf_mapping.canonical(name)
        if hf_mapping.is_extra(config, key):
            size = math.prod(info.shape)
            yield Group(key, 1, info.shape, info.dtype.name, size, info.nbytes, "", ("-",) * len(info.shape), 0)


def _quantized(groups: list[Group], config: Glm4vConfig, scheme: str, mesh: dict[str, int]) -> list[Group]:
    """The groups with what a device holds of them once they are integers with their scales."""
    floats = {leaf.path: leaf for leaf in parameter_layout(config)}
    layout = {leaf.path: leaf for leaf in parameter_layout(config, scheme)}
    changed = []
    for group in groups:
        path, is_integer = group.leaf.partition("[")[0], group.dtype.startswith("int")
        if not is_integer and (scale := layout.get(scale_path(path))) is not None:
            nbytes = sum(leaf.device_parameters(mesh) * (leaf.bits or 0) // 8 for leaf in (layout[path], scale))
            # Of a fused leaf, the part that these tensors are.
            group = dataclasses.replace(group, device_bytes=nbytes * group.parameters // floats[path].parameters)
        changed.append(group)
    return changed


def _modules(groups: list[Group]) -> dict[str, int]:
    """Module -> parameters, of parents and their children."""
    counts: collections.Counter[str] = collections.Counter()
    for group in groups:
        match = _MODULE.match(group.name)
        assert match is not None
        counts[match[1]] += group.parameters
        if "." in match[1]:
            counts[match[1].split(".")[0]] += group.parameters
    return dict(sorted(counts.items()))
