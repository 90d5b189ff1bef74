"""Adapters in PEFT's format: written, read, and what PEFT itself makes of them."""

import concurrent.futures
import contextlib
import json
import os
import re

import jax
import numpy as np
import pytest
from helpers_lora import EVERY, IMAGE, assert_logits, batch_of, import_peft, logits_of, their_logits, trained
from reference import CONFIGS, assert_close, load_theirs, random_tensors

from glm4v_jax import Glm4vConfig, Glm4vForConditionalGeneration
from glm4v_jax.checkpoints.adapter import load_adapter, save_adapter
from glm4v_jax.checkpoints.adapter_files import adaptable_modules
from glm4v_jax.checkpoints.hf_write import tensors_of
from glm4v_jax.checkpoints.merge_adapter import merged_tensors
from glm4v_jax.checkpoints.safetensors import SafetensorsFile, write_safetensors
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.model import lora, quantize
from glm4v_jax.model.params import linears

pytestmark = [pytest.mark.usefixtures("mesh"), pytest.mark.slow]

PREFIX = "base_model.model."
# What LoRA can be put beside in the reference, layers left out; the ViT's gate and up are two there.
MODULES = {
    "lm_head",
    *(f"model.language_model.layers.#.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.language_model.layers.#.mlp.{name}_proj" for name in ("gate_up", "down")),
    "model.visual.patch_embed.proj", "model.visual.blocks.#.attn.qkv", "model.visual.blocks.#.attn.proj",
    *(f"model.visual.blocks.#.mlp.{name}_proj" for name in ("gate", "up", "down")),
    "model.visual.downsample", "model.visual.merger.proj",
    *(f"model.visual.merger.{name}_proj" for name in ("gate", "up", "down")),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(checkpoints):
    """Stacked, as training has it."""
    return Glm4vForConditionalGeneration.from_pretrained(checkpoints("base"), dtype="float32", stacked=True).module


def read(directory):
    """An adapter's tensors by module, as PEFT's documentation describes them: module -> (scale, A, B)."""
    options = json.loads((directory / "adapter_config.json").read_text())
    file = SafetensorsFile(directory / "adapter_model.safetensors")
    assert file.metadata == {"format": "pt"}
    found = {}
    for name in file:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a, b = (file.read(f"{PREFIX}{module}.lora_{side}.weight") for side in "AB")
            assert re.fullmatch(options["target_modules"], module)
            patterns = [(options["rank_pattern"], options["r"]), (options["alpha_pattern"], options["lora_alpha"])]
            rank, alpha = (next((v for k, v in p.items() if re.fullmatch(k, module)), d) for p, d in patterns)
            assert a.shape[0] == b.shape[1] == rank
            found[module] = alpha / rank, a, b
    assert len(file) == 2 * len(found)
    return found


def merged_by_hand(tensors, adapter):
    """W + scale B A, in float64; a convolution's A has its window, its B a window of 1."""
    result = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    for module, (scale, a, b) in adapter.items():
        product = b.reshape(len(b), -1).astype(np.float64) @ a.reshape(len(a), -1)
        result[f"{module}.weight"] += scale * product.reshape(result[f"{module}.weight"].shape)
    return result


def assert_merges_to(model, expected):
    """Every tensor of the merged model, exported, is the one expected up to float32's rounding."""
    found = {name: np.asarray(source) for name, source in tensors_of(lora.merge_lora(model)).items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor, tolerance=5e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stacked", [True, False])
def test_kernels_merge_to_what_the_adapter_says(ours, tmp_path, name, stacked):
    base = ours(name).module
    base = base.stacked() if stacked else base
    adapter = trained(base)
    new = jax.eval_shape(lambda model: lora.add_lora(model, EVERY), base)
    assert jax.tree.structure(adapter) == jax.tree.structure(new)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(adapter)] == [(x.shape, x.dtype) for x in jax.tree.leaves(new)]
    save_adapter(adapter, tmp_path, "a/base")
    found = read(tmp_path)
    config = adapter.config
    modules = {re.sub(r"\.\d+\.", ".#.", module) for module in found}
    assert modules == MODULES - ({"lm_head"} if config.text_config.tie_word_embeddings else set())
    tensors = random_tensors(config)
    expected = merged_by_hand(tensors, found)
    assert_merges_to(adapter, expected)
    for module in found:  # or a wrong product of 0 would do
        assert np.abs(expected[f"{module}.weight"] - tensors[f"{module}.weight"]).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_adapter_loads_bit_for_bit(ours, tmp_path, name):
    apart = trained(ours(name).module, lora.LoraConfig(rank=3, alpha=4.5, target=r".*(proj|down|gate_up|qkv)"))
    save_adapter(apart, tmp_path)
    again = load_adapter(ours(name).module, tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(apart)
    jax.tree.map(np.testing.assert_array_equal, again, apart)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(ours(name).module.stacked(), tmp_path), apart.stacked())


def test_names_shapes_and_options_are_those_of_peft(model, tmp_path):
    save_adapter(lora.add_lora(model, lora.LoraConfig()), tmp_path / "new", "zai-org/GLM-4.1V-9B-Thinking")
    file = SafetensorsFile(tmp_path / "new" / "adapter_model.safetensors")
    layer = f"{PREFIX}model.language_model.layers.1."
    assert {name: file[name].shape for name in file if name.startswith(layer)} == {
        f"{layer}self_attn.q_proj.lora_A.weight": (8, 64), f"{layer}self_attn.q_proj.lora_B.weight": (64, 8),
        f"{layer}self_attn.k_proj.lora_A.weight": (8, 64), f"{layer}self_attn.k_proj.lora_B.weight": (32, 8),
        f"{layer}self_attn.v_proj.lora_A.weight": (8, 64), f"{layer}self_attn.v_proj.lora_B.weight": (32, 8),
        f"{layer}self_attn.o_proj.lora_A.weight": (8, 64), f"{layer}self_attn.o_proj.lora_B.weight": (64, 8),
        f"{layer}mlp.gate_up_proj.lora_A.weight": (8, 64), f"{layer}mlp.gate_up_proj.lora_B.weight": (192, 8),
        f"{layer}mlp.down_proj.lora_A.weight": (8, 96), f"{layer}mlp.down_proj.lora_B.weight": (64, 8),
    }  # fmt: skip
    assert len(file) == 2 * 12
    options = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (options["r"], options["lora_alpha"], options["peft_type"]) == (8, 16, "LORA")
    assert options["rank_pattern"] == options["alpha_pattern"] == {}
    assert options["base_model_name_or_path"] == "zai-org/GLM-4.1V-9B-Thinking"
    for part in ("visual", "language_model"):
        name = f"model.{part}.{'blocks' if part == 'visual' else 'layers'}.12.mlp.down_proj"
        assert bool(re.fullmatch(options["target_modules"], name)) == (part == "language_model")


def foreign(config, directory, *, seed=0, **options):
    """An adapter that this package would not write: gate and up with an A each, ranks by module, layers left out."""
    random, tensors = np.random.RandomState(seed), {}
    ranks = {r"layers\.1\.self_attn\.q_proj": 5, "up_proj": 4, "downsample": 1}
    for name, tensor in random_tensors(config).items():
        module = name.removesuffix(".weight")
        if re.sub(r"\.\d+\.", ".#.", module) not in MODULES or "layers.0.self_attn.k" in name or "merger.gate" in name:
            continue
        rank = next((r for key, r in ranks.items() if re.match(rf"(.*\.)?({key})$", module)), 2)
        shapes = (rank, *tensor.shape[1:]), (len(tensor), rank, *(1,) * (tensor.ndim - 2))
        for side, shape in zip("AB", shapes, strict=True):
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = random.standard_normal(shape).astype(np.float32) / 4
    directory.mkdir(exist_ok=True)
    write_safetensors(directory / "adapter_model.safetensors", tensors, {"format": "pt"})
    options = dict(
        peft_type="LORA", r=2, lora_alpha=3, rank_pattern=ranks, bias="none", init_lora_weights=True,
        alpha_pattern={"mlp.gate_proj": 7, r"0\.mlp\.down_proj": 5},
    ) | options  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(options))
    return options, tensors


