"""What the tests of adapters share: adapters that do something, and what a model with one computes."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from reference import Prompts

from glm4v_jax import make_batch
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.hf.forward import causal_lm_loss
from glm4v_jax.model import lora
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.params import leaf_paths, linears, stacked_layers

EVERY = lora.LoraConfig(rank=3, alpha=4.5, target=".*")
"""An adapter beside every kernel; of an odd rank, and a scale that is not 1."""


def trained(model: Glm4v, config: lora.LoraConfig = EVERY, seed: int = 5) -> Glm4v:
    """The model with an adapter whose B is not 0: the same values in either layout and on every mesh."""
    result = lora.add_lora(model, config, seed)
    every = {path: found for path, found in linears(result).items() if found[0].lora_b is not None}

    @jax.jit
    def draw(key: Any) -> dict[str, list[Any]]:
        return {path: [_values(x, key, path, i) for i, x in enumerate(found)] for path, found in every.items()}

    for path, values in draw(jax.random.key(seed)).items():
        for linear, value in zip(every[path], values, strict=True):
            linear.lora_b[...] = value
    return result


def _values(linear: Any, key: Any, path: str, layer: int) -> Any:
    """A normally distributed B, from one key for each layer."""
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    layers, shape = stacked_layers(linear), linear.lora_b.shape
    keys = [jax.random.fold_in(key, i) for i in (range(layers) if layers else [layer])]
    values = [0.2 * jax.random.normal(k, shape[1:] if layers else shape) for k in keys]
    values = [mesh.reshard(value, None, *linear.out_axes) for value in values]
    return jnp.stack(values) if layers else values[0]


def leaves_of(model: Glm4v) -> dict[str, Any]:
    """Path -> leaf."""
    return dict(zip(leaf_paths(model), jax.tree.leaves(model), strict=True))


def batch_of(config: Glm4vConfig, rows: list[list[Any]], seed: int = 1) -> tuple[Any, Prompts]:
    """A batch of prompts with their padding on the right."""
    prompts = Prompts(config, rows, padding="right", seed=seed)
    batch, _ = make_batch(config=config, **prompts.inputs, batch_multiple=math.lcm(len(rows), mesh.data_shards()))
    return batch, prompts


@jax.jit
def logits_of(model: Glm4v, batch: Any) -> Any:
    """[B, T, V]."""
    return model.logits(model(batch))


def loss_of(model: Glm4v, batch: Any) -> Any:
    """Mean cross entropy of all tokens but vision's."""
    labels = jnp.where(batch.segment_ids * (batch.input_ids < 300) > 0, batch.input_ids, -100)
    return causal_lm_loss(model.logits(model(batch)), labels)
