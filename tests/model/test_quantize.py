"""Quantised kernels: how far they are off, what is computed with them, in which memory, on every layout and mesh."""

import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers_lora import batch_of, leaves_of, logits_of, loss_of, trained
from helpers_mesh import ROWS, write_grouped
from jax.sharding import AbstractMesh, AxisType
from reference import assert_close, random_tensors, write_checkpoint

from convert import quantize as convert_quantize
from glm4v_jax import Glm4v, Glm4vConfig, Glm4vForConditionalGeneration
from glm4v_jax.checkpoints.adapter import load_adapter, save_adapter
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.devices import mesh
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.model import lora, nn, quantize
from glm4v_jax.model.cpu_matmul import unpack_int4
from glm4v_jax.model.params import linears, stacked_layers
from glm4v_jax.model.params import sizes as sizes_of
from train.state import Layout, split

pytestmark = [pytest.mark.usefixtures("mesh"), pytest.mark.slow]

INT8, INT4 = quantize.QuantConfig("int8"), quantize.QuantConfig("int4", group=16)
BOTH = pytest.mark.parametrize("config", [INT8, INT4], ids=["int8", "int4"])
TEXT = [[9], [30]]
SMALL = lora.LoraConfig(rank=3)
MESH = dict(fsdp=2, kv=2, q=2)


def integers_of(kernel, axis):
    """A kernel's integers: those of 4 bits are packed along the last input dimension on a CPU, if they are even."""
    return np.asarray(unpack_int4(kernel, axis) if kernel.dtype == jnp.uint8 else kernel, np.float32)