@pytest.mark.parametrize("by_root", [False, True])
@pytest.mark.parametrize("stacked", [True, False])
def test_ranks_and_scales_may_differ_between_modules(ours, tmp_path, stacked, by_root):
    base = ours("base").module
    options, tensors = foreign(base.config, tmp_path / "theirs", use_rslora=by_root)
    adapter = {}
    for name, a in tensors.items():
        if "lora_A" in name:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            alpha = next((v for k, v in options["alpha_pattern"].items() if module.endswith(k.replace("\\", ""))), 3)
            adapter[module] = alpha / (len(a) ** 0.5 if by_root else len(a)), a, tensors[name.replace("_A.", "_B.")]
    assert {len(a) for _, a, _ in adapter.values()} == {1, 2, 4, 5} and len({s for s, *_ in adapter.values()}) == 6
    model = load_adapter(base.stacked() if stacked else base, tmp_path / "theirs")
    expected = merged_by_hand(random_tensors(base.config), adapter)
    assert_merges_to(model, expected)
    # Saved again, with other ranks, it merges to the same weights.
    save_adapter(model, tmp_path / "ours")
    again = merged_by_hand(random_tensors(base.config), read(tmp_path / "ours"))
    for name, tensor in expected.items():
        assert_close(again[name], tensor, tolerance=1e-6)
    assert_merges_to(load_adapter(base, tmp_path / "ours"), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(peft_type="IA3"), "peft_type: found 'IA3'; expected 'LORA'"),
        (
            dict(modules_to_save=["norm"]),
            r"modules_to_save: found 'norm'; expected some of lm_head, embed_tokens, merger",
        ),
        (dict(bias="all"), "bias: found 'all'; expected 'none'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights: found 'pissa'; expected true: this one changes the base"),
        (dict(r=None), "r: found None; expected an integer of at least 1"),
        (dict(lora_alpha="3"), "lora_alpha: found '3'; expected a number"),
        (dict(rank_pattern={"q_proj": 0}), "rank_pattern: found {'q_proj': 0}; expected an object of patterns"),
        (dict(bias="all", lora_bias=True, r=0), "r: found 0; .*bias: found 'all'; .*lora_bias: found True"),
    ],
)
def test_adapters_of_other_kinds_are_refused(model, tmp_path, options, message):
    foreign(model.config, tmp_path, **options)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, tmp_path)


