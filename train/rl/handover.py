"""From the trained parameters to the model that samples: cast, laid out and sharded as its engine has it."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from glm4v_jax.devices.mesh import platform, shards, use_mesh, used
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import outputs_first
from glm4v_jax.model.lora import fix_magnitudes
from glm4v_jax.model.params import leaf_paths
from train.state import Layout, Leaves

_LAYOUT = re.compile(r"\.(stacked|\d+)(?=\.)")
"""What a path has of the layout of layers, and of their numbers."""


class Handover:
    """Makes the model of an engine from a training's parameters, each time by the same program.

    Frozen leaves are converted once and from then on passed around the program, which would copy them: an adapter's
    base that needs no conversion stays where it is. Results share no memory with the trained parameters, which the
    next step donates.

    Attributes:
      program: (params, frozen leaves) -> the leaves of the engine's model that depend on params, jitted.
      once: the same of the other leaves that need to be converted.
    """

    def __init__(
        self,
        layout: Layout,
        params: Leaves,
        frozen: Leaves,
        dtype: DTypeLike,
        mesh: Mesh,
        engine_mesh: Mesh | None = None,
    ):
        """Make the programs; leaves may be abstract.

        Frozen ones are kept, and converted in the first call. Both meshes are of the same devices, by default the same.
        """
        other = None if engine_mesh in (None, mesh) else engine_mesh
        self._mesh, self._source = mesh, frozen
        with use_mesh(mesh):
            # Between shards of both kinds on two meshes XLA would gather the weights of all layers: 23.6 GiB of
            # temporaries for the 9B on a v5e:4x4 instead of 3.9. It exchanges shards of fsdp alone well.
            in_steps = other is not None and shards("embed") > 1 and shards("tokens") > 1

            def made(params: Leaves, frozen: Leaves) -> Glm4v:
                # Or every decode step would compute the norms of DoRA's kernels.
                model = fix_magnitudes(layout.model(params, frozen, dtype))
                if platform() == "cpu":  # as each decodes fastest
                    return model.unstacked()
                return outputs_first(model) if platform() == "tpu" else model

            model = jax.eval_shape(made, params, frozen)
            self._structure = jax.tree.structure(model)
            self._paths = tuple(leaf_paths(model))
            leaves = dict(zip(self._paths, jax.tree.leaves(model), strict=True))
            trained = {_LAYOUT.sub("", path).replace(".lora_magnitude", ".lora_gain") for path in params}

            def program(paths: list[str]) -> Any:
                """Of these leaves alone: `jax.jit` drops the arguments that only others are made of."""

                def some(params: Leaves, frozen: Leaves) -> Leaves:
                    found = dict(zip(self._paths, jax.tree.leaves(made(params, frozen)), strict=True))
                    return {path: _gathered(path, found[path]) if in_steps else found[path] for path in paths}

                if other is None:
                    return jax.jit(some)
                return jax.jit(some, out_shardings={path: _on(other, leaves[path]) for path in paths})

            kept = {
                path: frozen[path]
                for path, leaf in leaves.items()
                if other is None and path in frozen and _is_same(frozen[path], leaf)
            }
            is_new = [path for path in self._paths if path not in kept]
            fixed = [path for path in is_new if _LAYOUT.sub("", path) not in trained]
            self._kept, self.once = kept, program(fixed)
            self.program = program([path for path in is_new if path not in fixed])
            self._frozen: Leaves | None = None

    def __call__(self, params: Leaves) -> Glm4v:
        """Return the model of these parameters, as `Engine.update` takes it."""
        with use_mesh(self._mesh):
            if self._frozen is None:
                self._frozen = self._kept | self.once(params, self._source)
            found = self._frozen | self.program(params, self._source)
        return jax.tree.unflatten(self._structure, [found[path] for path in self._paths])


def _gathered(path: str, leaf: jax.Array) -> jax.Array:
    """Gather a leaf's shards of fsdp, those of stacked layers one by one: at once, copies of all would be there too."""
    return jax.lax.map(used, leaf) if ".stacked." in path else used(leaf)


def _on(mesh: Mesh, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """The sharding of a leaf, over the same logical axes of another mesh."""
    return NamedSharding(mesh, jax.typeof(leaf).sharding.spec)


def _is_same(leaf: jax.Array, made: jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf is made of one by doing nothing."""
    return (leaf.shape, leaf.dtype) == (made.shape, made.dtype)
