"""What is in a checkpoint: tensors, shapes, dtypes, shardings, bytes for a device of a mesh. No data are read."""

import collections
import concurrent.futures
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from convert.reading import check_tensors, open_weights
from glm4v_jax import weights
from glm4v_jax.checkpoint import OrbaxCheckpoint
from glm4v_jax.config import Glm4vConfig
from glm4v_jax.errors import ConfigError
from glm4v_jax.loading import leaf_paths
from glm4v_jax.mesh import AXES
from glm4v_jax.model import Glm4v

MOST_DEVICES = 1 << 20
"""More than any machine has; what is beyond does not fit the arithmetic of shardings either."""

_MODULE = re.compile(r"^(lm_head|(?:language_model|visual)\.[a-z_]+)")


@dataclasses.dataclass(frozen=True)
class Group:
    """Equal tensors of the layers, or a tensor by itself.

    name: as the table spells it, `{i}` for the layer.
    count: how many tensors.
    shape, dtype: of each; dtypes separated by "/" where the layers have several.
    parameters, nbytes: of all of them.
    leaf: where they go in the model; `[:, 1]` after it for a part of a fused one.
    sharding: mesh axes of each dimension of the leaf, "-" where it is whole.
    device_bytes: what one device of the mesh holds of all of them, in the checkpoint's dtype.
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
    """What a checkpoint holds.

    directory: of the checkpoint.
    format: "safetensors" or "orbax".
    mesh: axis -> devices.
    groups: in the table's order.
    modules: module -> parameters, a parent before its parts.
    """

    directory: Path
    format: str
    mesh: dict[str, int]
    groups: tuple[Group, ...]
    modules: dict[str, int]

    @property
    def tensors(self) -> int:
        """How many tensors."""
        return sum(group.count for group in self.groups)

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(group.parameters for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(group.nbytes for group in self.groups)

    @property
    def device_bytes(self) -> int:
        """What one device of the mesh holds."""
        return sum(group.device_bytes for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        totals = {name: getattr(self, name) for name in ("tensors", "parameters", "nbytes", "device_bytes")}
        groups = [dataclasses.asdict(group) for group in self.groups]
        head = {"directory": str(self.directory), "format": self.format, "mesh": self.mesh}
        return {**head, **totals, "modules": self.modules, "groups": groups}


def parse_mesh(text: str) -> dict[str, int]:
    """Axis -> devices of "data=1,fsdp=4,kv=2,q=1"; axes left out have one.

    Raises:
      ConfigError: an axis is unknown or named twice, its number is none, or there are too many devices.
    """
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, number = (piece.strip() for piece in part.partition("="))
        if axis not in AXES or axis in seen or not re.fullmatch(r"[1-9]\d{0,18}", number):
            raise ConfigError(
                f"mesh: found {part!r} in {text!r}; expected some of {', '.join(AXES)}, as in fsdp=4,kv=2"
            )
        seen.add(axis)
        sizes[axis] = int(number)
    if (count := math.prod(sizes.values())) > MOST_DEVICES:
        raise ConfigError(f"mesh: found {count:,} devices in {text!r}; expected at most {MOST_DEVICES:,}")
    return sizes


def inspect(directory: str | Path, mesh: dict[str, int] | None = None) -> Inspection:
    """Read the headers of a checkpoint in either format; no data, and no devices are needed for the mesh.

    Args:
      directory: of the checkpoint.
      mesh: axis -> devices; one of each by default.

    Raises:
      CheckpointError: files are missing, truncated or corrupt, or tensors do not fit the configuration.
      ConfigError: the configuration is not a GLM-4.1V's, or does not divide by the mesh.
    """
    directory = Path(directory)
    config = Glm4vConfig.from_pretrained(directory)
    files = open_weights(directory)
    sources = check_tensors(files, config)
    mesh = dict.fromkeys(AXES, 1) | (mesh or {})
    leaves = _abstract_leaves(config, mesh)
    collected: dict[str, list[weights.Source]] = {}
    for source in sources:
        collected.setdefault(source.rule.tensor, []).append(source)
    groups = []
    for name, members in collected.items():
        rule, infos = members[0].rule, [files[member.tensor] for member in members]
        spec, shards = leaves[rule.leaf]
        groups.append(
            Group(
                name=name,
                count=len(members),
                shape=tuple(infos[0].shape),
                dtype="/".join(sorted({info.dtype.name for info in infos})),
                parameters=sum(math.prod(info.shape) for info in infos),
                nbytes=sum(info.nbytes for info in infos),
                leaf=rule.leaf if rule.part is None else f"{rule.leaf}[{':, ' * rule.part[0]}{rule.part[1]}]",
                sharding=spec,
                device_bytes=sum(info.nbytes // shards for info in infos),
            )
        )
    kind = "orbax" if isinstance(files, OrbaxCheckpoint) else "safetensors"
    return Inspection(directory, kind, mesh, tuple(groups), _modules(groups))


def _abstract_leaves(config: Glm4vConfig, mesh: dict[str, int]) -> dict[str, tuple[tuple[str, ...], int]]:
    """Leaf, as the table has it, -> mesh axes of its dimensions, and into how many pieces it is cut."""
    axes = AbstractMesh(tuple(mesh[axis] for axis in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))

    def make() -> Glm4v:
        with jax.sharding.use_abstract_mesh(axes):
            return jax.eval_shape(lambda: Glm4v.init(config))

    # In a thread of its own: a mesh that the caller has set holds for the caller's thread, and would be in the way.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        model = thread.submit(make).result()
    found = {}
    for path, leaf in zip(leaf_paths(model), jax.tree.leaves(model), strict=True):
        spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
        whole = math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))
        if ".stacked." in path:
            spec = spec[1:]
        found[path.replace(".stacked.", ".")] = (tuple(map(_axis_text, spec)), whole)
    return found


def _axis_text(axis: str | tuple[str, ...] | None) -> str:
    if axis is None:
        return "-"
    return axis if isinstance(axis, str) else "+".join(axis)


def _modules(groups: list[Group]) -> dict[str, int]:
    """Module -> parameters: the parts, and what the parts are made of."""
    counts: collections.Counter[str] = collections.Counter()
    for group in groups:
        match = _MODULE.match(group.name)
        assert match is not None
        counts[match[1]] += group.parameters
        if "." in match[1]:
            counts[match[1].split(".")[0]] += group.parameters
    return dict(sorted(counts.items()))
