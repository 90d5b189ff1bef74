"""Training steps on a device: an adapter of the whole model, and all weights of a short one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.device.model import Device, Figures, image, measured, random_module, timed
from bench.device.work import Sizes, shortened
from glm4v_jax.batch import Batch
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.devices.hardware import device_memory
from glm4v_jax.inputs.vision_rows import pack
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.layers import Remat
from glm4v_jax.model.lora import LoraConfig, add_lora, is_lora
from train.data.packing import TrainBatch
from train.data.placement import put
from train.optimizers import OptimizerConfig, make_optimizer
from train.state import Layout, init_state, split
from train.step import make_step

KEPT_ALL = 120e9
"""Bytes of a device from which a training step keeps all activations."""


def lora(device: Device) -> Figures:
    """Steps that train an adapter of the whole decoder, in bfloat16, on packed tokens and patches."""
    what = f"training, LoRA of rank {device.sizes.rank}"

    def measure(remat: Remat) -> dict[str, Any]:
        with mesh.use_mesh():
            if mesh.platform() == "tpu":  # where kernels are in another order for generation
                device.release()
                model = random_module(device.config, jnp.bfloat16)
            else:
                model = device.runtime().module
            model = add_lora(model, LoraConfig(rank=device.sizes.rank))
            return _step(device, model, is_lora, remat)

    yield _with_memory(what, measure)


def full(device: Device) -> Figures:
    """Steps that train all weights of a model with few layers."""
    device.release()

    def measure(remat: Remat) -> dict[str, Any]:
        with mesh.use_mesh():
            config = shortened(device.config, device.sizes.layers)
            return _step(device, random_module(config, jnp.float32), lambda path: True, remat)

    yield _with_memory(f"training, all weights, {device.sizes.layers} layers", measure)


def _with_memory(what: str, measure: Callable[[Remat], dict[str, Any]]) -> dict[str, Any]:
    """Measure with the least recomputation that the device has memory for."""
    ways: tuple[Remat, ...] = ("none", "attention", "full")
    if (device_memory(jax.devices()[0]) or KEPT_ALL) < KEPT_ALL:
        ways = ways[1:]
    for remat in ways:
        figure = measured(what, functools.partial(measure, remat)) | {"note": f"remat {remat}"}
        if "RESOURCE_EXHAUSTED" not in figure.get("error", ""):
            break
    return figure


def _step(device: Device, model: Glm4v, is_trained: Callable[[str], bool], remat: Remat) -> dict[str, Any]:
    """Figure of a training step; in the current mesh."""
    sizes, config = device.sizes, device.config
    params, frozen = split(model, is_trained)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup=0), 1000, model)
    step = make_step(Layout.of(model), optimizer, remat=remat)
    state = [init_state(params, optimizer)]
    del model, params
    batch = put(_batch(sizes, config), mesh.current_mesh())

    def run() -> Any:
        state[0], metrics = step(state[0], frozen, batch)
        return metrics.loss

    figure = timed(run)
    loss = float(run())
    return figure | {"loss": loss, "passed": bool(np.isfinite(loss))}


def _batch(sizes: Sizes, config: Glm4vConfig) -> TrainBatch:
    """Rows of one sample without padding each, vision rows of one image each."""
    rng, shape = np.random.default_rng(0), (1, sizes.rows, sizes.length)
    merge, patch_dim = config.vision_config.spatial_merge_size, config.vision_config.patch_dim
    height = merge * 2 ** ((sizes.vision_length.bit_length() - 1) // 2 - merge.bit_length() + 1)
    media = [image(height, sizes.vision_length // height, patch_dim, i) for i in range(sizes.vision_rows)]
    rows, features = pack(
        media, merge_size=merge, position_grid=config.vision_config.position_grid,
        shape=(sizes.vision_rows, sizes.vision_length),
    )  # fmt: skip
    index = np.full(shape, -1, np.int32)
    for row, medium in zip(index[0], media, strict=False):
        row[: len(features[medium])] = features[medium]
    ids, targets = (rng.integers(config.text_config.vocab_size, size=shape, dtype=np.int32) for _ in range(2))
    positions = np.broadcast_to(np.arange(sizes.length, dtype=np.int32), (1, 3, *shape[1:]))
    vision = jax.tree.map(lambda x: x[None], rows)
    batch = Batch(ids, np.ones(shape, np.int32), positions, index, vision)
    return TrainBatch(batch, targets, np.ones(shape, np.float32))
