"""The device mesh, and the table from logical axis names to mesh axes.

Every array of the model has logical axis names ("embed", "kv_heads", ...). The current rules, by default `RULES`, map
them to mesh axes, by default `data, fsdp, kv, q, seq`; nothing else in the package names a mesh axis, and `use_rules`
sets others for a mesh of other axes. The tensor axis is split in three because the
9B has only two key and value heads: one axis wider than that makes the partitioner split and copy the cache at every
step. Weights and query heads are sharded alike over `q` and `seq`. Along `q` keys and values are replicated; along
`seq` the slots of the cache are sharded, for long contexts: less of the cache to hold and to read, for two more small
collectives per layer.

A mesh of one device is the default, so that there is a single code path.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm4v_jax.errors import ConfigError, counted

T = TypeVar("T")

AXES = ("data", "fsdp", "kv", "q", "seq")

TENSOR = ("kv", "q", "seq")
MeshAxes = str | tuple[str, ...] | None

NAMES = (
    # activations
    *("batch", "rows", "length", "tokens", "patches", "slots"),
    # parameters, and the activations that follow them
    *("layers", "embed", "vocab", "kv_heads", "q_groups", "heads", "head_dim", "mlp"),
)
"""The logical names of dimensions."""


class Rules(Mapping[str | None, MeshAxes]):
    """Logical name -> mesh axes, immutable; a name that is left out is sharded along none.

    >>> rules = Rules(heads="model", mlp=("data", "model"))
    >>> rules["mlp"], rules["embed"], rules.axes
    (('data', 'model'), None, ('model', 'data'))

    Attributes:
      axes: the mesh axes that it names.

    Raises:
      ConfigError: a name is not in `NAMES`.
    """

    def __init__(self, **axes: MeshAxes):
        for name in axes:
            if name not in NAMES:
                raise ConfigError(f"rules: found {name!r}; expected some of {', '.join(NAMES)}")
        self._axes: dict[str | None, MeshAxes] = {name: axes.get(name or "") for name in (None, *NAMES)}
        self.axes = tuple(dict.fromkeys(axis for entry in self._axes.values() for axis in names_of(entry)))
        self._key = hash(tuple(self._axes.items()))  # jit asks for it at every call

    def __getitem__(self, name: str | None) -> MeshAxes:
        return self._axes[name]

    def __iter__(self) -> Iterator[str | None]:
        return iter(self._axes)

    def __len__(self) -> int:
        return len(self._axes)

    def __hash__(self) -> int:
        return self._key

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Rules) and self._axes == other._axes)

    def __repr__(self) -> str:
        return f"Rules({', '.join(f'{name}={entry!r}' for name, entry in self._axes.items() if entry is not None)})"


def names_of(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of one dimension of a partition."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


RULES = Rules(
    batch=("data", "fsdp"),
    rows=("data", "fsdp"),
    # Work on tokens that all devices of the tensor axis would repeat is sharded: the residual stream between blocks,
    # and attention of the ViT, whose heads take only a part of that axis.
    tokens=TENSOR,
    patches=("q", "seq"),
    slots="seq",
    embed="fsdp",
    vocab=TENSOR,
    kv_heads="kv",
    q_groups=("q", "seq"),
    # The ViT's heads, 12 in the 9B, divide by kv alone; its MLPs, most of its work, by the whole tensor axis.
    heads="kv",
    mlp=TENSOR,
)
"""The rules of meshes that `make_mesh` makes."""

REPLICATED = Rules()
"""Rules that shard nothing: of programs in a mesh of Auto axes, which XLA partitions as their arrays are."""

_current = jax.make_user_context(RULES)  # of a thread, and a part of the keys of programs that jit keeps


def current_rules() -> Rules:
    """The rules of this thread: those of the innermost `use_rules`, or `RULES`."""
    return _current.value


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[Rules]:
    """Run the body with other rules; programs compiled with one table are never called with another.

    >>> with use_rules(Rules(heads="model")):
    ...     spec("heads", "mlp")
    P('model', None)

    A thread that the body starts has `RULES` again: hand `current_rules()` on to it.
    """
    with _current(rules):
        yield rules


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


def current_mesh() -> Mesh:
    """The mesh that is set, or one of one of this process's devices."""
    current = jax.sharding.get_mesh()
    return make_mesh(devices=jax.local_devices()) if current.empty else current


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None = None, rules: Rules | None = None) -> Iterator[Mesh]:
    """Run the body inside `mesh`, or the mesh that is already set, or a mesh of one of this process's devices.

    >>> with use_mesh() as mesh:
    ...     mesh.size
    1

    Args:
      mesh: of which the rules name Explicit axes.
      rules: by default those that are already set.

    Raises:
      ConfigError: the rules name another axis.
    """
    mesh = current_mesh() if mesh is None else mesh
    rules = current_rules() if rules is None else rules
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if foreign := [axis for axis in rules.axes if types.get(axis) != AxisType.Explicit]:
        raise ConfigError(
            f"rules: found mesh axes {', '.join(foreign)}; expected Explicit ones of the mesh {mesh.shape_tuple}: "
            "see devices.mesh.use_rules"
        )
    with jax.set_mesh(mesh), use_rules(rules):
        yield mesh


