"""The building blocks against torch's and the reference's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import CONFIGS, assert_close, their_modeling

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import spec
from glm4v_jax.errors import ConfigError
from glm4v_jax.model import nn
from glm4v_jax.model.params import num_params

pytestmark = pytest.mark.usefixtures("mesh")

EPS = 2e-6
"""One operation or a short sum in float32."""


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.RandomState(seed).standard_normal(shape).astype(dtype)


def init(dtype=jnp.float32):
    return nn.Init(nnx.Rngs(params=0), 0.02, dtype)


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_rms_norm_equals(eps):
    modeling, torch = their_modeling(), pytest.importorskip("torch")
    x, scale = normal(2, 5, 24) * 7, normal(24, seed=1)
    theirs, norm = modeling.Glm4vRMSNorm(24, eps), nn.RMSNorm(24, eps, init())
    theirs.weight.data = torch.tensor(scale)
    norm.scale[...] = jnp.asarray(scale)
    assert_close(norm(jnp.asarray(x)), theirs(torch.tensor(x)), tolerance=EPS)


def test_rms_norm_rounds_where_the_reference_does():
    """bfloat16: statistics in float32, rounded, then the scale: the same bits, but where float32 fell otherwise."""
    modeling, torch = their_modeling(), pytest.importorskip("torch")
    x, scale = normal(4, 50, 24), normal(24, seed=1)
    theirs, norm = modeling.Glm4vRMSNorm(24, 1e-5).bfloat16(), nn.RMSNorm(24, 1e-5, init(jnp.bfloat16))
    theirs.weight.data = torch.tensor(scale).bfloat16()
    norm.scale[...] = jnp.asarray(scale, jnp.bfloat16)
    expected = theirs(torch.tensor(x).bfloat16()).detach().float().numpy()
    found = norm(jnp.asarray(x, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert np.mean(np.asarray(found, np.float32) == expected) > 0.995
    assert_close(found.astype(jnp.float32), expected, tolerance=2**-8)


def test_layer_norm_equals():
    torch = pytest.importorskip("torch")
    x, scale, bias = normal(2, 5, 24) * 3 + 5, normal(24, seed=1), normal(24, seed=2)
    theirs, norm = torch.nn.LayerNorm(24), nn.LayerNorm(24, 1e-5, init())
    theirs.weight.data, theirs.bias.data = torch.tensor(scale), torch.tensor(bias)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    assert_close(norm(jnp.asarray(x)), theirs(torch.tensor(x)), tolerance=EPS)


@pytest.mark.parametrize("name", ["gelu", *nn.ACTIVATIONS])
def test_activations_equal(name):
    their_modeling()
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-9, 9, 401, dtype=np.float32)
    theirs = torch.nn.SELU() if name == "selu" else ACT2FN[name]  # 4.57.1 documents "selu" and lacks it
    assert_close(nn.activation(name, jnp.asarray(x)), theirs(torch.tensor(x)), tolerance=EPS)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match="hidden_act: found 'maxout'; expected one of gelu, silu"):
        nn.activation("maxout", jnp.ones(3))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_contracts_several_axes(bias):
    layer = nn.Linear({"kv_heads": 2, "head_dim": 3}, {None: 2, "embed": 5}, init(), bias=bias)
    x = normal(2, 7, 2, 3)
    if bias:
        layer.bias[...] = jnp.asarray(normal(2, 5, seed=3))
    expected = np.einsum("btij,ijmn->btmn", x.astype(np.float64), np.asarray(layer.kernel[...], np.float64))
    expected += np.asarray(layer.bias[...]) if bias else 0
    assert_close(layer(jnp.asarray(x)), expected, tolerance=EPS)
    assert (layer.bias is not None) == bias


def test_an_embedding_looks_up_and_scores():
    table = nn.Embed(11, 6, init())
    ids = np.array([[0, 10, 3], [3, 3, 7]])
    assert np.array_equal(table(jnp.asarray(ids)), np.asarray(table.embedding[...])[ids])
    x = normal(2, 3, 6)
    assert_close(table.attend(jnp.asarray(x)), x @ np.asarray(table.embedding[...]).T, tolerance=EPS)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_mlp_equals(ours, theirs, name):
    import torch

    x = normal(2, 9, CONFIGS[name]["text_config"]["hidden_size"])
    mlp = getattr(ours(name).module.language_model.layers, "1").mlp
    with torch.no_grad():
        expected = theirs(name).model.language_model.layers[1].mlp(torch.tensor(x))
    assert_close(mlp(jnp.asarray(x)), expected, tolerance=EPS)


def test_parameters_come_with_their_sharding():
    layer = jax.eval_shape(lambda: nn.Linear({"embed": 4}, {"kv_heads": 2, "head_dim": 3}, init(), bias=True))
    bias, kernel = jax.tree.leaves(layer)
    assert kernel.sharding.spec == spec("embed", "kv_heads", "head_dim")
    assert bias.sharding.spec == spec("kv_heads", "head_dim")
    assert num_params(layer) == 4 * 6 + 6


def test_kernels_are_normal_and_scales_are_ones():
    kernel = np.asarray(nn.Linear({"embed": 200}, {"mlp": 300}, nn.Init(nnx.Rngs(params=1), 0.5)).kernel[...])
    assert abs(kernel.std() - 0.5) < 0.01 and abs(kernel.mean()) < 0.01
    config = Glm4vConfig.from_dict(CONFIGS["tester"])
    assert np.array_equal(nn.RMSNorm(config.text_config.hidden_size, 1e-5, init()).scale[...], np.ones(16))


def test_float32_is_multiplied_as_float32():
    assert nn.precision(jnp.float32) == jax.lax.Precision.HIGHEST
    assert nn.precision(jnp.bfloat16) == jax.lax.Precision.DEFAULT


@pytest.mark.slow
@pytest.mark.parametrize(("length", "in_tiles"), [(12, True), (10, False)])
def test_many_tokens_go_through_an_mlp_in_tiles(monkeypatch, length, in_tiles):
    """On a CPU, where a tile divides a row: the same values and gradients."""
    mlp, x = nn.GatedMlp(24, 40, "silu", init()), jnp.asarray(normal(2, length, 24))

    def square(x):
        return jnp.sum(mlp(x) ** 2)

    expected = mlp(x), jax.grad(square)(x)
    monkeypatch.setattr(nn, "_TILES", (8, 6))
    assert ("scan" in str(jax.make_jaxpr(mlp)(x))) == in_tiles
    assert_close(mlp(x), expected[0], tolerance=EPS)
    assert_close(jax.grad(square)(x), expected[1], tolerance=EPS)
