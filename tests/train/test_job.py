"""What a job starts with: memory is checked before weights are read, and whether they can be trained."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from convert.quantize import quantize
from glm4v_jax.checkpoints import plan
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.memory import Memory
from glm4v_jax.errors import ConfigError, MemoryShortageError
from train import job
from train.config import AdapterConfig, DataConfig, TrainConfig

CONFIG = Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT)


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("lora", [None, AdapterConfig(rank=2)], ids=["full", "lora"])
def test_too_little_memory_is_refused_before_anything_is_read(monkeypatch, lora):
    config = TrainConfig(
        model=str(RANDOM_CHECKPOINT), out="out", data=DataConfig(files=("data.jsonl",)), steps=2, lora=lora
    )
    started, state = job.Job.start(config, CONFIG)
    arrays = jax.tree.leaves((state.params, state.opt_state, started.frozen, state.params))
    held = sum(array.nbytes for array in arrays) + 12  # three numbers of the state
    free = [held]
    monkeypatch.setattr(plan, "memory_of", lambda devices: [Memory("host memory", free[0])])
    monkeypatch.setattr(job, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    job._check_memory(config, CONFIG)
    free[0] -= 1
    with pytest.raises(MemoryShortageError, match=r"checkpoint: needs .* for weights, gradients and optimizer state, "):
        job.Job.start(config, CONFIG)


@pytest.mark.usefixtures("mesh")
def test_integers_of_a_checkpoint_are_a_base_of_adapters_and_not_trained(tmp_path):
    quantize(RANDOM_CHECKPOINT, tmp_path / "int8")
    config = TrainConfig(
        model=str(tmp_path / "int8"), out="out", data=DataConfig(files=("data.jsonl",)), steps=2,
        lora=AdapterConfig(rank=2),
    )  # fmt: skip
    state, frozen = job.abstract_state(config, CONFIG)
    assert frozen["language_model.layers.stacked.mlp.down.kernel"].dtype == jnp.int8
    assert all(leaf.dtype == jnp.float32 for leaf in state.params.values())
    with pytest.raises(
        ConfigError, match=r"model: found .*int8, which is quantised \(8 bits, .*expected floats, or lora"
    ):
        job.abstract_state(dataclasses.replace(config, lora=None), CONFIG)
