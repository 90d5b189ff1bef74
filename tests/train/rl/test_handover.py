"""Trained parameters as the engine's model: the same numbers, in memory of their own, frozen leaves where they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.model.lora import LoraConfig, add_lora, fix_magnitudes, is_adapted
from glm4v_jax.model.params import leaf_paths
from glm4v_jax.model.runtime import random_module
from train.optimizers import group_of
from train.rl.handover import Handover
from train.state import Layout, split

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
ADAPTERS = {"lora": LoraConfig(), "dora": LoraConfig(dora=True, modules_to_save=("merger",))}


def buffers(tree):
    return {leaf.addressable_data(0).unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "lora", "dora", "frozen"])
def test_the_engine_gets_what_was_trained(mesh, lowerings, kind, dtype):
    model = random_module(CONFIG, 0, "float32")
    if kind in ADAPTERS:
        model = add_lora(model, ADAPTERS[kind], 0)
    rules = {"full": lambda path: True, "frozen": lambda path: group_of(path) != "vision"}
    params, frozen = split(model, rules.get(kind, functools.partial(is_adapted, model)))
    layout = Layout.of(model)
    handover = Handover(layout, params, frozen, dtype, mesh)
    first = handover(params)
    params = {path: x + 1 for path, x in params.items()}
    with lowerings() as lowered:
        found = handover(params)
    assert not lowered
    expected = jax.jit(fix_magnitudes)(layout.model(params, frozen, dtype)).unstacked()
    assert any(path.endswith("lora_gain") for path in leaf_paths(found)) == (kind == "dora")
    assert list(leaf_paths(found)) == list(leaf_paths(expected))
    for path, one, other in zip(leaf_paths(found), *map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.dtype == other.dtype, path
        tolerance = 1e-6 if path.endswith("lora_gain") else 0
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), tolerance, err_msg=path)
    assert not buffers(found) & buffers(params)
    # Of those that are frozen no second copy is made.
    shared = buffers(found) & buffers(first)
    assert len(shared) == sum(jnp.shape(x) is not None for x in jax.tree.leaves(found)) - changed(found, params)
    if dtype == "float32":
        assert bool(shared & buffers(frozen)) == (kind != "full")


def changed(model, params):
    """How many leaves of a model with its layers one by one are made of trained parameters."""
    trained = {path.replace(".stacked", "").replace("lora_magnitude", "lora_gain") for path in params}

    def plain(path):
        return ".".join(part for part in path.split(".") if not part.isdigit())

    return sum(plain(path) in trained for path in leaf_paths(model))
