"""A training step here and in transformers 4.57.1 with torch's AdamW, side by side, on a CPU: tokens a second.

    python -m bench.train [--rounds N]

About 35 million random float32 parameters, all of them trained, on the same short texts, images and videos
(`train_data`). Both sides clip gradients to a norm of 1 and keep all activations. Each is a process of its own, and
they take turns; ratios are taken within a round. Tokens of samples count; padding does not.

Three ratios, so that what packing gives and what the step gives can be distinguished:

- each side's usual way: samples packed into rows here, there padded to the longest of the batch. Every step trains on
  the same samples, and the losses of the first pass over them are compared;
- the same padded batches on both sides;
- packed rows here, and there batches of samples of a length (`group_by_length`): the least padding it can have.

Prints a table and the fraction of padding, for a missed aim where the time goes; writes
`bench/results/train.json`; exits with status 1 if an aim is missed.
"""

import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench import models, report, train_data, turns
from bench.turns import TimedTask

LEARNING_RATE = 1e-5
MAX_PADDING = 0.1
SAMPLES = 400
MAX_LOSS_DIFFERENCE = 1e-4
"""Relative, over a pass of a few steps."""


class WaysLine(NamedTuple):
    """One comparison: what each side's way to train is."""

    title: str
    ours: str
    theirs: str
    aim: float | None


LINES = (
    WaysLine("each side's usual way: packed / padded", "packed", "padded", 1.3),
    WaysLine("the same padded batches", "padded", "padded", None),
    WaysLine("packed / padded, samples grouped by length", "packed", "grouped", 1.0),
)
TURNS = (("packed", "padded"), ("padded", "grouped"))
"""Ways of (ours, theirs) that are timed after one another: between them, those of all lines."""