def test_a_directory_without_an_adapter_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: found no such file; expected an adapter of PEFT"):
        load_adapter(model, tmp_path)


def test_a_damaged_configuration_is_named(model, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: found invalid JSON"):
        load_adapter(model, tmp_path)


def test_tensors_that_do_not_fit_are_all_listed(model, tmp_path):
    _, tensors = foreign(model.config, tmp_path)
    layer = "model.language_model.layers."
    tensors[f"{PREFIX}{layer}2.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 64), np.float32)
    tensors[f"{PREFIX}{layer}0.mlp.down_proj.lora_A.weight"] = np.zeros((3, 96), np.float32)
    del tensors[f"{PREFIX}{layer}1.self_attn.v_proj.lora_B.weight"]
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="3 tensors do not fit") as error:
        load_adapter(model, tmp_path)
    file = " in adapter_model.safetensors"
    assert error.value.faults == (
        f"{PREFIX}{layer}0.mlp.down_proj.lora_A.weight: found shape [3, 96]{file}; expected [2, 96]",
        f"{PREFIX}{layer}2.self_attn.q_proj.lora_A.weight: found [2, 64]{file}; expected no such tensor",
        f"{layer.removeprefix('model.')}1.self_attn.v_proj.lora_B.weight: found nothing; expected [32, 2]",
    )


def test_an_adapter_without_tensors_is_refused(model, tmp_path):
    foreign(model.config, tmp_path)
    write_safetensors(tmp_path / "adapter_model.safetensors", {})
    with pytest.raises(CheckpointError, match="found no tensors"):
        load_adapter(model, tmp_path)


def test_a_model_without_an_adapter_cannot_save_one(model, tmp_path):
    with pytest.raises(ConfigError, match="found a model without an adapter"):
        save_adapter(model, tmp_path)


def test_a_second_adapter_is_refused(model, tmp_path):
    adapter = lora.add_lora(model, lora.LoraConfig())
    save_adapter(adapter, tmp_path)
    with pytest.raises(ConfigError, match="found a model that has an adapter"):
        load_adapter(adapter, tmp_path)


@pytest.mark.parametrize("end", range(4))
def test_an_interrupted_save_leaves_no_weights_with_another_scale(model, tmp_path, monkeypatch, end):
    """After any of the replacements the old adapter is there, or the new one, or none."""
    old, new = (trained(model, lora.LoraConfig(rank=rank, alpha=alpha)) for rank, alpha in ((2, 4), (3, 24)))
    save_adapter(old, tmp_path / "here")
    for name, adapter in (("old", old), ("new", new)):
        save_adapter(adapter, tmp_path / name)
    replace, done = os.replace, []

    def ending(*paths):
        if len(done) == end:
            raise KeyboardInterrupt
        done.append(paths)
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", ending)
        with contextlib.suppress(KeyboardInterrupt):
            save_adapter(new, tmp_path / "here")
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert {path.name for path in (tmp_path / "here").iterdir()} <= set(names)
    if end in (1, 2):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            load_adapter(model, tmp_path / "here")
        return
    same = tmp_path / ("new" if end == 3 else "old")
    assert all((tmp_path / "here" / name).read_bytes() == (same / name).read_bytes() for name in names)


@pytest.mark.parametrize("name", ["base", "odd", "mha", "tester"])
def test_peft_computes_the_same(ours, checkpoints, tmp_path, name):
    theirs = import_peft()
    adapter = trained(ours(name).module)
    batch, prompts = batch_of(adapter.config, IMAGE)
    save_adapter(adapter, tmp_path)
    reference = load_theirs(checkpoints(name))
    before = their_logits(reference, prompts)
    wrapped = theirs.PeftModel.from_pretrained(reference, tmp_path).eval()
    parameters = {k: v for k, v in wrapped.named_parameters() if "lora_" in k}
    file = SafetensorsFile(tmp_path / "adapter_model.safetensors")
    assert parameters.keys() == {name.replace(".weight", ".default.weight") for name in file}
    expected = their_logits(wrapped.base_model.model, prompts)
    assert_logits(adapter, batch, prompts, expected)
    assert np.abs(before - expected)[prompts.real].max() > 0.05 * np.abs(before).max()


def test_an_adapter_that_peft_writes_computes_the_same(ours, checkpoints, tmp_path):
    theirs, torch = import_peft(), pytest.importorskip("torch")
    reference = load_theirs(checkpoints("base"))
    modules = ["q_proj", "o_proj", "qkv", "attn.proj", "gate_proj", "up_proj", "gate_up_proj", "downsample", "lm_head"]
    config = theirs.LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, use_rslora=True, init_lora_weights=False,
        rank_pattern={"up_proj": 3}, alpha_pattern={"gate_proj": 5},
    )  # fmt: skip
    torch.manual_seed(0)
    wrapped = theirs.get_peft_model(reference, config).eval()
    with torch.no_grad():
        wrapped.base_model.model.lm_head.base_layer.weight *= 1.25
    with pytest.warns(UserWarning, match="embedding layers found in `target_modules`"):
        wrapped.save_pretrained(tmp_path)
    model = load_adapter(ours("base").module, tmp_path)
    batch, prompts = batch_of(model.config, IMAGE)
    expected = their_logits(wrapped.base_model.model, prompts)
    assert_logits(model, batch, prompts, expected)


