"""The device mesh, and the one table from logical axis names to mesh axes.

Every array of the model carries logical axis names ("embed", "kv_heads", ...). `RULES` maps them to the mesh axes
`data, fsdp, kv, q`, and nothing else in the package names a mesh axis. The tensor axis is split in two because the 9B
has only two key and value heads: one axis wider than that makes the partitioner split and copy the cache at every
step.

A mesh of one device is the default, so there is a single code path: more devices add a mesh, not a branch.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from glm4v_jax.errors import ConfigError

AXES = ("data", "fsdp", "kv", "q")

TENSOR = ("kv", "q")
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    # activations
    "batch": ("data", "fsdp"),
    "rows": ("data", "fsdp"),
    "length": None,
    # parameters, and the activations that follow them
    "layers": None,
    "embed": "fsdp",
    "vocab": TENSOR,
    "kv_heads": "kv",
    "q_groups": "q",
    # The ViT's heads, 12 in the 9B, divide by no more than kv; its MLPs, most of its work, take the whole tensor axis.
    "heads": "kv",
    "head_dim": None,
    "mlp": TENSOR,
}


def make_mesh(
    data: int = 1, fsdp: int = 1, kv: int = 1, q: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `data x fsdp x kv x q` devices with explicit axis types.

    Raises:
      ConfigError: there are fewer devices than that.
    """
    needed = data * fsdp * kv * q
    devices = list(devices) if devices is not None else jax.devices()
    if len(devices) < needed:
        raise ConfigError(f"mesh data={data} fsdp={fsdp} kv={kv} q={q} needs {needed} devices, found {len(devices)}")
    return jax.make_mesh((data, fsdp, kv, q), AXES, axis_types=(AxisType.Explicit,) * 4, devices=devices[:needed])


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None = None) -> Iterator[Mesh]:
    """Run the body inside `mesh`, or inside the mesh that is already set, or inside one device's."""
    if mesh is None:
        current = jax.sharding.get_mesh()
        mesh = current if not current.empty else make_mesh()
    with jax.set_mesh(mesh):
        yield mesh


def spec(*axes: str | None) -> PartitionSpec:
    """Partition of an array whose dimensions have these logical names."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def gathered(*axes: str | None) -> PartitionSpec:
    """As `spec`, with the `fsdp` shards of a parameter put together: how it is used, as opposed to how it is kept."""
    return PartitionSpec(*(None if RULES[axis] == "fsdp" else RULES[axis] for axis in axes))


def check_divides(shape: Sequence[int], axes: Sequence[str | None]) -> None:
    """Check that a parameter of this shape can be kept in the partition of its logical axes.

    Raises:
      ConfigError: a dimension does not divide by the devices along its mesh axes.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    for size, axis in zip(shape, axes, strict=True):
        rule = RULES[axis]
        names = rule if isinstance(rule, tuple) else () if rule is None else (rule,)
        shards = math.prod(sizes[name] for name in names)
        if size % shards:
            raise ConfigError(f"{axis} of {size} does not divide by mesh axes {' x '.join(names)} of {shards} devices")


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Move `x` to the partition of these logical names."""
    return jax.sharding.reshard(x, spec(*axes))


def data_shards() -> int:
    """In how many shards batches and vision rows are split in the current mesh."""
    shape = jax.sharding.get_mesh().shape
    return shape["data"] * shape["fsdp"]
