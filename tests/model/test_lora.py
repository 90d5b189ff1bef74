"""Adapters beside kernels: what they add, what is trained, on every layout and mesh, and merged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers_lora import (
    EVERY,
    IMAGE,
    assert_logits,
    batch_of,
    leaves_of,
    logits_of,
    loss_and_logits,
    loss_of,
    their_logits,
    trained,
)
from helpers_mesh import ROWS, write_grouped
from reference import CONFIGS, assert_close, load_theirs

from glm4v_jax import Glm4v, Glm4vConfig, Glm4vForConditionalGeneration
from glm4v_jax.checkpoints.adapter import adapter_tensors
from glm4v_jax.devices import mesh
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.model import lora, nn
from glm4v_jax.model.params import linears, sizes, stacked_layers
from train.state import Layout, split

pytestmark = [pytest.mark.usefixtures("mesh"), pytest.mark.slow]

MESH = dict(fsdp=2, kv=2, q=2, seq=2)
"""Every axis that shards params."""


@pytest.fixture(scope="module")
def batch(model):
    return batch_of(model.config, ROWS)[0]


@functools.partial(jax.jit, static_argnums=0)
def gradients_of(layout, params, frozen, batch):
    """Compiled once for all tests of a layout, with the frozen leaves as arguments: constants take long to compile."""
    return jax.grad(lambda params: loss_of(layout.model(params, frozen, jnp.float32), batch))(params)


def test_a_linear_layer_adds_the_product(mesh):
    init = nn.Init(nnx.Rngs(params=0), 0.5)
    layer = nn.Linear({"kv_heads": 2, "head_dim": 3}, {None: 2, "embed": 5}, init, bias=True)
    random = np.random.RandomState(0)
    x, a, b = (random.standard_normal(shape).astype(np.float32) for shape in [(2, 7, 2, 3), (2, 3, 4), (4, 2, 5)])
    before = np.asarray(layer(jnp.asarray(x)), np.float64)
    lora.set_lora(layer, jnp.asarray(a), jnp.asarray(b), 0.75)
    added = np.einsum("btij,ijr,rmn->btmn", x, a, b, dtype=np.float64)
    assert_close(layer(jnp.asarray(x)), before + 0.75 * added, tolerance=2e-6)
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32  # the kernel's
    layer.kernel, layer.bias = (nnx.Param(leaf[...].astype(jnp.bfloat16)) for leaf in (layer.kernel, layer.bias))
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16  # an adapter is float32, and changes no dtype


def test_a_new_adapter_changes_nothing(model, batch):
    expected = logits_of(model, batch)
    for config in (lora.LoraConfig(), EVERY):
        assert np.array_equal(logits_of(lora.add_lora(model, config), batch), expected)
    assert not np.array_equal(logits_of(trained(model), batch), expected)


def test_by_default_the_decoders_layers_have_an_adapter(model):
    paths = [path for path in leaves_of(lora.add_lora(model, lora.LoraConfig())) if lora.is_lora(path)]
    modules = ["mlp.down", "mlp.gate_up", *(f"self_attn.{name}_proj" for name in "koqv")]
    prefix = "language_model.layers.stacked"
    assert sorted(paths) == [f"{prefix}.{name}.lora_{side}" for name in modules for side in "ab"]


def test_the_model_given_stays_as_it_is(model):
    before = leaves_of(model)
    other = lora.add_lora(model, EVERY)
    assert lora.has_lora(other) and not lora.has_lora(model)
    assert leaves_of(model) == before
    for path, leaf in leaves_of(other).items():
        assert lora.is_lora(path) or leaf is before[path]


def test_new_matrices_are_those_of_peft(model):
    adapter = lora.add_lora(model, lora.LoraConfig(rank=50, target=".*"), seed=1)
    again, other = (lora.add_lora(model, lora.LoraConfig(rank=50, target=".*"), seed=seed) for seed in (1, 2))
    for path, found in linears(adapter).items():
        (linear,) = found
        a, (inputs, _) = np.asarray(linear.lora_a[...]), sizes(linear)
        bound = 1 / np.sqrt(np.prod(inputs))
        assert 0.98 * bound < np.abs(a).max() <= bound, path
        assert abs(a.std() / (bound / np.sqrt(3)) - 1) < 0.05, path
        assert not np.asarray(linear.lora_b[...]).any()
        assert linear.lora_scale == 16 / 50
        assert np.array_equal(a, linears(again)[path][0].lora_a[...])
        assert not np.isclose(a, linears(other)[path][0].lora_a[...]).all()
        if stacked_layers(linear):
            assert not np.isclose(a[0], a[1]).any(axis=-1).all()
    q, k = (
        adapter.language_model.layers.stacked.self_attn.q_proj,
        adapter.language_model.layers.stacked.self_attn.k_proj,
    )
    assert not np.isclose(q.lora_a[...], k.lora_a[...]).any(axis=-1).all()


def test_a_has_the_distribution_of_torchs_initialiser(model):
    """The bound above, from torch's own initialiser."""
    torch = pytest.importorskip("torch")
    weight = torch.nn.init.kaiming_uniform_(torch.empty(400, 64), a=5**0.5, generator=torch.Generator().manual_seed(0))
    a = lora.add_lora(model, lora.LoraConfig(rank=400)).language_model.layers.stacked.self_attn.q_proj.lora_a[...][0]
    assert a.shape == (64, 400)
    np.testing.assert_allclose(np.abs(a).max(), weight.abs().max().item(), rtol=1e-3)
    np.testing.assert_allclose(np.std(a), weight.std().item(), rtol=2e-2)