def by_hand(kernel, inputs, config):
    """Integers and scales as the docstrings describe them, float64; and the scale that each weight has."""
    largest = {"int8": 127, "int4": 7}[config.dtype]
    if config.dtype == "int8":
        scale = np.abs(kernel).max(axis=tuple(range(inputs)), keepdims=True) / largest
        kept, spread = scale[(0,) * inputs], np.broadcast_to(scale, kernel.shape)
    else:
        size = kernel.shape[inputs - 1]
        group = max(g for g in range(1, config.group + 1) if size % g == 0)
        parts = np.split(kernel, size // group, axis=inputs - 1)
        kept = np.stack([np.abs(part).max(axis=inputs - 1) for part in parts], axis=inputs - 1) / largest
        spread = np.repeat(kept, group, axis=inputs - 1)
    return np.round(kernel / spread), kept, spread


def in_floats(model):
    """The model with the kernels that its integers stand for, multiplied here."""
    result = jax.tree.map(lambda x: x, model)
    for found in linears(result).values():
        for linear in found:
            if linear.kernel_scale is None:
                continue
            layers = bool(stacked_layers(linear))
            last = layers + len(linear.in_axes) - 1
            kernel, scale = integers_of(linear.kernel[...], last), np.asarray(linear.kernel_scale[...])
            if scale.ndim == kernel.ndim:
                scale = np.repeat(scale, kernel.shape[last] // scale.shape[last], axis=last)
            else:
                scale = np.expand_dims(scale, tuple(range(layers, last + 1)))
            linear.kernel, linear.kernel_scale = nnx.Param(jnp.asarray(kernel * scale)), None
    return result


@BOTH
@pytest.mark.parametrize(
    ("ins", "outs"),
    [
        ({"embed": 64}, {None: 2, "mlp": 10}),
        ({"kv_heads": 2, "q_groups": 3, "head_dim": 24}, {"embed": 6}),  # 24 is no multiple of a group of 16: 12
        ({"mlp": 7}, {"embed": 4}),
    ],
)
def test_a_linear_layer_is_off_by_half_a_scale(mesh, config, ins, outs):
    layer = nn.Linear(ins, outs, nn.Init(nnx.Rngs(params=0), 0.5), bias=True)
    before = np.asarray(layer.kernel[...], np.float64)
    before[..., 0] = 0  # a channel of zeros
    quantized = jax.jit(quantize.quantize_kernel, static_argnums=(1, 2, 3))
    kernel, scale = quantized(jnp.asarray(before, jnp.float32), tuple(ins), tuple(outs), config)
    integers, kept, spread = by_hand(before + (before == 0) * 1e-30, len(ins), config)
    is_packed = config is INT4 and before.shape[len(ins) - 1] % 2 == 0
    assert kernel.dtype == (jnp.uint8 if is_packed else config.dtype) and scale.dtype == jnp.float32
    assert kernel.size == before.size // (1 + is_packed) and scale.shape == kept.shape
    found = integers_of(kernel, len(ins) - 1).astype(np.float64)
    assert np.array_equal(found, integers * (before != 0))  # a tie falls the other way with a chance of 1e-7
    np.testing.assert_allclose(np.asarray(scale)[..., 1:], kept[..., 1:], rtol=2e-7)
    assert (np.asarray(scale)[..., 0] == 1).all()
    assert np.abs(found).max() == {"int8": 127, "int4": 7}[config.dtype]
    assert (np.abs(found * spread - before) <= spread / 2 * (1 + 1e-6)).all()
    assert np.abs(found * spread - before).max() > 0.4 * spread.min()  # or nothing was rounded at all

    layer.kernel, layer.kernel_scale = nnx.Param(kernel), nnx.Param(scale)
    x = np.random.RandomState(0).standard_normal((2, 3, *ins.values())).astype(np.float32)
    expected = np.tensordot(np.asarray(x, np.float64), found * spread, len(ins))
    run = jax.jit(lambda layer, x: layer(x))
    assert_close(run(layer, jnp.asarray(x)), expected, tolerance=1e-6)
    layer.bias = nnx.Param(layer.bias[...].astype(jnp.bfloat16))
    rounded = run(layer, jnp.asarray(x, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert_close(rounded.astype(jnp.float32), expected, tolerance=3 * 2**-8)  # input, kernel and result, rounded once


@BOTH
def test_by_default_the_decoders_kernels_are_quantised(model, config):
    found, before = leaves_of(quantize.quantize_model(model, config)), leaves_of(model)
    changed = {path for path, leaf in found.items() if leaf is not before.get(path)}
    names = ["mlp.down", "mlp.gate_up", *(f"self_attn.{name}_proj" for name in "koqv")]
    kernels = {f"language_model.layers.stacked.{name}.kernel" for name in names}
    assert changed == kernels | {quantize.scale_path(path) for path in kernels} and set(before) < set(found)
    assert all(found[path].dtype == (jnp.int8 if config is INT8 else jnp.uint8) for path in kernels)
    assert quantize.is_quantized(quantize.quantize_model(model, config)) and not quantize.is_quantized(model)
    everything = quantize.quantize_model(model, quantize.QuantConfig(config.dtype, target=".*"))
    assert {path for path, leaf in leaves_of(everything).items() if path.endswith(".kernel")} == {
        path.removesuffix("_scale") for path in leaves_of(everything) if quantize.is_scale(path)
    }


@BOTH
def test_for_inference_everything_large_is_quantised(checkpoints, config):
    found = Glm4vForConditionalGeneration.from_pretrained(checkpoints("base"), quantize=config.dtype)
    leaves = leaves_of(found.module)
    floats = {path for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 1}
    assert all(path.endswith((".scale", ".bias", "_scale", "visual.position_embedding")) for path in floats), floats
    decoder = leaves["language_model.layers.0.mlp.down.kernel"]
    assert decoder.dtype == (jnp.int8 if config is INT8 else jnp.uint8)
    assert leaves["lm_head.kernel"].dtype == leaves["visual.patch_embed.kernel"].dtype == jnp.int8
    table, scale = (
        np.asarray(leaves[f"language_model.embed_tokens.{name}"]) for name in ("embedding", "embedding_scale")
    )
    exact = load_model(checkpoints("base"), found.config, dtype="float32").language_model.embed_tokens
    assert np.abs(table * scale[:, None] - np.asarray(exact.embedding[...])).max() <= scale.max() / 2 * (1 + 1e-6)
    np.testing.assert_array_equal(found.get_input_embeddings(np.asarray([[3, 5]]))[0], (table * scale[:, None])[[3, 5]])
    assert found.num_parameters() == Glm4vForConditionalGeneration.from_pretrained(checkpoints("base")).num_parameters()


def test_a_table_that_is_the_head_too_stays(ours):
    model = ours("tester").module
    embed = quantize.quantize_model(model, quantize.QuantConfig(rest=True)).language_model.embed_tokens
    assert embed.embedding_scale is None and embed.embedding.dtype == jnp.float32


@pytest.mark.parametrize("scheme", ["int3", "INT8", "", 8, True, {"dtype": "int8"}])
def test_unknown_schemes_are_refused(checkpoints, scheme):
    expected = f"quantize: found {scheme!r}; expected one of none, int8, int4"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        Glm4vForConditionalGeneration.from_pretrained(checkpoints("base"), quantize=scheme)


def test_int4_is_refused_on_a_tpu(monkeypatch):
    monkeypatch.setattr(mesh, "platform", lambda: "tpu")
    with pytest.raises(ConfigError, match="quantize: found 'int4'; expected 'int8' on a TPU, where"):
        quantize.for_inference("int4")
    assert quantize.for_inference("int8").rest and quantize.for_inference("none") is None


def test_loss_and_gradients_are_those_of_dequantised_kernels(model):
    """Loss, and an adapter's gradients."""
    batch, _ = batch_of(model.config, TEXT)
    adapter = trained(quantize.quantize_model(model, INT4), SMALL)
    (expected, their), (found, ours) = (gradients_of(m, batch) for m in (in_floats(adapter), adapter))
    assert abs(found - expected) <= 1e-5 * abs(expected)
    assert ours.keys() == their.keys() and len(ours) == 2 * 6
    for path, value in ours.items():
        assert_close(value, their[path])


def test_vit_and_head_can_be_quantised(model):
    """With nothing but kernels in integers; and of layers one by one."""
    batch, _ = batch_of(model.config, ROWS)
    everything = quantize.quantize_model(model, quantize.QuantConfig("int8", target=".*"))
    apart = everything.unstacked()
    jax.tree.map(np.testing.assert_array_equal, apart.stacked(), everything)
    assert_close(logits_of(apart, batch), logits_of(in_floats(everything), batch))


def gradients_of(model, batch):
    params, frozen = split(model, lora.is_lora)
    layout = Layout.of(model)

    @jax.jit
    def compute(params, frozen):
        return jax.value_and_grad(lambda params: loss_of(layout.model(params, frozen, jnp.float32), batch))(params)

    return compute(params, frozen)


@pytest.mark.parametrize(("config", "remat"), [(INT8, "none"), (INT4, "full")], ids=["int8", "int4"])
def test_at_most_one_layer_is_dequantised_at_a_time(ours, config, remat):
    """Nothing is hoisted out of the loop over layers, nor kept for the backward pass."""
    model = ours("mha").module.stacked()  # three layers, of which nothing else here has three
    batch, _ = batch_of(model.config, TEXT)
    adapter = trained(quantize.quantize_model(model, config), SMALL)

    def program(model):
        params, frozen = split(model, lora.is_lora)
        layout = Layout.of(model)

        def loss(params, frozen, batch):
            return jnp.sum(layout.model(params, frozen, jnp.float32)(batch, remat=remat) ** 2)

        return jax.jit(jax.grad(loss)).lower(params, frozen, batch).compile().as_text()

    shapes = [
        (",".join(map(str, found[0].kernel.shape)), ",".join(map(str, (3, *itertools.chain(*sizes_of(found[0]))))))
        for found in linears(adapter).values()
        if found[0].kernel_scale is not None
    ]
    assert len(shapes) == 6 and all(shape.startswith("3,") for shape, _ in shapes)
    text = program(adapter)
    for shape, unpacked in shapes:
        assert f"{'s8' if config is INT8 else 'u8'}[{shape}]" in text
        assert f"f32[{unpacked}]" not in text


@BOTH
@pytest.mark.parametrize("stacked", [True, False])
def test_loading_quantises_leaf_by_leaf(checkpoints, monkeypatch, config, stacked):
    monkeypatch.setattr("glm4v_jax.checkpoints.leaves._WHOLE_BYTES", 0)  # as if all were large
    directory = checkpoints("base")
    model_config = Glm4vConfig.from_pretrained(directory)
    others = {id(x) for x in jax.live_arrays()}
    most = 0

    def look(done, total):
        nonlocal most
        shapes = {(64, 2, 32), (64, 2, 16), (2, 2, 16, 64)}  # the ViT's are others
        floats = [
            x for x in jax.live_arrays()
            if id(x) not in others and x.dtype == jnp.float32 and (x.shape in shapes or x.shape[1:] in shapes)
        ]  # fmt: skip
        most = max(most, len(floats))

    found = load_model(directory, model_config, dtype="float32", stacked=stacked, quantize=config, progress=look)
    assert most <= 1
    expected = quantize.quantize_model(load_model(directory, model_config, dtype="float32", stacked=stacked), config)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    monkeypatch.undo()
    again = Glm4vForConditionalGeneration.from_pretrained(directory, stacked=stacked, quantize=config).module
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_in_bfloat16_integers_scales_and_adapters_keep_their_dtypes(model):
    batch, _ = batch_of(model.config, TEXT)
    adapter = trained(quantize.quantize_model(model, INT4), SMALL)
    params, frozen = split(adapter, lora.is_lora)
    half = leaves_of(Layout.of(adapter).model(params, frozen, jnp.bfloat16))
    for path, leaf in half.items():
        kept = lora.is_lora(path) or quantize.is_scale(path)
        is_base = path.endswith(".kernel") and quantize.scale_path(path) in half
        assert leaf.dtype == (jnp.uint8 if is_base else jnp.float32 if kept else jnp.bfloat16), path
    made = Layout.of(adapter).model(params, frozen, jnp.bfloat16)
    logits = logits_of(made, batch)
    assert logits.dtype == jnp.bfloat16
    # Eight bits of mantissa in each of some fifty steps, one after another: 2^-8 * sqrt(50).
    assert_close(
        logits.astype(jnp.float32), logits_of(adapter, batch), np.asarray(batch.segment_ids) > 0, tolerance=0.03
    )


def test_an_adapter_goes_to_peft_and_back(model, tmp_path):
    base = quantize.quantize_model(model, INT4)
    adapter = trained(base, SMALL)
    save_adapter(adapter, tmp_path)
    again = load_adapter(base, tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_a_quantised_model_is_not_saved(model, tmp_path):
    quantized = Glm4vForConditionalGeneration(model.config, module=quantize.quantize_model(model, INT8))
    message = r"down\.kernel_scale: found 6 quantised kernels; expected floats: save the original model"
    for save in (quantized.save_pretrained, quantized.save_orbax):
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_not_merged_into_integers(model):
    with pytest.raises(ConfigError, match=r"mlp\.down: found a quantised kernel; expected one in floats: merge into"):
        lora.merge_lora(trained(quantize.quantize_model(model, INT8), SMALL))


def test_a_model_with_integers_or_an_adapter_is_not_quantised(model):
    with pytest.raises(ConfigError, match="found a model that is quantised already"):
        quantize.quantize_model(quantize.quantize_model(model, INT8), INT8)
    with pytest.raises(ConfigError, match="found a model that has an adapter"):
        quantize.quantize_model(trained(model, SMALL), INT8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(dtype="int3"), r"quantize\.dtype: found 'int3'; expected one of 'int8', 'int4'"),
        (dict(group=0), r"quantize\.group: found 0; expected an integer of at least 1"),
        (dict(target="("), r"quantize\.target: found '\('; expected a regular expression"),
    ],
)
def test_invalid_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        quantize.QuantConfig(**fields)


def test_a_pattern_without_a_linear_layer_is_refused(checkpoints):
    config = quantize.QuantConfig(target="q_proj")
    with pytest.raises(ConfigError, match=r"quantize\.target: found 'q_proj'; expected a pattern of some of language_"):
        Glm4vForConditionalGeneration.from_pretrained(checkpoints("base"), quantize=config)


def test_kernels_that_are_not_finite_are_refused(model, tmp_path):
    write_checkpoint("base", tmp_path)
    tensors = random_tensors(model.config)
    tensors["model.language_model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"stacked\.mlp\.down\.kernel: found numbers that are not finite"):
        load_model(tmp_path, model.config, quantize=INT8)


def abstract_9b(sizes, config):
    """The abstract, quantised 9B on a mesh of these sizes."""
    axes = tuple(sizes.get(name, 1) for name in mesh.AXES)
    devices = AbstractMesh(axes, mesh.AXES, axis_types=(AxisType.Explicit,) * len(mesh.AXES))

    def make():
        with jax.sharding.use_abstract_mesh(devices):
            released = Glm4vConfig.glm4_1v_9b()
            return jax.eval_shape(lambda: quantize.quantize_model(Glm4v.init(released, dtype=jnp.bfloat16), config))

    with ThreadPoolExecutor(1) as thread:  # which has no mesh yet
        return thread.submit(make).result()


def test_int4_leaves_of_the_9b_are_sharded_as_their_kernels():
    layers = abstract_9b(dict(fsdp=8), quantize.QuantConfig("int4")).language_model.layers.stacked
    down = layers.mlp.down
    assert down.kernel.dtype == jnp.uint8 and down.kernel.shape == (40, 13696 // 2, 4096)  # packed, on a CPU
    assert down.kernel_scale.shape == (40, 214, 4096)
    for leaf in jax.tree.leaves((down.kernel, down.kernel_scale)):
        assert leaf.sharding.spec == mesh.spec(None, "mlp", "embed")
    assert layers.self_attn.o_proj.kernel_scale.shape == (40, 2, 16, 2, 4096)


def test_int8_scales_of_the_9b_are_sharded_as_outputs():
    gate_up = abstract_9b(dict(fsdp=8), INT8).language_model.layers.stacked.mlp.gate_up
    assert gate_up.kernel.shape == (40, 4096, 2, 13696) and gate_up.kernel_scale.shape == (40, 2, 13696)
    assert jax.tree.leaves(gate_up.kernel_scale)[0].sharding.spec == mesh.spec(None, None, "mlp")


def test_groups_that_do_not_divide_by_the_mesh_are_refused():
    sizes = dict(kv=2, q=4)
    message = r"group: found groups of 64 of .*\.down's 13696 inputs, which 8 devices share"
    with pytest.raises(ConfigError, match=message):
        abstract_9b(sizes, quantize.QuantConfig("int4"))
    assert abstract_9b(sizes, INT4) and abstract_9b(sizes, INT8)


def test_a_mesh_computes_what_one_device_does(tmp_path, run_on_devices):
    """And reads what a checkpoint has in integers."""
    (floats := tmp_path / "floats").mkdir()
    write_grouped(floats)
    convert_quantize.quantize(floats, tmp_path / "int4", to="int4", group=8)
    case = run_on_devices(compare_mesh, floats, tmp_path / "int4")
    assert case["equal"] and case["split"] > 0.9
    assert case["loss"] <= 1e-5 and case["gradients"] <= 1e-4 and case["logits"] <= 1e-5


def compute(directory, integers, sizes):
    """Quantised leaves, also those of a checkpoint of integers; loss and gradients of an adapter beside the former;
    logits with everything in int8, of images too.
    """
    with jax.set_mesh(mesh.make_mesh(**sizes)):
        config = Glm4vConfig.from_pretrained(directory)
        base = load_model(directory, config, quantize=quantize.QuantConfig("int4", group=8))
        loss, gradients = gradients_of(trained(base, SMALL), batch_of(config, 2 * TEXT)[0])
        kept = {
            f"{place}: {path}": leaf
            for place, model in ((directory, base), (integers, load_model(integers, config)))
            for path, leaf in leaves_of(model).items()
            if quantize.is_scale(path) or leaf.dtype == jnp.uint8
        }
        everything = load_model(directory, config, quantize=quantize.QuantConfig(rest=True))
        logits = np.asarray(logits_of(everything, batch_of(config, ROWS)[0]))
        is_split = [leaf.addressable_shards[0].data.size < leaf.size for leaf in kept.values()]
        return (
            float(loss),
            jax.tree.map(np.asarray, gradients),
            jax.tree.map(np.asarray, kept),
            float(np.mean(is_split)),
            logits,
        )


def compare_mesh(*directories):
    one, (loss, gradients, kept, share, logits) = (compute(*directories, sizes) for sizes in ({}, MESH))
    worst = max(float(np.abs(gradients[path] - x).max() / np.abs(x).max()) for path, x in one[1].items())
    equal = all(np.array_equal(kept[path], x) for path, x in one[2].items()) and kept.keys() == one[2].keys()
    off = float(np.abs(logits - one[4]).max() / np.abs(one[4]).max())
    return dict(loss=abs(loss - one[0]) / one[0], gradients=worst, equal=equal, split=share, logits=off)