def with_magnitudes(model, seed=3):
    """The model with an adapter, and with a magnitude up to a quarter more or less than each output's norm."""
    result, random = jax.tree.map(lambda x: x, model), np.random.RandomState(seed)
    for found in linears(result).values():
        for linear in found:
            if linear.lora_a is not None:
                norms = lora.output_norms(linear)
                factor = random.uniform(0.75, 1.25, norms.shape).astype(np.float32)
                lora.set_magnitude(linear, norms * jax.device_put(factor, norms.sharding))
    return result


def test_peft_computes_the_same_with_magnitudes(model, checkpoints, tmp_path):
    theirs = import_peft()
    plain = trained(model)
    adapter = with_magnitudes(plain)
    batch, prompts = batch_of(adapter.config, IMAGE)
    save_adapter(adapter, tmp_path)
    wrapped = theirs.PeftModel.from_pretrained(load_theirs(checkpoints("base")), tmp_path).eval()
    magnitudes = [name for name, _ in wrapped.named_parameters() if "lora_magnitude_vector" in name]
    assert len(magnitudes) == len(adaptable_modules(adapter.config))
    expected = their_logits(wrapped.base_model.model, prompts)

    def check(found):
        assert_logits(found, batch, prompts, expected)

    check(adapter)
    check(fixed := lora.fix_magnitudes(adapter))
    with pytest.raises(ConfigError, match="magnitudes are fixed for inference"):
        save_adapter(fixed, tmp_path)
    check(lora.merge_lora(adapter))
    check(load_adapter(model, tmp_path))
    on_disk = merged_tensors(checkpoints("base"), tmp_path)
    assert_merges_to(adapter, {name: np.asarray(tensor) for name, tensor in on_disk.items()})
    assert np.abs(np.asarray(logits_of(plain, batch))[:2, : expected.shape[1]] - expected)[prompts.real].max() > 0.01