def measure(workers: turns.Workers, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Side -> way -> seconds of a pass over the batches, in every round."""
    works = [
        {"ours": TimedTask("train", {"way": ours}), "theirs": TimedTask("train", {"way": theirs})}
        for ours, theirs in TURNS
    ]
    results = turns.measure(workers, works, rounds)
    return {
        side: {
            work[side].arguments["way"]: [one[side] for one in each] for work, each in zip(works, results, strict=True)
        }
        for side in ("ours", "theirs")
    }


def compare_losses(workers: turns.Workers) -> dict[str, Any]:
    """The largest relative difference of a step's loss, from the same weights on."""
    expected = np.array(workers["theirs"]("losses", way="padded"))
    found = {way: np.array(workers["ours"]("losses", way=way)) for way in ("packed", "padded")}
    differences = {way: float(np.abs(losses / expected - 1).max()) for way, losses in found.items()}
    return {"theirs": expected.tolist(), **differences, "passed": max(differences.values()) <= MAX_LOSS_DIFFERENCE}


def run(
    workers: turns.Workers, directory: pathlib.Path, content: dict[str, Any], samples: Sequence[Any], *,
    steps: int, rounds: int, shape: train_data.Shape = train_data.SHAPE, lines: Sequence[WaysLine] = LINES,
) -> dict[str, Any]:  # fmt: skip
    """Pack the samples, load the checkpoint on both sides and measure; the batches are written beside the checkpoint.

    A pass has `steps` from the middle of the batches, since the first and the last are packed differently.
    """
    load = turns.load_average()
    batches = train_data.packed(samples, shape)
    first = (len(batches) - steps) // 2
    if first < 0:
        raise SystemExit(f"--samples: found {len(batches)} full batches of {len(samples)}; expected at least {steps}")
    used = batches[first : first + steps]
    file = directory / "batches.pickle"
    train_data.write_batches(file, {"packed": used, "padded": used, "grouped": train_data.grouped(used)})
    common = dict(directory=str(directory), batches=str(file), learning_rate=LEARNING_RATE)
    workers["theirs"]("load", **common)
    workers["ours"]("load", **common, shape=shape)
    losses = compare_losses(workers)
    seconds = measure(workers, rounds)
    tokens = sum(len(sample) for batch in used for sample in batch)
    compared = [
        {
            "what": line.title,
            **turns.compare(seconds["ours"][line.ours], seconds["theirs"][line.theirs], tokens, line.aim),
        }
        for line in lines
    ]
    packed = train_data.padding(batches, shape, content)
    padding = {
        "packed": packed,
        "padded_to_the_longest": train_data.padded_fraction(batches),
        "grouped_by_length": train_data.padded_fraction(train_data.grouped(used)),
        "aim": MAX_PADDING,
        "passed": max(packed.values()) <= MAX_PADDING,
    }
    missed = {
        f"{line.ours} | {line.theirs}": {side: TimedTask("train", {"way": getattr(line, side)}) for side in workers}
        for line, figures in zip(lines, compared, strict=True)
        if not figures["passed"]
    }
    return {
        "machine": turns.facts(workers),
        "rounds": rounds,
        "load_before": load,
        "parameters": models.num_parameters(content),
        "shape": shape._asdict(),
        "data": facts(samples, used),
        "losses": losses,
        "lines": compared,
        "padding": padding,
        "profiles": turns.profiles(workers, missed),
        "passed": losses["passed"] and padding["passed"] and all(line["passed"] for line in compared),
    }


def facts(samples: Sequence[Any], used: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What the data are: how many samples of which kind and length, and how much of them is in the timed steps."""
    lengths = [len(sample) for sample in samples]
    timed = [sample for batch in used for sample in batch]
    return {
        "samples": len(samples),
        "with_images_or_videos": sum(len(sample.frames) > 0 for sample in samples),
        "tokens": {"median": float(np.median(lengths)), "min": min(lengths), "max": max(lengths)},
        "vision_share": float(sum((s.prompt.medium_of >= 0).sum() for s in samples) / sum(lengths)),
        "timed_steps": len(used),
        "timed_samples": len(timed),
        "timed_tokens": sum(map(len, timed)),
    }


def tables(figures: Mapping[str, Any]) -> tuple[report.Table, report.Table]:
    """The comparisons, and the padding."""
    machine, data, padding = figures["machine"], figures["data"], figures["padding"]
    title = (
        f"jax {machine['ours']['jax']}, torch {machine['theirs']['torch']}, transformers "
        f"{machine['theirs']['transformers']}; {figures['parameters'] / 1e6:.0f}M parameters, float32, "
        f"{machine['ours']['cores']} cores; {data['timed_steps']} steps of {data['timed_tokens']:,} tokens, "
        f"{figures['rounds']} rounds"
    )
    speeds = [
        (line["what"], *(f"{line[side]['median']:,.0f}" for side in ("ours", "theirs")), *report.judged(line))
        for line in figures["lines"]
    ]
    packed, verdict = padding["packed"], report.verdict(padding["passed"])
    rows = [
        ("packed into rows", f"{packed['tokens']:.1%}", f"{packed['patches']:.1%}", f"{padding['aim']:.0%}", verdict),
        ("padded to the longest of the same samples", f"{padding['padded_to_the_longest']:.1%}", "", "", ""),
        ("grouped by length", f"{padding['grouped_by_length']:.1%}", "", "", ""),
    ]
    return (
        report.Table(title, ("tokens/s", "this package", "transformers", "ratio", "aim", ""), speeds),
        report.Table("fraction of padding", ("padding of", "tokens", "patches", "aim", ""), rows),
    )


def main() -> int:
    """Measure, print, write; 1 if an aim is missed."""
    parser = report.parser("bench.train", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side, in turns")
    parser.add_argument("--steps", type=int, default=4, help="of training, in a measurement")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="conversations, of both sides' batches")
    parser.add_argument("--threads", type=int, default=2, help="cores of each side")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        turns.start(turns.sides("bench.train_sides", arguments.threads)) as workers,
    ):
        directory = models.write_checkpoint(pathlib.Path(temporary), models.TRAINING, processor=True)
        samples = train_data.make_samples(directory, arguments.samples)
        figures = run(workers, directory, models.TRAINING, samples, steps=arguments.steps, rounds=arguments.rounds)
    losses = figures["losses"]
    worst = max(losses["packed"], losses["padded"])
    differ = f"losses differ by at most {worst:.1e}: {report.verdict(losses['passed'])}"
    return report.finish("train", figures, *tables(figures), differ, *report.profile_tables(figures["profiles"]))


if __name__ == "__main__":
    sys.exit(main())
