"""What the tests of adapters share: adapters that do something, and what a model with one computes, or PEFT."""

import math
import zlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_transformers import import_transformers
from reference import Prompts, assert_close, their_inputs

from glm4v_jax import make_batch
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.hf.forward import causal_lm_loss
from glm4v_jax.model import lora
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.params import leaf_paths, matching_linears, sizes, stacked_layers

EVERY = lora.LoraConfig(rank=3, alpha=4.5, target=".*")
"""An adapter beside every kernel; of an odd rank, and a scale that is not 1."""
IMAGE = [[4, ("image", (4, 6)), 3], [9]]
"""Rows for `batch_of`, one of them with an image."""


def trained(model: Glm4v, config: lora.LoraConfig = EVERY, seed: int = 5) -> Glm4v:
    """The model with an adapter whose B is not 0: the same values in either layout and on every mesh.

    `lora.add_lora` draws on the devices, which takes a program for each structure of a model; here NumPy draws.
    """
    result = lora.copy_without_lora(model)
    for path, found in matching_linears(result, config.target, "target").items():
        for layer, linear in enumerate(found):
            inputs, outputs = sizes(linear)
            layers = stacked_layers(linear)
            pairs = [
                _pair(f"{path} {number} {seed}", inputs, config.rank, outputs)
                for number in (range(layers) if layers else [layer])
            ]
            a, b = (np.stack(same) if layers else same[0] for same in zip(*pairs, strict=True))
            axes = (*linear.in_axes, None), (None, *linear.out_axes)
            a, b = (_put(x, names, linear.kernel[...].sharding.mesh) for x, names in zip((a, b), axes, strict=True))
            lora.set_lora(linear, a, b, config.alpha / config.rank)
    return result


def _pair(name: str, inputs: Any, rank: int, outputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """A as it is drawn for a new adapter, and a normally distributed B."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    a = random.uniform(-1, 1, (*inputs, rank)) / math.sqrt(math.prod(inputs))
    return a.astype(np.float32), (0.2 * random.standard_normal((rank, *outputs))).astype(np.float32)


def _put(values: np.ndarray, axes: Any, devices: Any) -> Any:
    spec = jax.sharding.PartitionSpec(*(None,) * (values.ndim - len(axes)), *mesh.spec(*axes))
    return jax.make_array_from_callback(
        values.shape, jax.sharding.NamedSharding(devices, spec), values.__getitem__, dtype=values.dtype
    )


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


def import_peft() -> ModuleType:
    """PEFT, which wants transformers to be importable; skips the test where either is not installed."""
    import_transformers()
    return pytest.importorskip("peft")


def their_logits(model: Any, prompts: Prompts) -> np.ndarray:
    """[B, T, V] of a model of transformers."""
    import torch

    with torch.no_grad():
        return model(**their_inputs(model, prompts)).logits.numpy()


def assert_logits(model: Glm4v, batch: Any, prompts: Prompts, expected: np.ndarray) -> None:
    """The model computes these logits, of `their_logits`."""
    rows, tokens, _ = expected.shape
    assert_close(np.asarray(logits_of(model, batch))[:rows, :tokens], expected, prompts.real)


def loss_and_logits(model: Glm4v, batch: Any) -> tuple[Any, Any]:
    """Mean cross entropy of all tokens but vision's, and the logits that it is of."""
    logits = model.logits(model(batch))
    labels = jnp.where(batch.segment_ids * (batch.input_ids < 300) > 0, batch.input_ids, -100)
    return causal_lm_loss(logits, labels), logits


def loss_of(model: Glm4v, batch: Any) -> Any:
    """Mean cross entropy of all tokens but vision's."""
    return loss_and_logits(model, batch)[0]