def test_magnitudes_that_peft_writes_compute_the_same(ours, checkpoints, tmp_path):
    """Of one part of a fused kernel, of some layers, of convolutions."""
    theirs, torch = import_peft(), pytest.importorskip("torch")
    modules = ["q_proj", "qkv", "gate_proj", "down_proj", "gate_up_proj", "downsample"]
    torch.manual_seed(0)
    config = theirs.LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, use_dora=True, init_lora_weights=False,
        exclude_modules=r".*layers\.0\.self_attn\.q_proj",
    )  # fmt: skip
    wrapped = theirs.get_peft_model(load_theirs(checkpoints("base")), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter *= 0.75 + 0.5 * torch.rand_like(parameter)
    wrapped.save_pretrained(tmp_path)
    model = load_adapter(ours("base").module.stacked(), tmp_path)
    batch, prompts = batch_of(model.config, IMAGE)
    expected = their_logits(wrapped.base_model.model, prompts)
    assert_logits(model, batch, prompts, expected)


def test_a_new_adapter_with_magnitudes_changes_nothing_and_quantised_kernels_have_norms(model):
    config = lora.LoraConfig(rank=16, dora=True, rslora=True)
    batch, _ = batch_of(model.config, IMAGE)
    adapter = lora.add_lora(model, config)
    assert config.scale == 4.0
    assert_close(logits_of(adapter, batch), np.asarray(logits_of(model, batch)))
    small = quantize.quantize_model(model, quantize.QuantConfig("int8"))
    assert_close(logits_of(lora.add_lora(small, config), batch), np.asarray(logits_of(small, batch)))


HEAD, EMBEDDING = f"{PREFIX}lm_head.", f"{PREFIX}model.language_model.embed_tokens."


def with_head(config, directory):
    """An adapter of the head with the head itself, as PEFT writes it; the head's weight."""
    random = np.random.RandomState(7)
    a, b, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (320, 2), (320, 64)))
    tensors = {"lora_A.weight": a, "lora_B.weight": b, "base_layer.weight": weight}
    write_adapter(directory, {f"{HEAD}{name}": tensor for name, tensor in tensors.items()})
    return weight + 1.5 * b @ a


def write_adapter(directory, tensors, **options):
    write_safetensors(directory / "adapter_model.safetensors", tensors, {"format": "pt"})
    options = dict(peft_type="LORA", r=2, lora_alpha=3) | options
    (directory / "adapter_config.json").write_text(json.dumps(options))


