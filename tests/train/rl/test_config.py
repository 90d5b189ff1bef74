"""The tables of a job that learns by reward: what they hold, and what is wrong with them."""

import dataclasses
import json

import pytest
from helpers_paths import ROOT

from glm4v_jax.errors import ConfigError
from train import loop
from train.config import load_config
from train.rl.config import FIELDS, VerifierConfig

JOB = """
model = "model"
out = "out"
steps = 500
[data]
files = ["problems.jsonl"]
levels = ["levels.jsonl"]
[batch]
length = 16384
[rl]
prompts = 64
samples = 16
updates = 1
clip_low = 0.2
clip_high = 0.28
average = "sample"
advantage = "mean_std"
max_ratio_drift = 1e-3
truncated = "force"
[rl.sampling]
engine_mesh = "same"
slots = 64
think_budget = 8192
answer_budget = 1024
temperature = 1.0
top_p = 1.0
top_k = 0
[rl.curriculum]
mode = "rlcs"
floor = 0.05
expansion_decay = 0.7
expansion_most = 4.0
prior = 4
[rl.verifiers]
grounding = { kind = "grounding", threshold = 0.5 }
chart = { kind = "chart", tolerance = 0.05 }
math = { kind = "math", tolerance = 1e-6, seconds = 5 }
ocr = { kind = "ocr" }
"""


@pytest.fixture
def load(tmp_path):
    """(text, replacement pairs) -> the job of a file with it."""

    def load(old="", new=""):
        assert old in JOB
        (tmp_path / "job.toml").write_text(JOB.replace(old, new) if old else JOB, encoding="utf-8")
        return load_config(tmp_path / "job.toml")

    return load


def test_a_job_has_all_tables(load, tmp_path):
    job = load()
    assert job.rl.verifiers["math"] == VerifierConfig(kind="math", tolerance=1e-6, seconds=5.0)
    assert job.rl.curriculum.prior == 4.0 and job.rl.sampling.longest == 9216
    assert job.data.levels == (str(tmp_path / "levels.jsonl"),)
    json.dumps(dataclasses.asdict(job.rl))  # checkpoints keep it


def test_it_is_not_trained_as_if_it_had_answers_to_imitate(load):
    with pytest.raises(ConfigError, match="rl: found a table; expected none"):
        loop.train(load())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("samples = 16", "samples = 1", "rl.samples: found 1; expected an integer of at least 2"),
        ("clip_low = 0.2", "clip_low = 1", r"rl.clip_low: found 1; expected a number above 0 and below 1"),
        ("prompts = 64", "promts = 64", "rl.promts: found an unknown field; .*did you mean 'prompts'"),
        ("temperature = 1.0", "temperature = 0.0", "rl.sampling.temperature: found 0.0; expected a number above 0"),
        ("top_k = 0", "top_k = 50", "rl.sampling.top_k: found 50; expected 0, no cut: "),
        ("top_p = 1.0", "top_p = 0.9", "rl.sampling.top_p: found 0.9; expected 1, no cut: "),
        ("top_p = 1.0", "top_p = 0", "rl.sampling.top_p: found 0; expected a number above 0 and at most 1"),
        ("floor = 0.05", "floor = 0.3", "rl.curriculum.floor: found 0.3; expected at most 0.2 for 5 tiers"),
        ('mode = "rlcs"', 'mode = "rlsc"', "rl.curriculum.mode: found 'rlsc'; .*did you mean 'rlcs'"),
        ('{ kind = "ocr" }', '{ kind = "ocr", tolerance = 1 }', "rl.verifiers.ocr.tolerance: found 1.0; expected none"),
        ('{ kind = "ocr" }', '{ kind = "orc" }', "rl.verifiers.ocr.kind: found 'orc'; expected one of 'math'"),
        ('{ kind = "ocr" }', "{ }", "rl.verifiers.ocr.kind: found nothing"),
        ('{ kind = "ocr" }', '{ kind = "ocr", treshold = 1 }', "rl.verifiers.ocr.treshold: found an unknown field"),
        ('{ kind = "ocr" }', '{ kind = "vqa", judge = "f" }', "rl.verifiers.ocr.judge: found 'f'; expected MODULE:FUN"),
        ('{ kind = "ocr" }', '{ kind = "choice" }', "rl.verifiers.ocr.kind: found 'choice'; .*allow_choice = true"),
        ("[rl.verifiers]", "[rl.verifier]", "rl.verifier: found an unknown field"),
        ("length = 16384", "length = 8192", "rl.sampling.think_budget .*: found 9216; expected less than batch.length"),
        (JOB[JOB.index("[rl]") :], "", "data.levels: found some without rl"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_field_and_value(load, old, new, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(old, new)
    assert "\n" not in str(error.value)


def test_choices_can_be_allowed(load):
    assert load("[rl]", "[rl]\nallow_choice = true").rl.allow_choice


def test_the_page_has_a_row_for_each_kind():
    rows = (ROOT / "docs/guides/reward.md").read_text(encoding="utf-8").partition("## Verifiers")[2].splitlines()
    first = [row.split("|")[1] for row in rows if row.startswith("| `")]
    assert [name.strip(" `") for names in first for name in names.split(",")] == [
        "math", "units", "chart", "counting", "ocr", "vqa", "video", "grounding", "gui", "choice",
    ]  # fmt: skip
    assert len(FIELDS) == 10
