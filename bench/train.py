"""A training step here and in transformers 4.57.1 with torch's AdamW, side by side, on a CPU: tokens a second.

    python -m bench.train [--rounds N]

About 35 million random float32 parameters, all of them trained, on the same short texts, pictures and videos
(`train_data`). Both sides clip gradients to a norm of 1 and keep all activations. Each is a process of its own, and
they take turns; ratios are taken within a round. A token counts where it is one of a sample's; padding does not.

Three ratios, so that what packing gives and what the step gives can be told apart:

- each side's usual way: samples packed into rows here, there padded to the longest of the batch. Every step learns from
  the same samples, and the losses of the first pass over them are compared;
- the same padded batches on both sides;
- packed rows here, and there batches of samples of a length (`group_by_length`): the least padding it can have.

Prints a table and the share of padding, for a missed aim where the time goes; writes `bench/results/train.json` and
`train.md`; exits with status 1 if an aim is missed.
"""

import argparse
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.text

from bench import cpu_model, report, train_data, turns
from bench.cpu_vs_torch import spread

LEARNING_RATE = 1e-5
MAX_PADDING = 0.1
SAMPLES = 400
MAX_LOSS_DIFFERENCE = 1e-4
"""Relative, over a pass of a few steps."""


class Line(NamedTuple):
    """One comparison."""

    title: str
    ours: str
    theirs: str
    aim: float | None


LINES = (
    Line("each side's usual way: packed | padded", "packed", "padded", 1.3),
    Line("the same padded batches", "padded", "padded", None),
    Line("packed | padded, samples grouped by length", "packed", "grouped", 1.0),
)
WAYS = {"ours": ("packed", "padded"), "theirs": ("padded", "grouped")}
Times = list[dict[str, dict[str, float]]]
"""Of each round, of each side: way -> seconds of a pass over all samples."""
Workers = Mapping[str, Callable[..., Any]]


def compare(line: Line, times: Times, tokens: int) -> dict[str, Any]:
    """The figures of one comparison."""
    ours, theirs = ([one[side][way] for one in times] for side, way in (("ours", line.ours), ("theirs", line.theirs)))
    ratio = spread([b / a for a, b in zip(ours, theirs, strict=True)])
    return {
        "what": line.title,
        "ours": spread([tokens / s for s in ours]),
        "theirs": spread([tokens / s for s in theirs]),
        "ratio": ratio,
        "aim": line.aim,
        "passed": line.aim is None or ratio["median"] >= line.aim,
    }


def measure(workers: Workers, rounds: int) -> Times:
    """Times of all rounds, the sides taking turns, after one round for warming up."""
    times = []
    for number in range(rounds + 1):
        one: dict[str, dict[str, float]] = {side: {} for side in WAYS}
        for index in range(2):
            for side, ways in WAYS.items():
                one[side][ways[index]] = workers[side]("train", way=ways[index])
        if number:
            times.append(one)
    return times


def compare_losses(workers: Workers) -> dict[str, Any]:
    """The largest relative difference of a step's loss, from the same weights on."""
    expected = np.array(workers["theirs"]("losses", way="padded"))
    found = {way: np.array(workers["ours"]("losses", way=way)) for way in WAYS["ours"]}
    differences = {way: float(np.abs(losses / expected - 1).max()) for way, losses in found.items()}
    return {"theirs": expected.tolist(), **differences, "passed": max(differences.values()) <= MAX_LOSS_DIFFERENCE}


def run(
    workers: Workers, directory: pathlib.Path, content: dict[str, Any], *, samples: int, steps: int, rounds: int,
    shape: train_data.Shape = train_data.SHAPE,
) -> dict[str, Any]:  # fmt: skip
    """Make the data, load the checkpoint on both sides and measure.

    Args:
      workers: of both sides.
      directory: of the checkpoint; the batches are written beside it.
      content: its config.json.
      samples: how many are made, of which padding is measured.
      steps: of a pass; those in the middle of the batches, where neither the first nor the last samples tell.
      rounds: measured passes.
      shape: of packed batches.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    made = train_data.make_samples(directory, samples)
    batches = train_data.packed(made, shape)
    first = (len(batches) - steps) // 2
    if first < 0:
        raise SystemExit(f"found {len(batches)} full batches of {samples} samples; expected at least {steps}")
    used = batches[first : first + steps]
    file = directory / "batches.pickle"
    train_data.write_batches(file, {"packed": used, "padded": used, "grouped": train_data.grouped(used)})
    common = dict(directory=str(directory), batches=str(file), learning_rate=LEARNING_RATE)
    workers["theirs"]("load", **common)
    workers["ours"]("load", **common, shape=shape)
    losses = compare_losses(workers)
    times = measure(workers, rounds)
    tokens = sum(len(sample) for batch in used for sample in batch)
    lines = [compare(line, times, tokens) for line in LINES]
    packed = train_data.padding(batches, shape, content)
    padding = {
        "packed": packed,
        "padded_to_the_longest": train_data.padded_share(batches),
        "grouped_by_length": train_data.padded_share(train_data.grouped(used)),
        "aim": MAX_PADDING,
        "passed": max(packed.values()) <= MAX_PADDING,
    }
    missed = {(line.ours, line.theirs) for line, one in zip(LINES, lines, strict=True) if not one["passed"]}
    profiles = {
        f"{ours} | {theirs}": {
            side: workers[side]("profile", way=way) for side, way in (("ours", ours), ("theirs", theirs))
        }
        for ours, theirs in sorted(missed)
    }
    return {
        "machine": {side: worker("facts") for side, worker in workers.items()},
        "rounds": rounds,
        "load_before": load,
        "parameters": cpu_model.num_parameters(content),
        "shape": shape._asdict(),
        "data": facts(made, used),
        "losses": losses,
        "lines": lines,
        "padding": padding,
        "profiles": profiles,
        "passed": losses["passed"] and padding["passed"] and all(line["passed"] for line in lines),
    }


def facts(samples: Sequence[Any], used: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What the data are: how many samples of which kind and length, and how much of them is in the timed steps."""
    lengths = [len(sample) for sample in samples]
    timed = [sample for batch in used for sample in batch]
    return {
        "samples": len(samples),
        "with_pictures_or_videos": sum(len(sample.frames) > 0 for sample in samples),
        "tokens": {"median": float(np.median(lengths)), "min": min(lengths), "max": max(lengths)},
        "vision_share": float(sum((s.prompt.medium_of >= 0).sum() for s in samples) / sum(lengths)),
        "timed_steps": len(used),
        "timed_samples": len(timed),
        "timed_tokens": sum(map(len, timed)),
    }


def rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table."""
    made = []
    for line in figures["lines"]:
        speeds = [f"{line[side]['median']:,.0f}" for side in ("ours", "theirs")]
        aim = "" if line["aim"] is None else f"{line['aim']:.1f}"
        ratio = "{median:.2f} [{min:.2f}, {max:.2f}]".format(**line["ratio"])
        made.append((line["what"], *speeds, ratio, aim, "" if line["aim"] is None else report.verdict(line["passed"])))
    return made


def padding_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table of padding."""
    padding = figures["padding"]
    judged = f"{padding['aim']:.0%}", report.verdict(padding["passed"])
    packed = padding["packed"]
    return [
        ("packed into rows", f"{packed['tokens']:.1%}", f"{packed['patches']:.1%}", *judged),
        ("padded to the longest of the same samples", f"{padding['padded_to_the_longest']:.1%}", "", "", ""),
        ("grouped by length", f"{padding['grouped_by_length']:.1%}", "", "", ""),
    ]


COLUMNS = ("", "ours, tokens/s", "theirs, tokens/s", "ratio", "aim", "")
PADDING_COLUMNS = ("padding of", "tokens", "patches", "aim", "")


def markdown(figures: Mapping[str, Any]) -> str:
    """The tables, for people."""
    parts = [title(figures)]
    for columns, lines in ((COLUMNS, rows(figures)), (PADDING_COLUMNS, padding_rows(figures))):
        cells = [columns, ["---"] * len(columns), *lines]
        plain = [[rich.text.Text.from_markup(cell).plain.replace("|", "/") for cell in line] for line in cells]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in plain))
    return "\n\n".join(parts) + "\n"


def title(figures: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    machine, data = figures["machine"], figures["data"]
    return (
        f"jax {machine['ours']['jax']}, torch {machine['theirs']['torch']}, transformers "
        f"{machine['theirs']['transformers']}; {figures['parameters'] / 1e6:.0f}M parameters, float32, "
        f"{machine['ours']['cores']} cores; {data['timed_steps']} steps of {data['timed_tokens']:,} tokens, "
        f"{figures['rounds']} rounds"
    )


def main() -> int:
    """Measure, print, write; 1 if an aim is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.train", description="training here and with torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    out = report.console()
    content = train_data.config()
    with (
        tempfile.TemporaryDirectory() as temporary,
        turns.Worker("ours", sys.executable, "bench.train_ours", arguments.threads) as ours,
        turns.Worker("theirs", sys.executable, "bench.train_theirs", arguments.threads) as theirs,
    ):
        directory = pathlib.Path(temporary)
        train_data.write_checkpoint(directory, content)
        figures = run(
            {"ours": ours, "theirs": theirs}, directory, content,
            samples=arguments.samples, steps=arguments.steps, rounds=arguments.rounds,
        )  # fmt: skip
    out.print(report.table(title(figures), COLUMNS, rows(figures)))
    out.print(report.table("share of padding", PADDING_COLUMNS, padding_rows(figures)))
    losses = figures["losses"]
    out.print(
        f"losses differ by at most {max(losses[way] for way in WAYS['ours']):.1e}: {report.verdict(losses['passed'])}"
    )
    for work, sides in figures["profiles"].items():
        for side, profile in sides.items():
            entries = [(line["name"], line["calls"], f"{line['milliseconds']:.1f}") for line in profile]
            out.print(report.table(f"{work}, {side}: where the time goes", ("operation", "calls", "ms"), entries))
    written = report.write_result("train", figures)
    written.with_suffix(".md").write_text(markdown(figures), encoding="utf-8")
    out.print(f"written to {written.relative_to(report.ROOT)}")
    return 0 if figures["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
