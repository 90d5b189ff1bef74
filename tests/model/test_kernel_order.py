"""Kernels with outputs before inputs: the same model, the same checkpoints; and one row multiplied as eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers_lora import batch_of, logits_of, trained
from helpers_mesh import ROWS
from reference import CONFIGS, assert_close, random_tensors

from glm4v_jax.checkpoints.hf_write import tensors_of
from glm4v_jax.checkpoints.leaves import ModelLeaves
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh as meshes
from glm4v_jax.model import lora, nn, quantize
from glm4v_jax.model.kernel_order import outputs_first, reorder
from glm4v_jax.model.params import linears, sizes
from train.optimizers import kernel_dimensions

pytestmark = pytest.mark.usefixtures("mesh")

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
SEVERAL = {"gate_up", "q_proj", "k_proj", "v_proj", "qkv"}
"""Linear layers with several outputs."""


@pytest.fixture(scope="module")
def model(checkpoints, mesh):
    return load_model(checkpoints("base"), CONFIG)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_first_of_several_outputs_comes_before_the_inputs(model):
    for path, (found,) in linears(outputs_first(model)).items():
        (before,) = linears(model)[path]
        old, new = before.kernel[...], found.kernel[...]
        if path.rpartition(".")[2] in SEVERAL:
            layers = old.ndim - len(before.axes)
            np.testing.assert_array_equal(new, np.swapaxes(old, layers, layers + 1))
            assert found.axes == (before.axes[1], before.axes[0], *before.axes[2:]) and sizes(found) == sizes(before)
        else:
            assert new is old and found.axes == before.axes


@pytest.mark.slow
def test_the_order_changes_nothing_that_is_computed(model):
    """With an adapter, too; merged, it is in the kernel's order."""
    batch, _ = batch_of(CONFIG, ROWS)
    adapter = trained(model)
    expected = logits_of(adapter, batch)
    assert_close(logits_of(outputs_first(adapter), batch), expected)
    merged = lora.merge_lora(outputs_first(adapter))
    jax.tree.map(assert_close, merged, outputs_first(lora.merge_lora(adapter)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stacked", "config"),
    [(True, None), (True, quantize.QuantConfig("int8")), (False, quantize.QuantConfig("int4", group=16))],
)
def test_a_checkpoint_is_read_in_either_order(checkpoints, stacked, config):
    """Quantised as well: the integers are the same, and scales of groups follow their kernel."""
    read = load_model(checkpoints("base"), CONFIG, stacked=stacked, outputs_first=True, quantize=config)
    expected = load_model(checkpoints("base"), CONFIG, stacked=stacked, quantize=config)
    assert_equal(read, outputs_first(expected))
    if config is not None and stacked:
        assert_equal(read, quantize.quantize_model(outputs_first(load_model(checkpoints("base"), CONFIG)), config))


@pytest.mark.parametrize("stacked", [True, False])
def test_checkpoints_have_inputs_first(model, stacked):
    """In both formats: Orbax's leaves and Hugging Face's tensors are those that they were."""
    model = model if stacked else model.unstacked()
    saved, expected = ModelLeaves(outputs_first(model)), ModelLeaves(model)
    assert saved.infos == expected.infos
    for path, info in saved.infos.items():
        assert saved.array(path).shape == info.shape
        np.testing.assert_array_equal(saved.array(path), expected.array(path))
    tensors = random_tensors(CONFIG)
    for name, tensor in tensors_of(outputs_first(model)).items():
        np.testing.assert_array_equal(np.concatenate([x.ravel() for x in tensor.chunks()]), tensors[name].ravel(), name)


def test_muon_knows_inputs_from_outputs(model):
    dims = kernel_dimensions(outputs_first(model))
    gate_up = dims["language_model.layers.stacked.mlp.gate_up.kernel"]
    assert (gate_up.reduction_axis, gate_up.output_axis) == ((2,), (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_several_inputs_and_outputs_compute_the_same(dtype):
    """Which no layer of the model has."""
    ins = {"kv_heads": 2, "head_dim": 16}
    layer = nn.Linear(ins, {None: 2, "embed": 6}, nn.Init(nnx.Rngs(params=0), 0.5), bias=True)
    if dtype is not None:
        config = quantize.QuantConfig(dtype, group=8)
        pair = quantize.quantize_kernel(layer.kernel[...], layer.in_axes, layer.out_axes, config)
        layer.kernel, layer.kernel_scale = map(nnx.Param, pair)
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 3, *ins.values())), jnp.float32)
    expected = layer(x)
    reorder(layer, 1)
    assert layer.axes == (None, *ins, "embed") and layer.kernel.shape[:2] == (2, 2)
    assert_close(layer(x), expected, tolerance=2e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3)])
def test_one_row_is_multiplied_as_eight_on_a_tpu(monkeypatch, shape):
    """And as it is on other platforms, and among others."""
    layer = nn.Linear({"embed": 32}, {None: 2, "mlp": 6}, nn.Init(nnx.Rngs(params=0), 0.5), bias=True)
    table = nn.Embed(11, 32, nn.Init(nnx.Rngs(params=1), 0.5))
    integers = nn.Embed(11, 32, nn.Init(nnx.Rngs(params=1), 0.5))
    integers.dtype = np.dtype(np.float32)
    integers.embedding, integers.embedding_scale = map(nnx.Param, quantize.quantize_embedding(table.embedding[...]))
    x = jnp.asarray(np.random.RandomState(0).standard_normal((*shape, 32)), jnp.float32)
    ids = jnp.full(shape, 7)

    def each(x):
        return layer(x), table.attend(x), integers(ids)

    def traced():  # anew: JAX knows nothing of the patch
        program = jax.jit(lambda x: each(x)).trace(x)
        return program.lower().compile()(x), str(program.jaxpr)

    expected, here = traced()
    monkeypatch.setattr(meshes, "platform", lambda: "tpu")
    found, there = traced()
    assert "optimization_barrier" not in here
    assert (there != here) == (shape == (1, 1)) == ("optimization_barrier" in there)
    assert there.count("optimization_barrier") in (0, 3)
    for one, value in zip(found, expected, strict=True):
        assert one.shape == value.shape
        assert_close(one, value, tolerance=2e-6)
