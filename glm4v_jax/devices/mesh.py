"""The device mesh, and the one table from logical axis names to mesh axes.

Every array of the model has logical axis names ("embed", "kv_heads", ...). `RULES` maps them to the mesh axes
`data, fsdp, kv, q, seq`; nothing else in the package names a mesh axis. The tensor axis is split in three because the
9B has only two key and value heads: one axis wider than that makes the partitioner split and copy the cache at every
step. Weights and query heads are sharded alike over `q` and `seq`. Along `q` keys and values are replicated; along
`seq` the slots of the cache are sharded, for long contexts: less of the cache to hold and to read, for two more small
collectives per layer.

A mesh of one device is the default, so that there is a single code path.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from glm4v_jax.errors import ConfigError, counted

AXES = ("data", "fsdp", "kv", "q", "seq")

TENSOR = ("kv", "q", "seq")
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    # activations
    "batch": ("data", "fsdp"),
    "rows": ("data", "fsdp"),
    "length": None,
    # Work on tokens that all devices of the tensor axis would repeat is sharded: the residual stream between blocks,
    # and attention of the ViT, whose heads take only a part of that axis.
    "tokens": TENSOR,
    "patches": ("q", "seq"),
    "slots": "seq",
    # parameters, and the activations that follow them
    "layers": None,
    "embed": "fsdp",
    "vocab": TENSOR,
    "kv_heads": "kv",
    "q_groups": ("q", "seq"),
    # The ViT's heads, 12 in the 9B, divide by kv alone; its MLPs, most of its work, by the whole tensor axis.
    "heads": "kv",
    "head_dim": None,
    "mlp": TENSOR,
}


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    kv: int = 1,
    q: int = 1,
    seq: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make a mesh of `data x fsdp x kv x q x seq` devices with explicit axis types.

    >>> dict(make_mesh().shape)
    {'data': 1, 'fsdp': 1, 'kv': 1, 'q': 1, 'seq': 1}

    Args:
      data: replicas of the model, which share the batch.
      fsdp: shards of every weight, which share the batch too.
      kv: shards of key and value heads.
      q: shards of the query heads of a key head.
      seq: as `q`, with the slots of the cache sharded.
      devices: the first of these, by default of all.

    Raises:
      ConfigError: there are fewer devices than that, or a size is below 1.
    """
    sizes = (data, fsdp, kv, q, seq)
    if min(sizes) < 1:
        raise ConfigError(f"mesh: found {dict(zip(AXES, sizes, strict=True))}; expected at least 1 of every axis")
    needed = math.prod(sizes)
    devices = list(devices) if devices is not None else jax.devices()
    if len(devices) < needed:
        named = " ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1)
        raise ConfigError(f"mesh {named} needs {counted(needed, 'device')}, found {len(devices)}")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices[:needed])


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None = None) -> Iterator[Mesh]:
    """Run the body inside `mesh`, or the mesh that is already set, or a mesh of one of this process's devices.

    >>> with use_mesh() as mesh:
    ...     mesh.size
    1
    """
    if mesh is None:
        current = jax.sharding.get_mesh()
        mesh = current if not current.empty else make_mesh(devices=jax.local_devices())
    with jax.set_mesh(mesh):
        yield mesh


def spec(*axes: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def gathered(*axes: str | None) -> PartitionSpec:
    """As `spec`, with the `fsdp` shards of a parameter gathered: how it is used, as opposed to how it is kept."""
    return PartitionSpec(*(None if RULES[axis] == "fsdp" else RULES[axis] for axis in axes))


def shards(axis: str | None) -> int:
    """Number of shards of a dimension of this logical name in the current mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in names_of(RULES[axis]))


def round_up(size: int, axis: str) -> int:
    """The smallest size, `size` or above, of a dimension of this name that divides by the current mesh."""
    return size + -size % shards(axis)


def names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension of a partition."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def spec_of(x: jax.Array) -> PartitionSpec:
    """An array's partition, with an entry for every dimension."""
    entries = tuple(jax.typeof(x).sharding.spec)
    return PartitionSpec(*entries, *(None,) * (x.ndim - len(entries)))


def used(x: jax.Array) -> jax.Array:
    """Gather the `fsdp` shards of a parameter, whatever its logical axes are; see `gathered`."""
    return jax.sharding.reshard(x, PartitionSpec(*(None if entry == "fsdp" else entry for entry in spec_of(x))))


def check_divides(shape: Sequence[int], axes: Sequence[str | None]) -> None:
    """Check that an array of this shape divides by the mesh axes of its logical names.

    Raises:
      ConfigError: a dimension does not divide by the devices along its mesh axes.
    """
    for size, axis in zip(shape, axes, strict=True):
        if size % (count := shards(axis)):
            raise ConfigError(misfit(axis, size, names_of(RULES[axis]), count))


def misfit(name: str | None, size: int, axes: Sequence[str], devices: int) -> str:
    """The fault of a dimension that does not divide by the devices along its mesh axes."""
    return f"{name} of {size} is not divisible by mesh axes {' x '.join(axes)} of {devices} devices"


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Reshard `x` to the partition of these logical names."""
    return jax.sharding.reshard(x, spec(*axes))


def platform() -> str:
    """The platform of the current mesh, as JAX names it: "cpu", "tpu", "gpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def data_shards() -> int:
    """Number of shards of batches and vision rows in the current mesh."""
    return shards("batch")
