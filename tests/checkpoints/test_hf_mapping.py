"""The table of names: every tensor of a checkpoint goes to one place, every place is filled once, and back."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers_paths import GOLDEN
from reference import CONFIGS, tensor_names

from glm4v_jax import Glm4v
from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.safetensors import TensorInfo
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError
from glm4v_jax.model.params import leaf_paths, num_params

RELEASED = Glm4vConfig.glm4_1v_9b()
BASE = Glm4vConfig.from_dict(CONFIGS["base"])

pytestmark = pytest.mark.usefixtures("mesh")


def released_names():
    """The 704 names of the released checkpoint's index: patterns, and how many layers each has."""
    patterns = json.loads((GOLDEN / "model" / "released_names.json").read_text(encoding="utf-8"))
    return [pattern.replace("*", str(i)) for pattern, layers in patterns.items() for i in range(layers)]


def infos_of(config, **shapes):
    """The tensors that a model of this configuration has, with other shapes for some."""
    return {name: TensorInfo(shape, np.dtype(np.float32)) for name, shape in (tensor_names(config) | shapes).items()}


def test_released_checkpoint_matches_exactly():
    names, infos = released_names(), infos_of(RELEASED)
    assert len(names) == len(set(names)) == 704
    assert set(names) == set(infos)
    assert hf_mapping.match(RELEASED, {name: infos[name] for name in names}, "released").keys() == set(names)
    assert sum(int(np.prod(infos[name].shape)) for name in names) == 10_292_777_472


@pytest.mark.parametrize("config", [RELEASED, *(Glm4vConfig.from_dict(c) for c in CONFIGS.values())])
def test_every_leaf_is_filled_exactly_once(config):
    """Counted by elements: with layers and parts apart, what goes into a leaf is what the leaf holds."""
    abstract = jax.eval_shape(lambda: Glm4v.init(config))
    leaves = dict(zip(leaf_paths(abstract), jax.tree.leaves(abstract), strict=True))
    shapes, sizes = tensor_names(config), hf_mapping.dimensions(config)
    filled, parts = dict.fromkeys(leaves, 0), hf_mapping.match(config, infos_of(config), "test")
    assert len({(part.path, part.rule.part) for part in parts.values()}) == len(parts)
    for name, (rule, layer) in parts.items():
        path, stacked = hf_mapping.stacked_path(rule.path(layer))
        assert stacked == layer
        # The rule's layout gives the leaf's own shape, without the axes of layers and parts.
        expected = list(leaves[path].shape)
        if layer is not None:
            assert expected.pop(0) > layer
        if rule.part is not None:
            assert expected.pop(rule.part[0]) > rule.part[1]
        tensor = np.broadcast_to(np.float32(0), shapes[name])
        if tensor.size < 1e6:
            assert list(rule.to_leaf(tensor, sizes).shape) == expected
        assert tensor.size == np.prod(expected)
        filled[path] += tensor.size
    assert filled == {path: int(np.prod(leaf.shape)) for path, leaf in leaves.items()}
    assert sum(filled.values()) == num_params(abstract)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_of_leaves_are_those_of_the_model(name):
    config = Glm4vConfig.from_dict(CONFIGS[name])
    abstract = jax.eval_shape(lambda: Glm4v.init(config).unstacked())
    shapes = {path: leaf.shape for path, leaf in zip(leaf_paths(abstract), jax.tree.leaves(abstract), strict=True)}
    assert hf_mapping.leaf_shapes(config) == shapes


@pytest.mark.parametrize("name", ["base", "odd", "mha", "tester"])
def test_rules_are_bijections(name):
    config = Glm4vConfig.from_dict(CONFIGS[name])
    sizes = hf_mapping.dimensions(config)
    for rule in hf_mapping.rules(config):
        tensor = np.arange(np.prod(rule.tensor_shape(sizes))).reshape(rule.tensor_shape(sizes))
        leaf = rule.to_leaf(tensor, sizes)
        assert np.array_equal(np.sort(leaf, axis=None), np.arange(tensor.size))
        assert np.array_equal(rule.to_tensor(leaf, sizes), tensor), rule


