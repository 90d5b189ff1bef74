"""What is said about the packaged tiny model: its figures as JSON, and with what they mean as Markdown."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench.page import fill
from bench.report import ROOT
from tools.digit_scores import Row, table


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