def test_stacked_and_per_layer_are_the_same(model, batch):
    for make in (lora.add_lora, trained):
        stacked, apart = make(model, EVERY), make(model.unstacked(), EVERY)
        jax.tree.map(np.testing.assert_array_equal, stacked.unstacked(), apart)
        jax.tree.map(np.testing.assert_array_equal, stacked, apart.stacked())
        jax.tree.map(np.testing.assert_array_equal, lora.merge_lora(stacked).unstacked(), lora.merge_lora(apart))
    assert_close(logits_of(apart, batch), logits_of(stacked, batch))


def test_only_the_adapter_is_trained(model, batch):
    adapter = trained(model)
    params, frozen = split(adapter, lora.is_lora)
    assert set(params) == {path for path in leaves_of(adapter) if path.endswith(("lora_a", "lora_b"))}
    assert set(frozen) == set(leaves_of(model)) and len(params) == 2 * len(linears(model))
    gradients = gradients_of(Layout.of(adapter), params, frozen, batch)
    of_all = leaves_of(jax.jit(jax.grad(loss_of))(adapter, batch))
    for path, gradient in gradients.items():
        assert np.abs(gradient).max() > 0, path
        assert_close(gradient, of_all[path], tolerance=1e-4)


def test_the_first_step_changes_b_alone(model, batch):
    adapter = lora.add_lora(model, EVERY)
    params, frozen = split(adapter, lora.is_lora)
    gradients = gradients_of(Layout.of(adapter), params, frozen, batch)
    for path, gradient in gradients.items():
        assert np.abs(gradient).max() > 0 if path.endswith("b") else not np.any(gradient), path


