"""How the parameters of a configuration are sharded on a mesh: shapes and mesh axes, from the abstract model alone.

No devices are needed: the layout is traced once, on a mesh of one abstract device; shapes on a larger mesh follow by
division.
"""

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import AXES, Rules, current_rules, misfit, names_of, use_rules
from glm4v_jax.errors import ConfigError
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import Linear
from glm4v_jax.model.params import leaf_paths
from glm4v_jax.model.quantize import bits_of, for_inference, is_scale, quantize_model


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """A parameter, or the parameters of all layers that have the same path and shape.

    path: as `glm4v_jax.checkpoints.hf_mapping` has it: "language_model.layers.mlp.down.kernel".
    count: number of layers that have it; 1 outside the layers.
    shape: of one of them.
    names: the logical name of each dimension, None where it has none.
    axes: the mesh axes that shard each dimension.
    bits: of an element; None where it has the dtype of the model.
    """

    path: str
    count: int
    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    axes: tuple[tuple[str, ...], ...]
    bits: int | None = None

    @property
    def parameters(self) -> int:
        """Parameters in all layers."""
        return self.count * math.prod(self.shape)

    def shards(self, sizes: Mapping[str, int]) -> int:
        """Number of shards on a mesh of these sizes."""
        return math.prod(devices_along(axes, sizes) for axes in self.axes)

    def device_parameters(self, sizes: Mapping[str, int]) -> int:
        """Parameters that one device of such a mesh holds."""
        return self.parameters // self.shards(sizes)


def devices_along(axes: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    """Number of devices along some axes of a mesh."""
    return math.prod(sizes[axis] for axis in axes)


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Format the sizes of a mesh as `mesh_presets.parse_mesh` reads them: "fsdp=4,kv=2"; "data=1" for one device."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def parameter_layout(config: Glm4vConfig, scheme: str = "none") -> tuple[LeafLayout, ...]:
    """All parameters of the model, in the order of `jax.tree.leaves`; quantised by a scheme, for inference."""
    return _layout(config, scheme, current_rules())


@functools.cache
def _layout(config: Glm4vConfig, scheme: str, rules: Rules) -> tuple[LeafLayout, ...]:
    every = tuple(dict.fromkeys((*AXES, *rules.axes)))
    one = AbstractMesh((1,) * len(every), every, axis_types=(AxisType.Explicit,) * len(every))

    def make() -> Glm4v:
        with jax.sharding.use_abstract_mesh(one), use_rules(rules):
            chosen = for_inference(scheme)
            model = jax.eval_shape(lambda: Glm4v.init(config, dtype=jnp.bfloat16))
            return model if chosen is None else jax.eval_shape(lambda model: quantize_model(model, chosen), model)

    tables = {names_of(rules[name]): name for name in ("vocab", "embed")}
    # In a thread of its own: a mesh that the caller has set holds for the caller's thread, and would take precedence.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        model = thread.submit(make).result()
    found = []
    for path, leaf in zip(leaf_paths(model), jax.tree.leaves(model), strict=True):
        axes = [names_of(axis) for axis in leaf.sharding.spec]
        axes += [()] * (leaf.ndim - len(axes))
        first = int(".stacked." in path)
        names = _logical_names(model, path, axes[first:], tables)
        count = leaf.shape[0] if first else 1
        bits = None if leaf.dtype == jnp.bfloat16 else bits_of(leaf.dtype)  # the dtype that the model was made in
        path = path.replace(".stacked.", ".")
        found.append(LeafLayout(path, count, leaf.shape[first:], names, tuple(axes[first:]), bits))
    return tuple(found)


def misfits(config: Glm4vConfig, sizes: Mapping[str, int], scheme: str = "none") -> list[str]:
    """The dimensions of the model that do not divide by a mesh of these sizes, in words; and groups of its integers."""
    failing: dict[tuple[str | None, tuple[str, ...]], set[int]] = {}
    for leaf in parameter_layout(config):
        for size, name, axes in zip(leaf.shape, leaf.names, leaf.axes, strict=True):
            if size % devices_along(axes, sizes):
                failing.setdefault((name, axes), set()).add(size)
    groups = {
        f"{size} groups of inputs of {leaf.path.removesuffix('_scale')} in {scheme} are not divisible by mesh axes "
        f"{' x '.join(axes)} of {devices_along(axes, sizes)} devices; int8 has no groups"
        for leaf in parameter_layout(config, scheme)
        if is_scale(leaf.path)
        for size, axes in zip(leaf.shape, leaf.axes, strict=True)
        if size % devices_along(axes, sizes)
    }
    return [
        misfit(name, size, axes, devices_along(axes, sizes))
        for (name, axes), found in failing.items()
        for size in sorted(found)
        # The 2,048 dimensions of 16 groups fail where the groups do: no need to name both.
        if not any(size % smaller == 0 for smaller in found if smaller < size)
    ] or sorted(groups)


def check_mesh(config: Glm4vConfig, sizes: Mapping[str, int], scheme: str = "none") -> None:
    """Check that a mesh of these sizes can keep every parameter of a model, before any of them is read.

    ConfigError, with all dimensions that do not divide by the devices along their mesh axes.
    """
    if found := misfits(config, sizes, scheme):
        raise ConfigError(f"mesh {mesh_text(sizes)}: {'; '.join(found)}")


def _logical_names(
    model: Glm4v, path: str, axes: list[tuple[str, ...]], tables: Mapping[tuple[str, ...], str]
) -> tuple[str | None, ...]:
    """The logical names of a parameter's dimensions: those of its module, or of a table's two sides by their axes."""
    parents = path.split(".")[:-1]
    module = functools.reduce(getattr, parents, model)
    if isinstance(module, Linear):
        return module.axes if len(axes) == len(module.axes) else module.out_axes
    return tuple(tables.get(along) for along in axes)
