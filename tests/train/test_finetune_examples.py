"""The jobs in examples/finetune: as they are they fit the 9B, and with small sizes they run."""

import dataclasses
import json

import jax
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_paths import ROOT

from convert.verify import verify
from glm4v_jax import Glm4vConfig
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.planning.mesh_presets import sizes_for
from train.commands import main
from train.config import ADAPTER, MODEL, load_config
from train.data.encoder import encode_options
from train.data.records import read_records
from train.log import METRICS, read_log
from train.loop import train

pytestmark = pytest.mark.slow

FOLDER = ROOT / "examples" / "finetune"
JOBS = {"lora_one_host": (1, 4, 8), "full_pod": (16, 32, 64)}
"""Name -> on how many devices it should run as it is."""
SMALL = dict(rows=2, length=320, vision_rows=2, vision_length=512)


@pytest.mark.parametrize("name", JOBS)
def test_the_files_fit_the_released_model(name):
    job, config = load_config(FOLDER / f"{name}.toml"), Glm4vConfig.glm4_1v_9b()
    for devices in JOBS[name]:
        sizes = sizes_for(f"{job.mesh}:{devices}", config)
        shards = sizes["data"] * sizes["fsdp"]
        assert shards == devices and not job.batch.rows % shards and not job.batch.vision_rows % shards
    vision, batch = config.vision_config, job.batch
    side = vision.patch_size
    # A picture, and a video of pairs of frames, of the most pixels: their patches fit a vision row, their tokens a row.
    for pixels, pairs in ((job.data.image_max_pixels, 1), (job.data.video_max_pixels, vision.temporal_patch_size)):
        patches = pixels // side**2 // pairs
        assert patches <= batch.vision_length
        assert patches // vision.spatial_merge_size**2 < batch.length
    assert encode_options(job.data, batch).max_length == batch.length


def test_what_to_change_is_there():
    for name in JOBS:
        lines = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
        changed = {line.split("=")[0].strip() for line in lines if "# CHANGE" in line}
        assert {"model", "out", "steps", "files", "rows"} <= changed


def test_the_sample_data_are_good(capfd):
    assert main(["check", str(FOLDER / "data.jsonl"), "--decode", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["bad"], report["checked"]) == (0, 6)
    kinds = [{item["type"] for item in record.media()} for record in read_records([str(FOLDER / "data.jsonl")])]
    assert {frozenset(kind) for kind in kinds} == {frozenset(), frozenset({"image"}), frozenset({"video"})}


@pytest.mark.parametrize("name", JOBS)
def test_the_jobs_run(name, tmp_path):
    job = load_config(FOLDER / f"{name}.toml")
    small = dataclasses.replace(
        job, model=str(RANDOM_CHECKPOINT), out=str(tmp_path), steps=2, mesh=f"data={jax.device_count()}",
        batch=dataclasses.replace(job.batch, **SMALL),
        data=dataclasses.replace(job.data, image_max_pixels=56 * 84, video_max_pixels=56 * 56 * 4),
        eval=dataclasses.replace(job.eval, share=0.4),
    )  # fmt: skip
    assert train(small).is_done
    lines = list(read_log(tmp_path / METRICS))
    assert [line["step"] for line in lines] == [1, 2] and not any(line["is_skipped"] for line in lines)
    if job.lora is not None:
        assert (tmp_path / ADAPTER / "adapter_model.safetensors").exists()
        return
    report = verify(tmp_path / MODEL, RANDOM_CHECKPOINT)
    moved = {tensor.name for tensor in report.different(0.0)}
    assert moved and set(open_weights(tmp_path / MODEL)) == set(open_weights(RANDOM_CHECKPOINT))
    assert all(not name.startswith("model.visual.") or "merger" in name for name in moved)
    assert any("merger" in name for name in moved) and any("language_model" in name for name in moved)
