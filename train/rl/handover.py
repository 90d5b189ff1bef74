"""From the trained parameters to the model that samples: cast, laid out and sharded as its engine has it."""

import re
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from glm4v_jax.devices.mesh import platform, use_mesh
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import outputs_first
from glm4v_jax.model.params import leaf_paths
from train.state import Layout, Leaves

_LAYOUT = re.compile(r"\.(stacked|\d+)(?=\.)")
"""What a path has of the layout of layers, and of their numbers."""


class Handover:
    """Makes the model of an engine from a training's parameters, each time by the same program.

    Frozen leaves are converted once and from then on passed around the program, which would copy them: an adapter's
    base that needs no conversion stays where it is. Results share no memory with the trained parameters, which the
    next step donates.
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
        """Convert the frozen leaves.

        Args:
          layout: of the model in training.
          params: its trained leaves.
          frozen: its other leaves; they are kept.
          dtype: that the engine computes in.
          mesh: of the training.
          engine_mesh: of the engine, over the same devices; by default the same mesh.
        """
        other = None if engine_mesh in (None, mesh) else engine_mesh
        self._mesh, self._source = mesh, frozen
        with use_mesh(mesh):

            def made(params: Leaves, frozen: Leaves) -> Glm4v:
                model = layout.model(params, frozen, dtype)
                if platform() == "cpu":  # as each decodes fastest
                    return model.unstacked()
                return outputs_first(model) if platform() == "tpu" else model

            model = jax.eval_shape(made, params, frozen)
            self._structure = jax.tree.structure(model)
            self._paths = tuple(leaf_paths(model))
            leaves = dict(zip(self._paths, jax.tree.leaves(model), strict=True))
            trained = {_LAYOUT.sub("", path) for path in params}

            def program(paths: list[str]) -> Callable[[Leaves, Leaves], Leaves]:
                """Of these leaves alone: `jax.jit` drops the arguments that only others are made of."""

                def some(params: Leaves, frozen: Leaves) -> Leaves:
                    found = dict(zip(self._paths, jax.tree.leaves(made(params, frozen)), strict=True))
                    return {path: found[path] for path in paths}

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
            self._frozen = kept | program(fixed)(params, frozen)
            self._program = program([path for path in is_new if path not in self._frozen])

    def __call__(self, params: Leaves) -> Glm4v:
        """Return the model of these parameters, as `Engine.update` takes it."""
        with use_mesh(self._mesh):
            found = self._frozen | self._program(params, self._source)
        return jax.tree.unflatten(self._structure, [found[path] for path in self._paths])


def _on(mesh: Mesh, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """The sharding of a leaf, over the same logical axes of another mesh."""
    return NamedSharding(mesh, jax.typeof(leaf).sharding.spec)


def _is_same(leaf: jax.Array, made: jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf is made of one by doing nothing."""
    return (leaf.shape, leaf.dtype) == (made.shape, made.dtype)
