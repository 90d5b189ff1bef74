"""Trains the package's tiny model from nothing, measures it on digits it has not seen, and packages it: `make tiny`.

The training is a job like any other (`train.loop`): random weights as a checkpoint, records, a result as a checkpoint,
of which everything that is said about it is measured. It takes the place of the packaged one if it reaches the aims.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import rich.console

from bench.page import fill
from bench.report import ROOT
from glm4v_jax.errors import Glm4vError
from glm4v_jax.generate.engine import Engine
from glm4v_jax.tiny import TINY_CHECKPOINT
from tools.digit_curriculum import DigitRecords
from tools.digit_scores import Row, table
from tools.score_tiny import SLOTS, measure, missed
from tools.tiny_model import write_start
from train.config import BatchConfig, CheckpointConfig, DataConfig, TrainConfig
from train.job import MODEL
from train.loop import train
from train.optimizers import OptimizerConfig

STEPS = 2000
RECORDS_PER_STEP = 33
"""Rather more than are packed into a batch on average: after the last record, the curriculum would restart."""
DEVICES = 2
"""Two of one core each learn faster than one of two."""
REPORT = ROOT / "docs" / "tiny.md"


def job(start: Path, out: Path, steps: int = STEPS, seed: int = 0) -> TrainConfig:
    """The training job, from the checkpoint `start` to the directory `out`."""
    return TrainConfig(
        model=str(start),
        out=str(out),
        # The order of the records is the curriculum's.
        data=DataConfig(files=(), shuffle=False, threads=1),
        steps=steps,
        # About 32 records; a row of patches has an image of grounding, two of reading or two videos.
        batch=BatchConfig(rows=12, length=126, vision_rows=24, vision_length=72, lanes=1),
        optimizer=OptimizerConfig(
            name="muon", learning_rate=4e-3, warmup=0.05, final_share=0.02, weight_decay=0.05, b2=0.98
        ),
        checkpoint=CheckpointConfig(every=500, keep=1),
        freeze=(),
        dtype="float32",
        remat="none",
        mesh=f"data={DEVICES}",
        seed=seed,
        log_every=50,
    )


def make(out: Path, steps: int, seed: int, log: Callable[[str], None]) -> Path:
    """Train a model in `out`, empty or the directory of a job that was interrupted; return that of its checkpoint."""
    start = out / "start"
    write_start(start, seed)
    train(job(start, out, steps, seed), records=DigitRecords(steps * RECORDS_PER_STEP, seed=seed), log=log)
    return out / MODEL


class Run(NamedTuple):
    """How the model was made.

    steps, seed: of the training.
    weights: SHA-256 of the checkpoint's weights, whose figures these are.
    size: of the checkpoint, in bytes.
    seconds: that "training" and "measuring" took.
    """

    steps: int
    seed: int
    weights: str
    size: int
    seconds: Mapping[str, float]


def as_json(run: Run, rows: Sequence[Row]) -> str:
    """The figures."""
    found = [row._asdict() | {"scores": dataclasses.asdict(row.scores)} for row in rows]
    return json.dumps(run._asdict() | {"rows": found}, indent=2) + "\n"


def as_markdown(run: Run, rows: Sequence[Row]) -> str:
    """The page about them."""
    return fill(ROOT / "tools" / "templates" / "tiny.md", run=run, rows=rows, table=table(rows))


def package(source: Path, target: Path) -> None:
    """Put a checkpoint's files in the place of another's, which stay until all of the new ones are there."""
    aside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for directory in (aside, old):
        shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, aside)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Train, measure, report; the exit status is 1 if an aim is missed."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_tiny", description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="keep the job in this directory, and resume it there if it was interrupted"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=Path, default=TINY_CHECKPOINT, help="where the checkpoint goes")
    parser.add_argument("--report", type=Path, default=REPORT, help="where the figures go, beside a .json of them")
    arguments = parser.parse_args()
    console = rich.console.Console()

    def log(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    jax.config.update("jax_num_cpu_devices", DEVICES)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        try:
            model = make(out, arguments.steps, arguments.seed, log)
            trained = time.perf_counter() - start
            rows = measure(Engine.from_pretrained(model, num_slots=SLOTS))
        except Glm4vError as error:
            sys.exit(f"error: {error}")
        seconds = {"training": trained, "measuring": time.perf_counter() - start - trained}
        log(f"\n{table(rows)}\n\n{seconds['training']:.0f} s for training, {seconds['measuring']:.0f} s for measuring")
        if problems := missed(rows):
            kept = "" if arguments.out is None else f"; it is in {model}"
            sys.exit("\n".join(["error: the model is not packaged" + kept, *problems]))
        package(model, arguments.target)
    size = sum(path.stat().st_size for path in arguments.target.iterdir())
    weights = hashlib.sha256((arguments.target / "model.safetensors").read_bytes()).hexdigest()
    run = Run(arguments.steps, arguments.seed, weights, size, seconds)
    arguments.report.with_suffix(".json").write_text(as_json(run, rows), encoding="utf-8")
    arguments.report.write_text(as_markdown(run, rows), encoding="utf-8")
    log(f"{arguments.target}: {size:,} bytes; {arguments.report}")


if __name__ == "__main__":
    main()