def test_a_merged_model_computes_the_same(model, batch):
    adapter = trained(model)
    merged = lora.merge_lora(adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert_close(logits_of(merged, batch), logits_of(adapter, batch))
    assert lora.has_lora(adapter)
    for (path, linear), old in zip(linears(adapter).items(), linears(model).values(), strict=True):
        (linear,), ins, outs = linear, "ijkl"[: len(linear[0].in_axes)], "mnop"[: len(linear[0].out_axes)]
        a, b = np.asarray(linear.lora_a[...], np.float64), np.asarray(linear.lora_b[...], np.float64)
        expected = np.asarray(old[0].kernel[...]) + 1.5 * np.einsum(f"...{ins}r,...r{outs}->...{ins}{outs}", a, b)
        assert_close(linears(merged)[path][0].kernel[...], expected, tolerance=5e-7)


def test_dropping_an_adapter_gives_the_base(model):
    adapter = trained(model)
    plain = lora.drop_lora(adapter)
    assert lora.has_lora(adapter) and jax.tree.structure(plain) == jax.tree.structure(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(model), strict=True))


def test_merging_rounds_once():
    """A bfloat16 model's kernels are added to in float32: what comes out is the nearest to the sum."""
    config = Glm4vConfig.from_dict(CONFIGS["base"])
    model = jax.jit(functools.partial(Glm4v.init, config, dtype=jnp.bfloat16))()
    adapter = trained(model, dataclasses.replace(EVERY, target=r".*\.down"))
    merged = linears(lora.merge_lora(adapter))["language_model.layers.mlp.down"][0].kernel[...]
    linear = linears(adapter)["language_model.layers.mlp.down"][0]
    product = np.einsum("lir,lro->lio", *(np.asarray(x[...], np.float64) for x in (linear.lora_a, linear.lora_b)))
    expected = (np.asarray(linear.kernel[...], np.float64) + 1.5 * product).astype(jnp.bfloat16)
    assert merged.dtype == jnp.bfloat16
    assert np.mean(np.asarray(merged) == expected) > 0.999  # float32 falls on the other side of a tie now and then


def test_merging_changes_kernels_with_an_adapter_alone(model):
    adapter = trained(model, lora.LoraConfig(target=r".*\.q_proj"))
    changed = {path for path, leaf in leaves_of(lora.merge_lora(adapter)).items() if leaf is not leaves_of(model)[path]}
    assert changed == {"language_model.layers.stacked.self_attn.q_proj.kernel"}


@pytest.mark.parametrize("name", ["base", "odd", "mha", "tester"])
def test_transformers_computes_the_same_from_a_merged_export(ours, theirs, tmp_path, name):
    adapter = trained(ours(name).module)
    batch, prompts = batch_of(adapter.config, IMAGE)
    model = Glm4vForConditionalGeneration(adapter.config, module=lora.merge_lora(adapter))
    model.save_pretrained(tmp_path)
    expected, unmerged = (their_logits(m, prompts) for m in (load_theirs(tmp_path), theirs(name)))
    assert_logits(adapter, batch, prompts, expected)
    assert np.abs(expected - unmerged)[prompts.real].max() > 0.05 * np.abs(unmerged).max()


def test_a_model_with_an_adapter_is_not_saved(model, tmp_path):
    adapter = Glm4vForConditionalGeneration(model.config, module=lora.add_lora(model, lora.LoraConfig()))
    for save in (adapter.save_pretrained, adapter.save_orbax):
        with pytest.raises(CheckpointError, match=r"down\.lora_a: found 12 leaves of an adapter; expected none: merge"):
            save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rank=0), "rank: found 0; expected an integer of at least 1"),
        (dict(alpha=0), "alpha: found 0.*; expected a number above 0"),
        (dict(target="q_proj"), "target: found 'q_proj'; expected a pattern of some of language_model.layers"),
        (dict(target="("), r"target: found '\('; expected a regular expression"),
    ],
)
def test_invalid_settings_are_refused(model, fields, message):
    with pytest.raises(ConfigError, match=message):
        lora.add_lora(model, lora.LoraConfig(**fields))


def test_a_second_adapter_is_refused(model):
    with pytest.raises(ConfigError, match="found a model that has an adapter; expected one without"):
        lora.add_lora(lora.add_lora(model, lora.LoraConfig()), lora.LoraConfig())