def test_head_and_biases_depend_on_the_configuration():
    tied = {rule.tensor for rule in hf_mapping.rules(Glm4vConfig.from_dict(CONFIGS["tester"]))}
    biased = {rule.tensor for rule in hf_mapping.rules(Glm4vConfig.from_dict(CONFIGS["mha"]))}
    assert biased - tied == {"lm_head.weight", "visual.blocks.{i}.attn.qkv.bias"}
    assert len(hf_mapping.rules(RELEASED)) == 36  # as many patterns as the released index has


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("model.language_model.layers.0.mlp.down_proj.weight", "language_model.layers.0.mlp.down_proj.weight"),
        ("language_model.layers.0.mlp.down_proj.weight", "language_model.layers.0.mlp.down_proj.weight"),
        ("model.layers.0.mlp.down_proj.weight", "language_model.layers.0.mlp.down_proj.weight"),
        ("model.visual.merger.proj.weight", "visual.merger.proj.weight"),
        ("visual.merger.proj.weight", "visual.merger.proj.weight"),
        ("model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("model.norm.weight", "language_model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_spellings_of_a_name(spelled, name):
    assert hf_mapping.canonical(spelled) == name


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_names_with_and_without_prefix_match(prefix):
    infos = {name.replace("model.", prefix, 1): info for name, info in infos_of(BASE).items()}
    assert hf_mapping.match(BASE, infos, "test").keys() == infos.keys()


def test_all_faults_are_reported_together():
    infos = infos_of(
        BASE,
        **{
            "model.language_model.norm.weight": (63,),
            "model.language_model.layers.2.mlp.down_proj.weight": (64, 96),
            "optimizer.state": (3,),
            "visual.merger.proj.weight": (64, 64),
        },
    )
    infos["model.visual.post_layernorm.weight"] = TensorInfo((32,), np.dtype(np.int32), Path("a.safetensors"))
    del infos["model.visual.downsample.bias"], infos["lm_head.weight"]
    with pytest.raises(CheckpointError) as raised:
        hf_mapping.match(BASE, infos, "somewhere")
    assert str(raised.value).startswith("somewhere: 7 tensors do not fit the configuration: ")
    assert raised.value.faults == (
        "lm_head.weight: found nothing; expected [320, 64]",
        "model.language_model.layers.2.mlp.down_proj.weight: found [64, 96]; expected no such tensor",
        "model.language_model.norm.weight: found shape [63]; expected [64]",
        "model.visual.post_layernorm.weight: found int32 in a.safetensors; expected one of float32, bfloat16, float16",
        "optimizer.state: found [3]; expected no such tensor",
        "visual.downsample.bias: found nothing; expected [64]",
        "visual.merger.proj.weight: found besides model.visual.merger.proj.weight; expected one of them",
    )


@pytest.mark.parametrize(
    ("text", "vision", "faults"),
    [
        (3, 2, ["text_config.num_hidden_layers: found 3; expected 2: the tensors are of 2 layers"]),
        (1, 2, ["text_config.num_hidden_layers: found 1; expected 2: the tensors are of 2 layers"]),
        (2, 1, ["vision_config.depth: found 1; expected 2: the tensors are of 2 layers"]),
        (
            42,
            26,
            [
                "text_config.num_hidden_layers: found 42; expected 2: the tensors are of 2 layers",
                "vision_config.depth: found 26; expected 2: the tensors are of 2 layers",
            ],
        ),
    ],
)
def test_another_number_of_layers_is_one_fault(text, vision, faults):
    fields = BASE.to_dict()
    fields["text_config"]["num_hidden_layers"], fields["vision_config"]["depth"] = text, vision
    with pytest.raises(CheckpointError) as raised:
        hf_mapping.match(Glm4vConfig.from_dict(fields), infos_of(BASE), "somewhere")
    assert str(raised.value) == f"somewhere: {'; '.join(faults)}" and list(raised.value.faults) == faults


def test_a_message_counts_what_it_does_not_list():
    infos = {name: info for name, info in infos_of(BASE).items() if "layers.0." not in name}
    with pytest.raises(CheckpointError) as raised:
        hf_mapping.match(BASE, infos, "somewhere")
    count = len(raised.value.faults)
    assert count == len(infos_of(BASE)) - len(infos) > 10
    assert str(raised.value).startswith(f"somewhere: {count} tensors do not fit the configuration: language_model.")
    assert str(raised.value).count("found nothing") == 8 and str(raised.value).endswith(f"; and {count - 8} more")


def test_an_empty_checkpoint_misses_every_tensor():
    with pytest.raises(CheckpointError) as raised:
        hf_mapping.match(BASE, {}, "somewhere")
    missing = {fault.partition(":")[0] for fault in raised.value.faults}
    assert missing == {hf_mapping.canonical(name) for name in tensor_names(BASE)}


def test_two_kinds_of_half_precision_are_refused():
    """The rarer kind is named: its bits would pass for the other's."""
    infos = {name: info._replace(dtype=np.dtype(ml_dtypes.bfloat16)) for name, info in infos_of(BASE).items()}
    infos["lm_head.weight"] = infos["lm_head.weight"]._replace(dtype=np.dtype(np.float16))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: found float16; expected bfloat16 like \d+ others$"):
        hf_mapping.match(BASE, infos, "somewhere")


def test_a_copy_of_a_tied_head_is_ignored_as_in_the_reference():
    config = Glm4vConfig.from_dict(CONFIGS["tester"])
    assert "lm_head.weight" not in tensor_names(config)
    assert "lm_head.weight" not in hf_mapping.match(config, infos_of(config, **{"lm_head.weight": (99, 16)}), "test")