def explicit(mesh: Mesh) -> Mesh:
    """The mesh of the same devices and axes with Explicit types: itself where it has them.

    >>> explicit(jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])).axis_types
    (Explicit,)
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))


def reshaped(mesh: Mesh, sizes: Mapping[str, int]) -> Mesh:
    """Make a mesh of other sizes of the same devices in the same order: a program can then take arrays from both.

    `make_mesh` may order the chips of a TPU slice anew for other sizes.

    >>> dict(reshaped(make_mesh(), {"kv": 1}).shape)
    {'data': 1, 'fsdp': 1, 'kv': 1, 'q': 1, 'seq': 1}

    Raises:
      ConfigError: it is of another number of devices.
    """
    counts = [sizes.get(axis, 1) for axis in AXES]
    if math.prod(counts) != mesh.size:
        named = " ".join(f"{axis}={size}" for axis, size in zip(AXES, counts, strict=True) if size > 1)
        raise ConfigError(
            f"mesh {named or 'of one device'}: found {counted(mesh.size, 'device')} in the other mesh; "
            f"expected {math.prod(counts)}, the same devices in both"
        )
    return explicit(Mesh(mesh.devices.reshape(counts), AXES))


def placed_on(tree: T, mesh: Mesh) -> T:
    """The same arrays, not copied, on a mesh of the same devices and axes, whose types may be others."""

    def placed(x: jax.Array) -> jax.Array:
        assert isinstance(x.sharding, NamedSharding)
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, x.sharding.spec), shards)

    return jax.tree.map(placed, tree)


def spec(*axes: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names."""
    rules = current_rules()
    return PartitionSpec(*(rules[axis] for axis in axes))


def gathered(*axes: str | None) -> PartitionSpec:
    """As `spec`, with the shards of `embed` gathered: how a parameter is used, as opposed to how it is kept."""
    return spec(*(None if axis == "embed" else axis for axis in axes))


def shards(axis: str | None) -> int:
    """Number of shards of a dimension of this logical name in the current mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in names_of(current_rules()[axis]))


def round_up(size: int, axis: str) -> int:
    """The smallest size, `size` or above, of a dimension of this name that divides by the current mesh."""
    return size + -size % shards(axis)


def spec_of(x: jax.Array) -> PartitionSpec:
    """An array's partition, with an entry for every dimension."""
    entries = tuple(jax.typeof(x).sharding.spec)
    return PartitionSpec(*entries, *(None,) * (x.ndim - len(entries)))


def used(x: jax.Array) -> jax.Array:
    """Gather a parameter along the mesh axes of `embed`, whatever its logical axes are; see `gathered`."""
    kept = current_rules()["embed"]
    return jax.sharding.reshard(x, PartitionSpec(*(None if entry == kept else entry for entry in spec_of(x))))


def check_divides(shape: Sequence[int], axes: Sequence[str | None]) -> None:
    """Check that an array of this shape divides by the mesh axes of its logical names.

    Raises:
      ConfigError: a dimension does not divide by the devices along its mesh axes.
    """
    for size, axis in zip(shape, axes, strict=True):
        if size % (count := shards(axis)):
            raise ConfigError(misfit(axis, size, names_of(current_rules()[axis]), count))


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
