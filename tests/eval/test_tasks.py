"""Tasks: those of the package, a user's own, and those whose data comes with the package."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers_paths import ROOT

from eval.metrics import METRICS
from eval.read_items import read_items
from eval.tasks import TASKS, Task, find_task
from glm4v_jax.cli.main import main
from glm4v_jax.errors import ConfigError
from glm4v_jax.tiny.digits import held_out
from tools.digit_scores import score

BUILT_IN = ("digits-vqa", "digits-grounding", "digits-motion")


def test_tasks_have_descriptions_and_are_json():
    assert all(task.name == name and task.description and task.data for name, task in TASKS.items())
    assert tuple(name for name, task in TASKS.items() if task.is_built_in) == BUILT_IN
    told = json.loads(json.dumps({name: dataclasses.asdict(task) for name, task in TASKS.items()}))
    assert {name: Task(**fields) for name, fields in told.items()} == TASKS


def test_a_variant_changes_some_fields_of_its_task():
    assert find_task("refcoco") is TASKS["refcoco"]
    variant = find_task("refcoco@lmms-eval")
    assert (variant.name, variant.metric, variant.reader) == ("refcoco@lmms-eval", "refcoco-lmms", "refcoco")
    assert variant.prompt != TASKS["refcoco"].prompt


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "refcoc",
            r"--task: found 'refcoc'; expected a .toml file, or one of digits-vqa, .*; did you mean 'refcoco'\?",
        ),
        ("refcoco@x", r"--task refcoco@: found 'x'; expected one of locate, lmms-eval, vlm"),
        ("vqa@", r"--task vqa@: found ''; expected no variant"),
    ],
)
def test_unknown_tasks_and_variants_are_errors(name, message):
    with pytest.raises(ConfigError, match=message):
        find_task(name)


def test_tasks_are_listed_as_a_table_and_as_json(capsys):
    assert main(["eval", "tasks"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "metric", "what"]
    listed = [[name, task.metric, task.description] for name, task in TASKS.items()]
    assert [line.rstrip().split(maxsplit=2) for line in lines] == listed
    assert main(["eval", "tasks", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(TASKS)


def test_a_toml_file_is_a_task(tmp_path):
    path = tmp_path / "invoices.toml"
    path.write_text(
        'metric = "anls"\nprompt = """{{ question }}\nBriefly."""\nsystem = "You read invoices."\npreset = "greedy"\n'
        "[options]\nmax_new_tokens = 64\n[variants.harness]\nmetric = 'anls-harness'\n",
        encoding="utf-8-sig",  # as Windows writes it
    )
    task = find_task(str(path))
    assert task == Task(
        "invoices", "anls", prompt="{{ question }}\nBriefly.", system="You read invoices.", preset="greedy",
        options={"max_new_tokens": 64}, variants={"harness": {"metric": "anls-harness"}},
    )  # fmt: skip
    (tmp_path / "data.jsonl").write_text('{"question": "Total?", "answers": ["12 EUR", "12"]}\n')
    (item,) = read_items(task, [tmp_path])
    assert item.question == "You read invoices.\nTotal?\nBriefly."
    assert METRICS[task.metric].score("<answer>12 eur</answer>", item.reference).value == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("metric = ", "found invalid TOML"),
        ("", "metric: found nothing; expected one of refcoco"),
        ("metric = 'none'", "metric: found 'none'; expected one of refcoco"),
        ("metric = 'anls'\nreader = 'coco'", "reader: found 'coco'; expected one of rows"),
        ("metric = 'anls'\npreset = 'hot'", "preset: found 'hot'; expected one of cli"),
        ("metric = 'anls'\nprompt = '{{ a'", "prompt: found '{{ a'; expected a jinja2 template"),
        ("metric = 'anls'\nprompt = 3", "prompt: found 3; expected a string"),
        ("metric = 'anls'\noptions = 3", "options: found 3; expected an object"),
        ("metric = 'anls'\nname = '../x'", r"name: found '\.\./x'; expected the name of a directory"),
        ("metric = 'anls'\npromt = 'x'", "promt: found an unknown field; expected some of name, metric"),
        ("metric = 'anls'\n[variants]\nx = 3", "variants: found {'x': 3}; expected an object"),
        ("metric = 'anls'\n[variants.x]\nname = 'y'", r"variants\.x\.name: found an unknown field"),
        ("metric = 'anls'\n[variants.x]\nmetric = 'y'", r"variants\.x\.metric: found 'y'; expected one of refcoco"),
        ("metric = 'x'\nprompt = 3", "metric: found 'x'; .*; .*prompt: found 3"),
    ],
)
def test_an_invalid_file_is_an_error_with_file_and_field(tmp_path, content, message):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"mine\.toml: {message}"):
        find_task(str(path))


@pytest.mark.parametrize("name", BUILT_IN)
def test_packaged_items_are_scored_by_their_metric(name):
    pytest.importorskip("sklearn")
    task = TASKS[name]
    items, metric = read_items(task), METRICS[task.metric]
    assert len(items) == (720 if name == "digits-grounding" else 360)
    assert len({item.id for item in items}) == len(items)
    for item in items:
        metric.check(item.reference)
        answer = item.reference["answer"]
        text = f"<think>3 or left.</think><answer><|begin_of_box|>{answer}<|end_of_box|></answer>"
        assert metric.score(text, item.reference).value == 1.0
        assert metric.score("<answer><|begin_of_box|>[[0,0,9,9]]<|end_of_box|></answer>", item.reference).value == 0.0
    first = read_items(task, limit=5)
    assert [(item.id, item.asked, item.reference) for item in first] == [
        (item.id, item.asked, item.reference) for item in items[:5]
    ]
    json.dumps([(item.asked, dict(item.reference)) for item in items])


def test_packaged_grounding_alternates_between_one_and_two_digits():
    pytest.importorskip("sklearn")
    items = read_items(TASKS["digits-grounding"], limit=4)
    assert [item.id for item in items] == [
        f"digits/grounding{kind}/held-out:{number}" for number in (0, 1) for kind in (1, 2)
    ]
    assert [item.group for item in items] == ["one digit", "two digits"] * 2
    assert [len(item.reference["other_boxes"]) for item in items] == [0, 1, 0, 1]
    assert all((item.reference["width"], item.reference["height"]) == (1000, 1000) for item in items)
    both = f"<answer>[{items[1].reference['boxes'][0]}, {items[1].reference['other_boxes'][0]}]</answer>"
    assert METRICS["box_iou"].score(both, items[1].reference).value == 0.0


@pytest.mark.parametrize(("name", "kind"), [("digits-vqa", "reading"), ("digits-grounding", "grounding2")])
def test_figures_equal_those_of_training(name, kind):
    pytest.importorskip("sklearn")
    truth, draw = held_out(kind), np.random.default_rng(0)
    answers = []
    for number, example in enumerate(truth):
        answer = example.answer if number % 3 else "4 "
        if example.boxes:
            corners = np.clip(np.reshape(example.boxes[0], (2, 2)) + draw.integers(-150, 150, (2, 2)), 0, 1000)
            answer = f"[[{','.join(map(str, np.sort(corners, axis=0).ravel()))}]]" * (1 + (number % 9 == 0))
        answers.append(f"<think>5</think><answer><|begin_of_box|>{answer}<|end_of_box|></answer>")
    expected = score(answers, truth)
    texts = dict(zip((example.source for example in truth), answers, strict=True))
    items, metric = read_items(TASKS[name]), METRICS[TASKS[name].metric]
    scores = [(item.reference, metric.score(texts[item.id], item.reference)) for item in items if item.id in texts]
    figures = metric.aggregate(scores)
    assert 0.1 < figures["score"] < 0.9
    assert figures["score"] == pytest.approx(expected.accuracy, abs=1e-9)
    assert expected.mean_iou is None or figures["mean_iou"] == pytest.approx(expected.mean_iou, abs=1e-9)


def test_reading_items_imports_no_jax():
    program = (
        "import sys, eval.read_items\n"
        "loaded = {'jax', 'flax', 'torch', 'transformers', 'pyarrow', 'sklearn', 'train'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
