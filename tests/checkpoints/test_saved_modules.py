"""Whole modules in adapters (`modules_to_save`): PEFT's logits in both directions, merged files, and refusals."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_lora import IMAGE, assert_logits, batch_of, import_peft, their_logits, trained
from reference import assert_close, load_theirs

from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.checkpoints.adapter import load_adapter, save_adapter
from glm4v_jax.checkpoints.hf_write import tensors_of
from glm4v_jax.checkpoints.merge_adapter import merged_tensors
from glm4v_jax.checkpoints.safetensors import SafetensorsFile
from glm4v_jax.checkpoints.saved_modules import saved_tensors
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.model import lora, quantize
from glm4v_jax.model.kernel_order import outputs_first
from glm4v_jax.model.params import leaf_paths

pytestmark = [pytest.mark.usefixtures("mesh"), pytest.mark.slow]

MODULES = ("lm_head", "embed_tokens", "merger")
PREFIX = "base_model.model."
TARGET = lora.LoraConfig(rank=3, alpha=4.5, target=r"language_model\.layers\..*q_proj")


@pytest.fixture(scope="module")
def model(checkpoints):
    """Stacked, as training has it."""
    return Glm4vForConditionalGeneration.from_pretrained(checkpoints("base"), dtype="float32", stacked=True).module


def changed(model, modules=MODULES):
    """The model with an adapter, and with modules that differ from its own in every number."""
    result = trained(model, TARGET)
    result.modules_to_save = modules
    leaves, structure = jax.tree.flatten(result)
    prefixes = lora.leaf_prefixes(modules)
    found = [x * 1.25 if path.startswith(prefixes) else x for path, x in zip(leaf_paths(result), leaves, strict=True)]
    return structure.unflatten(found)


@pytest.fixture(scope="module")
def small(model):
    """The model with all of its modules in int8."""
    return quantize.quantize_model(model, quantize.QuantConfig(rest=True))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """An adapter that this package has saved, and its model."""
    directory = tmp_path_factory.mktemp("ours")
    adapter = changed(model)
    save_adapter(adapter, directory, "a/base")
    return directory, adapter


def test_files_are_those_of_peft(saved):
    directory, _ = saved
    options = json.loads((directory / "adapter_config.json").read_text())
    assert options["modules_to_save"] == list(MODULES)
    names = {name for name in SafetensorsFile(directory / "adapter_model.safetensors") if "lora" not in name}
    merger = {f"{name}_proj.weight" for name in ("gate", "up", "down")} | {"proj.weight"}
    merger |= {"post_projection_norm.weight", "post_projection_norm.bias"}
    assert names == {
        f"{PREFIX}lm_head.weight",
        f"{PREFIX}model.language_model.embed_tokens.weight",
        *(f"{PREFIX}model.visual.merger.{name}" for name in merger),
    }


def test_the_order_of_kernels_is_that_of_files(saved):
    """As a TPU has them, outputs come first."""
    _, adapter = saved
    expected, found = saved_tensors(adapter), saved_tensors(outputs_first(adapter))
    assert all(np.array_equal(found[name], tensor) for name, tensor in expected.items())


def test_peft_computes_the_same(model, saved, checkpoints):
    theirs = import_peft()
    directory, adapter = saved
    batch, prompts = batch_of(model.config, IMAGE)
    reference = load_theirs(checkpoints("base"))
    before = their_logits(reference, prompts)
    wrapped = theirs.PeftModel.from_pretrained(reference, directory).eval()
    expected = their_logits(wrapped.base_model.model, prompts)
    assert np.abs(before - expected)[prompts.real].max() > 0.1 * np.abs(before).max()
    for one in (adapter, load_adapter(model, directory), load_adapter(model.unstacked(), directory)):
        assert_logits(one, batch, prompts, expected)


def test_what_peft_saves_computes_the_same(model, checkpoints, tmp_path):
    """Named as people name them; every module changed on its own."""
    theirs, torch = import_peft(), pytest.importorskip("torch")
    names = ["lm_head", "language_model.embed_tokens", "visual.merger"]
    config = theirs.LoraConfig(  # of the same shapes as `saved`, and so of the same program
        r=TARGET.rank, lora_alpha=TARGET.alpha, target_modules=["q_proj"], modules_to_save=names,
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    wrapped = theirs.get_peft_model(load_theirs(checkpoints("base")), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * parameter.abs().mean() * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path)
    batch, prompts = batch_of(model.config, IMAGE)
    adapter = load_adapter(model, tmp_path)
    assert adapter.modules_to_save == MODULES and not model.modules_to_save
    expected = their_logits(wrapped.base_model.model, prompts)
    assert_logits(adapter, batch, prompts, expected)
    save_adapter(adapter, tmp_path / "again")
    assert_logits(load_adapter(model, tmp_path / "again"), batch, prompts, expected)


def test_merged_files_have_the_modules(model, saved, checkpoints):
    directory, adapter = saved
    expected = {name: np.asarray(tensor) for name, tensor in tensors_of(lora.merge_lora(adapter)).items()}
    for name, tensor in merged_tensors(checkpoints("base"), directory).items():
        assert_close(np.asarray(tensor), expected[name], tolerance=5e-7)


def test_modules_are_rounded_where_those_of_the_model_are(small, saved, tmp_path):
    directory, adapter = saved
    found = load_adapter(small, directory)
    for own, other in ((found.lm_head, adapter.lm_head), (found.visual.merger.proj, adapter.visual.merger.proj)):
        scale = np.asarray(own.kernel_scale[...])
        error = np.abs(np.asarray(own.kernel[...]) * scale - np.asarray(other.kernel[...]))
        assert own.kernel.dtype == jnp.int8 and (error <= scale * 0.501).all()
    table, theirs = found.language_model.embed_tokens, adapter.language_model.embed_tokens
    scale = np.asarray(table.embedding_scale[...])[:, None]
    assert (np.abs(np.asarray(table.embedding[...]) * scale - np.asarray(theirs.embedding[...])) <= scale * 0.501).all()
    abstract = jax.eval_shape(lambda model: load_adapter(model, directory), small)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(found)
    ]
    assert jax.tree.structure(load_adapter(small, directory)) == jax.tree.structure(found)
    with pytest.raises(ConfigError, match="modules_to_save: found a quantised module"):
        save_adapter(found, tmp_path)


@pytest.mark.parametrize("keep_dtype", [False, True])
def test_abstract_models_get_the_same_leaves(model, saved, keep_dtype):
    """As a job counts its memory before anything is read."""
    directory, _ = saved
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    expected = load_adapter(base, directory, keep_dtype=keep_dtype)
    found = jax.eval_shape(lambda model: load_adapter(model, directory, keep_dtype=keep_dtype), base)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(found)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(expected)
    ]
    assert found.modules_to_save == MODULES
    assert expected.lm_head.kernel[...].dtype == (jnp.float32 if keep_dtype else jnp.bfloat16)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            dict(modules_to_save=("lm_head",), target=".*"),
            "target: found 'lm_head'; expected no layer of modules_to_save",
        ),
        (dict(modules_to_save=("norm",)), r"modules_to_save: found \('norm',\); expected a list of some of 'lm_head'"),
    ],
)
def test_modules_that_cannot_be_trained_are_named(model, options, says):
    with pytest.raises(ConfigError, match=says):
        lora.add_lora(model, lora.LoraConfig(**options))


def test_integers_and_tied_heads_are_not_trained(small, ours):
    with pytest.raises(ConfigError, match=r"modules_to_save: found 'lm_head\.kernel'; expected one in floats"):
        lora.add_lora(small, lora.LoraConfig(modules_to_save=("lm_head",)))
    with pytest.raises(ConfigError, match=r"found 'embed_tokens'; expected neither .* \(tie_word_embeddings\)"):
        lora.add_lora(ours("tester").module, lora.LoraConfig(modules_to_save=("embed_tokens",)))


def test_matrices_beside_a_whole_module_are_refused(model, tmp_path):
    save_adapter(trained(model, lora.LoraConfig(rank=2, target="lm_head|.*q_proj")), tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    with pytest.raises(CheckpointError, match="3 tensors do not fit") as error:
        load_adapter(model, tmp_path)
    assert "lm_head.weight: found nothing; expected [320, 64]" in error.value.faults


def test_going_on_keeps_the_numbers_of_the_file(model, saved):
    """Training has float32 of its modules, whatever the checkpoint's dtype is; inference that of the model."""
    directory, adapter = saved
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    kept, cast = (load_adapter(half, directory, keep_dtype=keep).lm_head.kernel[...] for keep in (True, False))
    np.testing.assert_array_equal(kept, adapter.lm_head.kernel[...])
    assert cast.dtype == jnp.bfloat16 and kept.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda o: o.update(modules_to_save=["norm", "lm_head"]),
            r"config\.json: modules_to_save: found 'norm'; expected",
        ),
        (lambda o: o.update(modules_to_save="lm_head"), "modules_to_save: found 'lm_head'; expected a list of modules"),
        (lambda o: o.update(modules_to_save=["lm_head"]), "embed_tokens.weight: found .*; expected no such tensor"),
        (lambda o: o.update(modules_to_save=None), "lm_head.weight: found .*; expected no such tensor"),
    ],
)
def test_files_that_contradict_each_other_are_refused(model, saved, tmp_path, change, says):
    directory, _ = saved
    options = json.loads((directory / "adapter_config.json").read_text())
    change(options)
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    (tmp_path / "adapter_model.safetensors").write_bytes((directory / "adapter_model.safetensors").read_bytes())
    with pytest.raises(CheckpointError) as error:
        load_adapter(model, tmp_path)
    assert any(re.search(says, fault) for fault in (str(error.value), *error.value.faults))