def test_a_head_beside_its_adapter_replaces_that_of_the_model(model, checkpoints, tmp_path):
    """In memory, and in files."""
    expected = with_head(model.config, tmp_path)
    merged = lora.merge_lora(load_adapter(model, tmp_path))
    assert_close(np.asarray(merged.lm_head.kernel[...]).T, expected, tolerance=5e-7)
    tensors = merged_tensors(checkpoints("base"), tmp_path)
    assert_close(np.asarray(tensors["lm_head.weight"]), expected, tolerance=5e-7)


@pytest.mark.parametrize("config", [quantize.QuantConfig(rest=True), quantize.QuantConfig("int4", target=".*")])
def test_a_head_replaces_a_quantised_one(model, tmp_path, config):
    with_head(model.config, tmp_path)
    expected = load_adapter(model, tmp_path).lm_head
    found = load_adapter(quantize.quantize_model(model, config), tmp_path).lm_head
    scale = np.asarray(found.kernel_scale[...])
    error = np.abs(np.asarray(found.kernel[...]) * scale - np.asarray(expected.kernel[...]))
    assert found.kernel.dtype == np.int8 and (error <= scale * 0.501).all()
    assert np.array_equal(found.lora_a[...], expected.lora_a[...])


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        ({f"{EMBEDDING}lora_embedding_A": (2, 320), f"{EMBEDDING}lora_embedding_B": (64, 2)}, {}),
        ({f"{EMBEDDING}base_layer.weight": (320, 64)}, {}),
        ({f"{HEAD}weight": (320, 64), f"{EMBEDDING}weight": (320, 64)}, {}),  # of save_embedding_layers
        ({f"{HEAD}base_layer.weight": (330, 64)}, {}),  # of a larger vocabulary
        ({f"{HEAD}base_layer.bias": (320,)}, {}),
        ({f"{PREFIX}model.language_model.layers.0.self_attn.q_proj.base_layer.weight": (64, 64)}, {}),
        ({f"{PREFIX}model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector": (64,)}, {}),
        ({}, {"trainable_token_indices": [1]}),
        ({}, {"use_bdlora": {"nblocks": 2}}),
        ({}, {"kasa_config": {}, "arrow_config": {"top_k": 3}}),
    ],
)
def test_whatever_else_peft_saves_is_refused_by_name(model, tmp_path, tensors, options):
    with_head(model.config, tmp_path)
    file = SafetensorsFile(tmp_path / "adapter_model.safetensors")
    every = {name: file.read(name).copy() for name in file}
    every |= {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    write_adapter(tmp_path, every, **options)
    with pytest.raises(CheckpointError) as error:
        load_adapter(model, tmp_path)
    set_options = [name for name, value in options.items() if value]
    assert all(name in str(error.value) for name in set_options or tensors)


def test_a_model_brings_its_mesh_along(model, tmp_path):
    """As in a program of a user, where no mesh is set."""

    def program():
        assert jax.sharding.get_mesh().empty
        adapted = lora.add_lora(model, lora.LoraConfig())
        save_adapter(adapted, tmp_path)
        return lora.merge_lora(load_adapter(model, tmp_path)), adapted

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        merged, adapted = threads.submit(program).result()
    jax.tree.map(np.testing.assert_array_equal, merged, model)
    again = load_adapter(model, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, adapted)
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, again)) == jax.tree.leaves(
        jax.tree.map(lambda x: x.sharding, adapted)
    )


def test_rules_of_a_and_b_keep_the_heads_in_order():
    """Written out for the two that differ most from PyTorch's layout."""
    found = {p.module.split("layers.0.")[-1]: p for p in adaptable_modules(Glm4vConfig.from_dict(CONFIGS["base"]))}
    q, o, gate = (found[name] for name in ("self_attn.q_proj", "self_attn.o_proj", "model.visual.merger.gate_proj"))
    assert (q.a.layout, q.b.layout) == ("R D -> D R", "(K G H) R -> R K (G H)")
    assert (o.a.layout, o.b.layout) == ("R (K G H) -> K G H R", "D R -> R D")
    assert gate.b.part == (1, 0) and gate.a.leaf == "visual.merger.mlp.gate_up.lora_a"
