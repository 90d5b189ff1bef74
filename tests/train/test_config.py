"""Job files: what they hold, and what is wrong with them, all of it in one error."""

import dataclasses
import functools
import json
import tomllib

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.errors import ConfigError
from train import trackers
from train.commands import main
from train.config import AdapterConfig, load_config

JOB = """
model = "model"
out = "out"
steps = 9
freeze = ["vision"]
dtype = "float32"

[data]
files = ["data.jsonl"]

[batch]
rows = 2

[optimizer]
learning_rate = 1e-3
warmup = 2
"""


def changed(changes):
    """The text of the job with other fields, named as in errors; without those that are None."""
    job = tomllib.loads(JOB)
    for name, value in changes.items():
        *tables, key = name.split(".")
        table = functools.reduce(lambda table, part: table.setdefault(part, {}), tables, job)
        table[key] = value
    return "".join(f"{key} = {toml(value)}\n" for key, value in job.items() if value is not None)


def toml(value):
    if not isinstance(value, dict):
        return json.dumps(value)
    return f"{{{', '.join(f'{key} = {toml(item)}' for key, item in value.items() if item is not None)}}}"


@pytest.fixture
def load(tmp_path):
    """(text) -> the job of a file with it."""

    def load(text):
        (tmp_path / "job.toml").write_text(text, encoding="utf-8")
        return load_config(tmp_path / "job.toml")

    return load


