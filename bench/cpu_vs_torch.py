"""The same model here and in transformers 4.57.1 on a CPU, side by side: prefill, ViT, decoding, preprocessing.

    python -m bench.cpu_vs_torch [--ours-python PATH]

About 260 million random float32 parameters, one prompt at a time, two threads. Each side is a process of its own, and
only one computes at a time: in every round they take turns at every measurement, so that what else the machine does
meets both alike. Ratios are taken within a round; printed are medians, and the smallest and largest in brackets.
`--ours-python` lets this package's side run on an interpreter that torch has no wheel for; a newer jax may be there.

Decoding is also held against the memory's speed, measured in the same rounds: the best of several reads of a large
buffer, by both sides, on all threads. Prints a table, and for a missed aim where the time goes on both sides; writes
`bench/results/cpu_vs_torch.json`; exits with status 1 if an aim is missed.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bench import cpu_model, report, turns

CONTEXT = 256
BUFFER_MEGABYTES = 1000
MIN_BANDWIDTH_SHARE = 0.8
ANSWER = {"context": 64, "tokens": 24}


class Work(NamedTuple):
    """What both sides do in a turn."""

    task: str
    arguments: Mapping[str, Any]


class Line(NamedTuple):
    """One comparison."""

    title: str
    work: Work
    amount: float
    """units of work in the time that the task reports"""
    unit: str
    ours: str
    theirs: tuple[str, ...]
    """their ways to do it; the fastest counts"""
    aim: float | None


def prefill(tokens: int) -> Line:
    """A prompt up to its first new token; theirs by `generate` or a bare forward pass, whichever is faster."""
    work = Work("prefill", {"tokens": tokens})
    return Line(f"prefill, {tokens:,} tokens", work, tokens, "tokens/s", "generate", ("generate", "forward"), 1.0)


def vision(side: int) -> Line:
    """A square picture through the ViT and merger."""
    work = Work("vision", {"rows": side, "columns": side})
    return Line(f"ViT, {side**2:,} patches", work, side**2, "patches/s", "encode", ("encode",), 1.0)


DECODE = Line(
    f"decode after {CONTEXT} tokens", Work("decode", {"context": CONTEXT, "short": 9, "long": 41}), 1, "tokens/s",
    "generate", ("generate", "loop"), 1.2,
)  # fmt: skip
TOGETHER, ALONE = (Work("preprocess", {"together": together}) for together in (True, False))
LINES = (
    prefill(512), prefill(1024), vision(32), vision(64), DECODE,
    Line("photographs in one call, their slow processor", TOGETHER, 1, "pictures/s", "slow", ("slow",), 2.0),
    Line("photographs in one call, their fast processor", TOGETHER, 1, "pictures/s", "slow", ("fast",), 1.2),
    Line("one photograph a call, their slow processor", ALONE, 1, "pictures/s", "slow", ("slow",), 2.0),
    Line("one photograph a call, their fast processor", ALONE, 1, "pictures/s", "slow", ("fast",), 1.2),
    Line("both fast processors, in one call", TOGETHER, 1, "pictures/s", "fast", ("fast",), None),
)  # fmt: skip
Times = list[dict[str, dict[str, float]]]
"""Of each round, of each side: the way it was done -> seconds."""
Workers = Mapping[str, Callable[..., Any]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(line: Line, times: Times) -> dict[str, Any]:
    """The figures of one comparison."""
    way = min(line.theirs, key=lambda way: statistics.median(round_["theirs"][way] for round_ in times))
    ours, theirs = [t["ours"][line.ours] for t in times], [t["theirs"][way] for t in times]
    ratio = spread([b / a for a, b in zip(ours, theirs, strict=True)])
    return {
        "what": line.title,
        "unit": line.unit,
        "ours": spread([line.amount / s for s in ours]),
        "theirs": spread([line.amount / s for s in theirs]),
        "their_way": way,
        "ratio": ratio,
        "aim": line.aim,
        "passed": line.aim is None or ratio["median"] >= line.aim,
    }


def compare_bandwidth(config: dict[str, Any], decode: Times, reads: Times) -> dict[str, Any]:
    """What share of the memory's speed decoding reaches."""
    # On average over the new tokens half of them are in the context too.
    context = CONTEXT + (DECODE.work.arguments["short"] + DECODE.work.arguments["long"]) // 2
    size = cpu_model.decode_bytes(config, context)
    fastest = [max(value for side in round_.values() for value in side.values()) for round_ in reads]
    used = [size / round_["ours"][DECODE.ours] for round_ in decode]
    share = spread([a / b for a, b in zip(used, fastest, strict=True)])
    return {
        "what": "share of the memory's read bandwidth",
        "bytes_per_token": size,
        "read_bytes_per_second": spread(fastest),
        "decode_bytes_per_second": spread(used),
        "ratio": share,
        "aim": MIN_BANDWIDTH_SHARE,
        "passed": share["median"] >= MIN_BANDWIDTH_SHARE,
    }


