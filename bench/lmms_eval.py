"""lmms-eval over our engine: 20 questions about digits as a local task, and the same through `glm4v eval`.

    python -m bench.lmms_eval --python PATH/TO/ENVIRONMENT/bin/python [--model DIR]

lmms-eval brings torch and much else, so it has an environment of its own:

    python -m venv .venv-lmms
    .venv-lmms/bin/pip install lmms-eval==0.7.3 -e '.[eval]'

Nothing is downloaded: the questions, a task in lmms-eval's YAML and its functions are written into a temporary
directory. lmms-eval finds the model by its entry point. Prints both scores; writes `bench/results/lmms_eval.json`;
exits with status 1 if they are not equal.
"""

import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import pyarrow
import pyarrow.parquet

from bench import report
from eval.commands import main as evaluate
from eval.read_items import read_items
from eval.results import SUMMARY
from eval.tasks import TASKS
from glm4v_jax.tiny import TINY_CHECKPOINT

COUNT, NAME = 20, "digits_local"

YAML = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 48
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata:
  version: 0.0
"""

FUNCTIONS = """\
import io

from PIL import Image


def doc_to_visual(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


def write_task(directory: pathlib.Path) -> None:
    """Write the questions and a task of lmms-eval about them."""
    rows = []
    for item in read_items(TASKS["digits-vqa"], limit=COUNT):
        (image,) = (part["image"] for part in item.messages[-1]["content"] if part["type"] == "image")
        file = io.BytesIO()
        image.save(file, "PNG")
        image = {"bytes": file.getvalue(), "path": None}
        rows.append({"question": item.question, "answer": item.reference["answer"], "image": image})
    data = directory / "items.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    (directory / f"{NAME}.yaml").write_text(YAML.format(file=data, name=NAME), encoding="utf-8")
    (directory / "utils.py").write_text(FUNCTIONS, encoding="utf-8")


def theirs(python: str, directory: pathlib.Path, model: str) -> dict[str, Any]:
    """What lmms-eval says of the task; SystemExit if it failed, which it explains."""
    out = directory / "out"
    command = [
        python, "-m", "lmms_eval", "--model", "glm4v_jax", "--model_args", f"pretrained={model},slots=8",
        "--tasks", NAME, "--include_path", str(directory), "--output_path", str(out), "--batch_size", "1",
    ]  # fmt: skip
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "HF_HOME": str(directory / "hf"),
    }
    done = subprocess.run(command, env=os.environ | offline, check=False, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"lmms_eval: ended with status {done.returncode}")
    (file,) = out.rglob("*results.json")
    return json.loads(file.read_text(encoding="utf-8"))["results"][NAME]


def ours(directory: pathlib.Path, model: str) -> dict[str, Any]:
    """The summary of the same items here."""
    out = directory / "ours"
    status = evaluate(
        ["--model", model, "--task", "digits-vqa", "--limit", str(COUNT), "--out", str(out), "--no-report"]
    )
    if status:
        raise SystemExit(status)
    return json.loads((out / SUMMARY).read_text(encoding="utf-8"))


def main() -> int:
    """Run both, print, write; 1 if the scores differ."""
    parser = report.parser("bench.lmms_eval", __doc__)
    parser.add_argument("--python", required=True, help="of an environment with lmms-eval and this package")
    parser.add_argument("--model", default=str(TINY_CHECKPOINT), help="checkpoint that answers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        write_task(directory)
        found = theirs(arguments.python, directory, arguments.model)
        summary = ours(directory, arguments.model)
    exact = next(value for name, value in found.items() if name.split(",")[0] == "exact")
    figures = {"items": COUNT, "lmms_eval": exact, "glm4v_eval": summary["score"], "passed": exact == summary["score"]}
    print(f"lmms-eval: {exact:.3f}, glm4v eval: {summary['score']:.3f}, of {COUNT} items")
    return report.finish("lmms_eval", figures)


if __name__ == "__main__":
    sys.exit(main())