def test_paths_are_relative_to_the_job_file(load, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load(JOB + '[eval]\nfiles = ["/held.jsonl"]')
    assert (config.model, config.out) == (str(tmp_path / "model"), str(tmp_path / "out"))
    assert config.data.files == (str(tmp_path / "data.jsonl"),) and config.eval.files == ("/held.jsonl",)


def test_a_job_file_may_begin_with_a_byte_order_mark(load):
    assert load("\ufeff" + JOB) == load(JOB)


def test_fields_are_of_their_types(load):
    config = load(JOB)
    assert config.optimizer.learning_rate == 1e-3 and config.batch.rows == 2 and config.freeze == ("vision",)
    assert isinstance(config.optimizer.warmup, float)
    assert load(JOB + "[eval]\nshare = 0.5").eval.share == 0.5


INVALID = [
    ({"steps": None, "stepps": 9}, "stepps: found an unknown field; expected some of model, out"),
    ({"steps": 1.5}, "steps: found 1.5; expected an integer of at least 1"),
    ({"steps": 0}, "steps: found 0; expected an integer of at least 1, or epochs"),
    ({"epochs": 2}, "steps: found 9 beside epochs = 2; expected an integer of at least 1, or"),
    ({"steps": None, "epochs": -1}, "epochs: found -1; expected an integer of at least 1"),
    ({"steps": None}, "job.toml: steps: found nothing; expected an integer of at least 1, or epochs$"),
    ({"seed": -1}, "seed: found -1; expected an integer from 0 to 4294967295"),
    ({"seed": 4294967296}, "seed: found 4294967296; expected an integer from 0 to 4294967295"),
    ({"freeze": ["vit"]}, r"freeze: found \['vit'\]; expected a list of some of 'vision', 'merger', 'llm'"),
    ({"freeze": "vision"}, "freeze: found 'vision'; expected a list"),
    ({"dtype": "int8"}, "dtype: found 'int8'; expected one of 'float32', 'bfloat16'"),
    ({"data.files": []}, r"data.files: found \[\]; expected a list of at least one path"),
    ({"data.files": None}, "data.files: found nothing; expected a list of at least one path, or data.s"),
    ({"data.files": ["d"], "data.sets.a.files": ["a"]}, r"data.files: found \['d'\]; expected none beside sets"),
    ({"data.files": None, "data.sets.a.files": []}, r"data.sets.a.files: found \[\]; expected a list of at least"),
    (
        {"data.files": None, "data.sets.a": {"files": ["a"], "share": 0}},
        "data.sets.a.share: found 0; expected a number above 0",
    ),
    (
        {"steps": None, "epochs": 1, "data.files": None, "data.sets.a.files": ["a"]},
        "epochs: found 1 beside data.sets; expected steps",
    ),
    (
        {"data.files": None, "data.sets.a.files": ["a"], "eval.share": 0.1},
        "eval.share: found 0.1 beside data.sets; expected eval.files",
    ),
    ({"data.max_length": 0}, "data.max_length: found 0; expected an integer of at least 1"),
    ({"data.format": "csv"}, "data.format: found 'csv'; expected one of 'openai', "),
    ({"batch.rows": True}, "batch.rows: found True; expected an integer"),
    ({"batch.lanes": 2}, "batch.lanes: found 2; expected a divisor of rows, 2, and of vision_rows, 1"),
    (
        {"optimizer.learning_rate": None, "optimizer.group_learning_rates": 3},
        "optimizer.group_learning_rates: found 3; expected",
    ),
    ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate: found -1.0; expected a number above 0"),
    ({"optimizer.warmup": 10}, "optimizer.warmup: found 10.0; expected at most 9 steps, or a fraction below 1"),
    ({"freeze": None, "lora.rank": 0}, "lora.rank: found 0; expected an integer of at least 1"),
    ({"lora": {}}, r"freeze: found \['vision'\] beside lora"),
    (
        {"freeze": None, "lora": {"adapter": "a", "rank": 4, "dropout": 0.1}},
        "lora.rank: found 4 beside lora.adapter; expected one of them",
    ),
    (
        {"freeze": None, "lora": {"adapter": "a", "rank": 8, "alpha": 1, "rnak": 4}},
        "lora.rank: found 8 beside lora.adapter; .*; lora.alpha: found 1 beside .*; lora.rnak: found an unknown",
    ),
    ({"freeze": None, "lora.dropout": 1}, "lora.dropout: found 1; expected a number of at least 0 and below 1"),
    ({"neftune": 0}, "neftune: found 0; expected a number above 0"),
    ({"quantize": "int8"}, "quantize: found 'int8' without lora; expected both"),
    ({"eval": {}}, "eval.share: found 0.0 and no files; expected either share or files"),
    ({"eval": {"files": ["a.jsonl"], "share": 0.5}}, "eval.share: found 0.5 beside 1 file; expected either"),
    ({"eval.share": 1.5}, "eval.share: found 1.5; expected a number of at least 0 and below 1"),
    ({"eval": {"share": 0.5, "patience": 0}}, "eval.patience: found 0; expected an integer of at least 1"),
    ({"eval": {"share": 0.5, "every": 0}}, "eval.every: found 0; expected an integer of at least 1"),
    ({"checkpoint.best": "loss"}, "checkpoint.best: found 'loss' without eval; expected both"),
    ({"checkpoint.best": "score", "eval.share": 0.5}, "checkpoint.best: found 'score' with eval.generate = 0"),
]
"""Changes of the job, and how the error begins."""
INVALID_HERE = [
    ({"trackers": ["tensorboard"]}, "trackers: found 'tensorboard' without the package nothing;"),
    ({"mesh": "data=64"}, "mesh: mesh data=64 needs 64 devices, found "),
    ({"mesh": "fast"}, "mesh: found 'fast'; expected one of the presets"),
    (
        {"freeze": None, "lora": {"target": "nope", "modules_to_save": ["lm_head"]}},
        "lora.target: found 'nope'; expected a pattern of some of ",
    ),
    (
        {"freeze": None, "lora": {"target": "lm_head", "modules_to_save": ["lm_head"]}},
        "lora.target: found 'lm_head'; expected no layer of modules_",
    ),
    ({"freeze": None, "lora.adapter": "."}, "lora.adapter: {here}/adapter_config.json: found no such"),
    ({"data.files": ["none.jsonl"]}, "data.files: {here}/none.jsonl: found no such file"),
    ({"data.media_dir": "none"}, "data.media_dir: found {here}/none, no such directory"),
    (
        {"data.files": None, "data.sets.a": {"files": ["data.jsonl"], "num_samples": 9}},
        "data.sets.a.num_samples: found 9; expected at most the 1 row",
    ),
    ({"out": "data.jsonl"}, "out: found {here}/data.jsonl: File exists; expected a directory"),
]
"""The same of what only a job's model, its data or the machine show, before anything is loaded."""


@pytest.mark.parametrize(("changes", "message"), INVALID)
def test_invalid_fields_are_named(load, tmp_path, capsys, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(changed(changes))
    assert str(error.value).startswith(f"{tmp_path / 'job.toml'}: ")
    assert main([str(tmp_path / "job.toml")]) == 1
    assert capsys.readouterr().err == f"train: error: {error.value}\n"


def test_invalid_toml_is_named(load):
    with pytest.raises(
        ConfigError, match=r"found invalid TOML: cannot declare \('data',\) twice .*; expected fields as"
    ):
        load("[data]" + JOB)


@pytest.mark.parametrize(("changes", "message"), INVALID_HERE)
def test_errors_of_a_job_name_its_file_and_field(load, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.setattr("train.loop.Job.start", None)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", trackers.TRACKERS["tensorboard"]._replace(package="nothing"))
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    (tmp_path / "job.toml").write_text(changed({"model": str(RANDOM_CHECKPOINT)} | changes))
    assert main([str(tmp_path / "job.toml")]) == 1
    assert capsys.readouterr().err.startswith(f"train: error: {tmp_path / 'job.toml'}: {message.format(here=tmp_path)}")


def test_all_faults_are_in_one_error(load):
    with pytest.raises(ConfigError) as error:
        load(changed({"steps": None, "step": 9, "batch.rows": 0, "dtype": "float64"}))
    for field in (
        "step: found an unknown field",
        "steps: found nothing",
        "batch.rows: found 0",
        "dtype: found 'float64'",
    ):
        assert field in str(error.value)


def test_an_adapter_to_start_from_is_refused_beside_a_rank():
    assert AdapterConfig(adapter="a", dropout=0.1).adapter == "a"
    with pytest.raises(
        ConfigError, match=r"^rank: found 16 beside adapter; expected one of them: the adapter has its own$"
    ):
        AdapterConfig(adapter="a", rank=16)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.toml: found no such file"):
        load_config("nowhere.toml")


def test_a_changed_copy_is_checked_too(load):
    with pytest.raises(ConfigError, match="steps: found 0"):
        dataclasses.replace(load(JOB), steps=0)
    with pytest.raises(ConfigError, match=r"optimizer\.warmup: found 2\.0; expected at most 1 step"):
        dataclasses.replace(load(JOB), steps=1)


def test_the_command_names_a_model_that_is_missing(load, tmp_path, capsys):
    load(changed({"model": f"{RANDOM_CHECKPOINT}-none"}))
    assert main([str(tmp_path / "job.toml")]) == 1
    line = capsys.readouterr().err
    assert f"{tmp_path / 'job.toml'}: model: found " in line and "-none, which is not a directory" in line