def test_an_abstract_adapter_is_sharded_as_its_kernels(model):
    """Nothing is computed for the 9B's adapter, and it comes with its partition."""
    config = Glm4vConfig.glm4_1v_9b()
    whole = jax.eval_shape(lambda: lora.add_lora(Glm4v.init(config, dtype=jnp.bfloat16), lora.LoraConfig()))
    later = jax.eval_shape(
        lambda model: lora.add_lora(model, lora.LoraConfig()), jax.eval_shape(lambda: Glm4v.init(config))
    )
    for adapter in (whole, later):
        linear = adapter.language_model.layers.stacked.self_attn.q_proj
        assert linear.lora_a.shape == (40, 4096, 8) and linear.lora_b.shape == (40, 8, 2, 2048)
        assert linear.lora_a.dtype == linear.lora_b.dtype == jnp.float32
        leaves = jax.tree.leaves(linear)
        specs = {leaf.shape: leaf.sharding.spec for leaf in leaves}
        assert specs[40, 4096, 8] == mesh.spec(None, "embed", None)
        assert specs[40, 8, 2, 2048] == mesh.spec(None, None, "kv_heads", "q_groups")
    merged = jax.eval_shape(lora.merge_lora, whole)
    assert jax.tree.structure(merged) == jax.tree.structure(jax.eval_shape(lambda: Glm4v.init(config)))


def test_a_mesh_computes_what_one_device_does(tmp_path, run_on_devices):
    write_grouped(tmp_path)
    case = run_on_devices(compare_mesh, tmp_path)
    assert case["drawn_alike"] and case["tensors_alike"]
    assert case["logits"] <= 1e-5 and case["merged"] <= 1e-6
    assert case["gradients"] <= 1e-4
    assert case["split"] > 0.3  # of an adapter: one dimension of its matrices is never split


def compute(directory, sizes):
    """Logits, gradients of the adapter, the adapter as drawn and as PEFT has it, and merged kernels."""
    with jax.set_mesh(mesh.make_mesh(**sizes)):
        model = Glm4vForConditionalGeneration.from_pretrained(directory, stacked=True).module
        new, adapter = lora.add_lora(model, EVERY), trained(model)
        for path, leaf in leaves_of(new).items():
            assert leaf.sharding == leaves_of(adapter)[path].sharding, path
        batch, _ = batch_of(model.config, ROWS)
        params, frozen = split(adapter, lora.is_lora)
        layout = Layout.of(adapter)

        def loss(params, frozen):
            return loss_and_logits(layout.model(params, frozen, jnp.float32), batch)

        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params, frozen)
        for path, gradient in gradients.items():
            assert gradient.sharding == params[path].sharding, path
        is_split = [leaf.addressable_shards[0].data.size < leaf.size for leaf in params.values()]
        merged = lora.merge_lora(adapter)
        for leaf, old in zip(jax.tree.leaves(merged), jax.tree.leaves(model), strict=True):
            assert leaf.sharding == old.sharding and leaf.dtype == old.dtype
        return dict(
            drawn={path: np.asarray(leaf) for path, leaf in leaves_of(new).items()}, tensors=adapter_tensors(adapter),
            logits={"": np.asarray(logits)[batch.segment_ids > 0]}, split=float(np.mean(is_split)),
            gradients={path: np.asarray(leaf) for path, leaf in gradients.items()},
            merged={path: np.asarray(leaf) for path, leaf in leaves_of(merged).items()},
        )  # fmt: skip


def compare_mesh(directory):
    one, found = compute(directory, {}), compute(directory, MESH)
    case = {
        name: max(float(np.abs(found[name][key] - x).max() / np.abs(x).max()) for key, x in one[name].items())
        for name in ("logits", "gradients", "merged")
    } | {
        f"{name}_alike": all(np.array_equal(found[name][key], x) for key, x in one[name].items())
        for name in ("drawn", "tensors")
    }
    return case | {"split": found["split"]}
