"""Fine-tuning of the siblings: the loss falls, and what is written is a checkpoint of the same kind."""

import json

import PIL.Image
import pytest
from helpers_family import picture

from convert.verify import verify
from glm4v_jax import Glm4vConfig
from glm4v_jax.checkpoints.adapter import load_adapter
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.devices.mesh import use_mesh
from train.config import ADAPTER, MODEL, AdapterConfig, BatchConfig, DataConfig, TrainConfig
from train.log import METRICS, read_log
from train.loop import train
from train.optimizers import OptimizerConfig

pytestmark = pytest.mark.slow

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images to name."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, name in enumerate(("one", "two", "three", "four")):
        PIL.Image.fromarray(picture(56, 56, number)).save(folder / f"{name}.png")
        asked = {"role": "user", "content": "<image>?"}
        rows.append({"messages": [asked, {"role": "assistant", "content": name}], "images": [f"{name}.png"]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / "data.jsonl")


def job(model, out, data, lora):
    return TrainConfig(
        model=str(model), out=str(out), steps=STEPS, lora=lora, dtype="float32", remat="none", mesh="data=1",
        data=DataConfig(files=(data,)), batch=BatchConfig(rows=2, length=96, vision_rows=1, vision_length=128),
        optimizer=OptimizerConfig(learning_rate=1e-2 if lora else 2e-3, warmup=1),
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "lora"), [("flash", True), ("ocr", False)])
def test_a_few_steps_lower_the_loss_and_the_result_loads(kind, lora, data, tmp_path, family_checkpoint):
    source = family_checkpoint(kind)
    assert train(job(source, tmp_path, data, AdapterConfig(rank=2) if lora else None)).is_done
    losses = [line["loss"] for line in read_log(tmp_path / METRICS)]
    assert len(losses) == STEPS and losses[-1] < 0.9 * losses[0]
    config = Glm4vConfig.from_pretrained(source)
    if lora:
        with use_mesh():
            load_adapter(load_model(source, config, dtype="float32"), tmp_path / ADAPTER)
        return
    assert Glm4vConfig.from_pretrained(tmp_path / MODEL) == config
    moved = {tensor.name for tensor in verify(tmp_path / MODEL, source).different(0.0)}
    # Layers that only predict further tokens are kept as they were.
    extra = f"language_model.layers.{config.text_config.num_hidden_layers}."
    assert moved and not any(name.startswith(extra) for name in moved)
    assert set(open_weights(tmp_path / MODEL)) == set(open_weights(source))
