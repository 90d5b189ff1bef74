"""What a job starts with: memory is checked before weights are read, and whether they can be trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from convert.quantize import quantize
from glm4v_jax.checkpoints import plan
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.memory import Memory
from glm4v_jax.errors import ConfigError, DataError, MemoryShortageError
from train import job
from train.config import AdapterConfig, DataConfig, DataSetConfig, TrainConfig

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
    job.check_memory(config, CONFIG)
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


def test_data_sets_have_the_numbers_of_their_rows(tmp_path):
    for name, count in (("a", 5), ("b", 3)):
        rows = [{"query": f"{name}{number}?", "response": "yes"} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(**b):
        sets = {
            "a": DataSetConfig(files=(str(tmp_path / "a.jsonl"),)),
            "b": DataSetConfig(files=(str(tmp_path / "b.jsonl"),), share=2.0, **b),
        }
        config = TrainConfig(model=str(RANDOM_CHECKPOINT), out="out", data=DataConfig(sets=sets), steps=2)
        return config, job.read_data(config, None)

    config, data = read()
    assert [(numbers.tolist(), share) for numbers, share in data.draws] == [([0, 1, 2, 3, 4], 1.0), ([5, 6, 7], 2.0)]
    assert data.train[5].messages[0]["content"][0]["text"] == "b0?"
    kept = job.identity(config, CONFIG, len(data.train), data.digest)["data.sets"]
    assert kept == {"a": [1.0, None], "b": [2.0, None]}
    _, data = read(num_samples=2)
    assert len(data.draws[1][0]) == 2 and set(data.draws[1][0].tolist()) < {5, 6, 7}
    with pytest.raises(
        DataError, match=r"data\.sets\.b\.num_samples: found 4; expected at most the 3 rows of its files"
    ):
        read(num_samples=4)
