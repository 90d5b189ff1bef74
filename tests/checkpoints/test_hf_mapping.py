"""The table of names: every tensor of a checkpoint goes to one place, every place is filled once, and back."""

import json

import jax
import numpy as np
import pytest
from helpers_paths import GOLDEN
from reference import CONFIGS, tensor_names

from glm4v_jax import Glm4v
from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError
from glm4v_jax.model.params import leaf_paths, num_params

RELEASED = Glm4vConfig.glm4_1v_9b()

pytestmark = pytest.mark.usefixtures("mesh")


def released_names():
    """The 704 names of the released checkpoint's index: patterns, and how many layers each has."""
    patterns = json.loads((GOLDEN / "model" / "released_names.json").read_text(encoding="utf-8"))
    return [pattern.replace("*", str(i)) for pattern, layers in patterns.items() for i in range(layers)]


def shapes_of(config):
    return tensor_names(config)


def test_released_checkpoint_matches_exactly():
    names = released_names()
    assert len(names) == len(set(names)) == 704
    shapes = shapes_of(RELEASED)
    assert set(names) == set(shapes)
    sources = hf_mapping.match(RELEASED, {name: shapes[name] for name in names}, "released")
    assert sorted(source.tensor for source in sources) == sorted(names)
    assert sum(int(np.prod(shapes[name])) for name in names) == 10_292_777_472


@pytest.mark.parametrize("config", [RELEASED, *(Glm4vConfig.from_dict(c) for c in CONFIGS.values())])
def test_every_leaf_is_filled_exactly_once(config):
    """Counted by elements: with layers and parts apart, what goes into a leaf is what the leaf holds."""
    abstract = jax.eval_shape(lambda: Glm4v.init(config))
    leaves = dict(zip(leaf_paths(abstract), jax.tree.leaves(abstract), strict=True))
    shapes, sizes = shapes_of(config), hf_mapping.dimensions(config)
    filled = dict.fromkeys(leaves, 0)
    places = set()
    for source in hf_mapping.match(config, shapes, "test"):
        path = source.rule.leaf
        for group in ("language_model.layers.", "visual.blocks."):
            path = path.replace(group, f"{group}stacked.") if source.layer is not None else path
        place = (path, source.layer, source.rule.part)
        assert place not in places
        places.add(place)
        # The rule's layout gives the leaf's own shape, without the axes of layers and parts.
        expected = list(leaves[path].shape)
        if source.layer is not None:
            assert expected.pop(0) > source.layer
        if source.rule.part is not None:
            assert expected.pop(source.rule.part[0]) > source.rule.part[1]
        tensor = np.broadcast_to(np.float32(0), shapes[source.tensor])
        if np.prod(tensor.shape) < 1e6:
            assert list(source.rule.to_leaf(tensor, sizes).shape) == expected
        assert np.prod(tensor.shape) == np.prod(expected)
        filled[path] += int(np.prod(expected))
    assert filled == {path: int(np.prod(leaf.shape)) for path, leaf in leaves.items()}
    assert sum(filled.values()) == num_params(abstract)


@pytest.mark.parametrize("name", ["base", "odd", "mha", "tester"])
def test_rules_are_bijections(name):
    config = Glm4vConfig.from_dict(CONFIGS[name])
    sizes = hf_mapping.dimensions(config)
    for rule in hf_mapping.rules(config):
        tensor = np.arange(np.prod(rule.tensor_shape(sizes))).reshape(rule.tensor_shape(sizes))
        leaf = rule.to_leaf(tensor, sizes)
        assert np.array_equal(np.sort(leaf, axis=None), np.arange(tensor.size))
        assert np.array_equal(rule.to_tensor(leaf, sizes), tensor), rule


def test_rules_of_a_model():
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
    config = Glm4vConfig.from_dict(CONFIGS["base"])
    shapes = {name.replace("model.", prefix, 1): shape for name, shape in shapes_of(config).items()}
    sources = hf_mapping.match(config, shapes, "test")
    assert {source.tensor for source in sources} == set(shapes)


def test_all_that_does_not_fit_is_told_at_once():
    config = Glm4vConfig.from_dict(CONFIGS["base"])
    shapes = shapes_of(config)
    del shapes["model.visual.downsample.bias"]
    del shapes["lm_head.weight"]
    shapes["model.language_model.norm.weight"] = (63,)
    shapes["model.language_model.layers.2.mlp.down_proj.weight"] = (64, 96)
    shapes["optimizer.state"] = (3,)
    shapes["visual.merger.proj.weight"] = (64, 64)
    with pytest.raises(CheckpointError) as raised:
        hf_mapping.match(config, shapes, "somewhere")
    assert str(raised.value) == "somewhere: 6 tensors do not fit the configuration: " + "; ".join(
        [
            "doubled: visual.merger.proj.weight and model.visual.merger.proj.weight",
            "misshapen: model.language_model.norm.weight has shape [63], expected [64]",
            "missing: lm_head.weight [320, 64]",
            "missing: visual.downsample.bias [64]",
            "unexpected: model.language_model.layers.2.mlp.down_proj.weight [64, 96]",
            "unexpected: optimizer.state [3]",
        ]
    )


def test_nothing_at_all_lists_every_tensor():
    config = Glm4vConfig.from_dict(CONFIGS["base"])
    with pytest.raises(CheckpointError) as raised:
        hf_mapping.match(config, {}, "somewhere")
    for name in shapes_of(config):
        assert f"missing: {hf_mapping.canonical(name)} [" in str(raised.value)


def test_a_tied_head_may_be_in_the_checkpoint():
    """As in the reference: a tied model ignores it; an untied one wants it."""
    config = Glm4vConfig.from_dict(CONFIGS["tester"])
    shapes = shapes_of(config)
    assert "lm_head.weight" not in shapes
    sources = hf_mapping.match(config, shapes | {"lm_head.weight": (99, 16)}, "test")
    assert "lm_head.weight" not in {source.tensor for source in sources}
