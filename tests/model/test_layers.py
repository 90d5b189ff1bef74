"""Stacks of layers in both layouts."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from glm4v_jax.devices.mesh import reshard
from glm4v_jax.errors import ConfigError
from glm4v_jax.model.attention.blockwise import SAVED
from glm4v_jax.model.layers import Layers, Remat, stack, unstack
from glm4v_jax.model.nn import Init, Linear

pytestmark = pytest.mark.usefixtures("mesh")


@pytest.fixture(scope="module")
def layers(mesh):
    return Layers.init(lambda init: Linear({None: 4}, {"embed": 4}, init), 3, Init(nnx.Rngs(params=0), 0.5))


def step(layer, index, x):
    y = jnp.tanh(layer(x)) + index
    return y, jnp.sum(y)


def test_layers_have_keys_of_their_own(layers):
    kernels = np.asarray(layers.stacked.kernel[...])
    assert kernels.shape == (3, 4, 4) and len(np.unique(kernels)) == kernels.size


def test_layouts_run_the_same(layers):
    x = np.random.RandomState(0).standard_normal((2, 5, 4)).astype(np.float32)
    x = reshard(jnp.asarray(x), "batch", "length", None)
    expected, sums = np.asarray(x), []
    for i, kernel in enumerate(np.asarray(layers.stacked.kernel[...])):
        expected = np.tanh(expected @ kernel) + i
        sums.append(expected.sum())
    for each in (layers, unstack(layers)):
        for remat in ("none", "full"):
            out, outputs = jax.jit(lambda each, x, remat=remat: each.run(step, x, remat=remat))(each, x)
            np.testing.assert_allclose(out, expected, rtol=2e-6)
            np.testing.assert_allclose(outputs, sums, rtol=2e-6)


def test_each_remat_policy_recomputes_its_operations(layers, mesh):
    """Products and results of what stands for attention, forward and backward, under each policy."""

    def attention(layer, index, x):
        y = checkpoint_name(jnp.sin(layer(x)), SAVED)
        return x + layer(jnp.cos(y)), None

    def made(remat):
        def loss(x):
            return jnp.sum(layers.run(attention, x, remat=remat)[0])

        text = str(jax.make_jaxpr(jax.grad(loss))(reshard(jnp.ones((1, 2, 4)), "batch", "length", None)))
        return text.count("dot_general["), text.count(" sin ")

    # Forward two products and a sine, backward two products and the sine that is the cosine's derivative. Made again is
    # the first product, for both derivatives, unless it was kept, and the first sine, for the second, likewise.
    assert {remat: made(remat) for remat in get_args(Remat)} == {
        "none": (4, 2), "full": (5, 3), "attention": (5, 2), "dots": (4, 2)
    }  # fmt: skip
    with pytest.raises(ConfigError, match="remat: found 'all'; expected one of none, full, attention, dots"):
        layers.run(attention, jnp.ones((1, 2, 4)), remat="all")


def test_layouts_convert_back_and_forth(layers):
    apart = unstack(layers)
    assert layers.is_stacked and not apart.is_stacked
    assert np.array_equal(getattr(apart, "1").kernel[...], layers.stacked.kernel[...][1])
    together = stack(apart)
    assert jax.tree.structure(together) == jax.tree.structure(layers)
    jax.tree.map(np.testing.assert_array_equal, together, layers)
    assert stack(layers) is layers and unstack(apart) is apart


def test_outputs_may_be_absent(layers):
    out = layers.run(lambda layer, index, x: (layer(x), None), reshard(jnp.ones((1, 2, 4)), "batch", "length", None))
    assert out[1] is None