def measure(workers: Workers, works: Sequence[Work], rounds: int) -> list[Times]:
    """Times of all rounds for each piece of work, after one round for warming up."""
    times: list[Times] = [[] for _ in works]
    for number in range(rounds + 1):
        for work, each in zip(works, times, strict=True):
            done = {side: worker(work.task, **work.arguments) for side, worker in workers.items()}
            if number:
                each.append(done)
    return times


def run(workers: Workers, config: dict[str, Any], directory: pathlib.Path, rounds: int, threads: int) -> dict[str, Any]:
    """Load the checkpoint on both sides and measure everything."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    for worker in workers.values():
        worker("load", directory=str(directory))
    answers = [worker("answer", **ANSWER) for worker in workers.values()]
    read = Work("bandwidth", {"megabytes": BUFFER_MEGABYTES, "threads": threads})
    works = [read]
    for line in (DECODE, *LINES):  # decoding next to what it is held against
        if line.work not in works:
            works.append(line.work)
    times = measure(workers, works, rounds)
    lines = [compare(line, times[works.index(line.work)]) for line in LINES]
    bandwidth = compare_bandwidth(config, times[works.index(DECODE.work)], times[0])
    missed = [line for line, figures in zip(LINES, lines, strict=True) if not figures["passed"]]
    if not bandwidth["passed"]:
        missed.append(DECODE)
    profiles = {}
    for work in {line.work.task: line.work for line in missed}.values():
        profiles[f"{work.task} {dict(work.arguments)}"] = {
            side: worker("profile", work=work.task, arguments=dict(work.arguments)) for side, worker in workers.items()
        }
    return {
        "machine": {side: worker("facts") for side, worker in workers.items()},
        "threads": threads,
        "rounds": rounds,
        "load_before": load,
        "parameters": cpu_model.num_parameters(config),
        "same_greedy_answer": answers[0] == answers[1],
        "lines": lines,
        "bandwidth": bandwidth,
        "profiles": profiles,
        "passed": answers[0] == answers[1] and bandwidth["passed"] and all(line["passed"] for line in lines),
    }


def rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table."""
    made = []
    for line in figures["lines"]:
        speeds = [f"{line[side]['median']:,.4g}" for side in ("ours", "theirs")]
        made.append((line["what"], line["unit"], *speeds, *_judged(line)))
    bandwidth = figures["bandwidth"]
    speeds = [f"{bandwidth[f'{name}_bytes_per_second']['median'] / 1e9:.1f}" for name in ("decode", "read")]
    return [*made, (bandwidth["what"], "GB/s", *speeds, *_judged(bandwidth))]


def _judged(line: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = "{median:.2f} [{min:.2f}, {max:.2f}]".format(**line["ratio"])
    if line["aim"] is None:
        return ratio, "", ""
    return ratio, f"{line['aim']:.1f}", report.verdict(line["passed"])


def main() -> int:
    """Measure, print, write; 1 if an aim is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_vs_torch", description="this package against torch")
    parser.add_argument("--ours-python", default=sys.executable, help="interpreter of this package's side")
    parser.add_argument("--theirs-python", default=sys.executable, help="interpreter of the reference's side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="cpu_vs_torch", help="of the file in bench/results")
    arguments = parser.parse_args()
    out = report.console()
    with (
        tempfile.TemporaryDirectory() as temporary,
        turns.Worker("ours", arguments.ours_python, "bench.cpu_ours", arguments.threads) as ours,
        turns.Worker("theirs", arguments.theirs_python, "bench.cpu_theirs", arguments.threads) as theirs,
    ):
        directory = pathlib.Path(temporary)
        cpu_model.write_checkpoint(directory, cpu_model.CONFIG)
        workers = {"ours": ours, "theirs": theirs}
        figures = run(workers, cpu_model.CONFIG, directory, arguments.rounds, arguments.threads)
    versions = figures["machine"]
    title = (
        f"jax {versions['ours']['jax']} on Python {versions['ours']['python']}, "
        f"torch {versions['theirs']['torch']} on Python {versions['theirs']['python']}; "
        f"{figures['parameters'] / 1e6:.0f}M parameters, float32, {arguments.threads} threads, "
        f"{arguments.rounds} rounds"
    )
    columns = ("", "unit", "ours", "theirs", "ratio", "aim", "")
    out.print(report.table(title, columns, rows(figures)))
    out.print(f"greedy answers agree: {'yes' if figures['same_greedy_answer'] else 'NO'}")
    for work, sides in figures["profiles"].items():
        for side, profile in sides.items():
            entries = [(line["name"], line["calls"], f"{line['milliseconds']:.1f}") for line in profile]
            out.print(report.table(f"{work}, {side}: where the time goes", ("operation", "calls", "ms"), entries))
    written = report.write_result(arguments.name, figures)
    out.print(f"written to {written.relative_to(report.ROOT)}")
    return 0 if figures["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
