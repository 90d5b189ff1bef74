"""The same model here and in transformers 4.57.1 on a CPU, side by side: prefill, ViT, decoding, preprocessing.

    python -m bench.cpu_vs_torch [--ours-python PATH] [--isa AVX2]

About 260 million random float32 parameters, one prompt at a time, two threads. Each side is a process of its own, and
they take turns at every measurement of every round, so that other load on the machine meets both alike. Ratios are
taken within a round; the table has medians, with the smallest and largest in brackets. `--ours-python` runs this
package's side on an interpreter that torch has no wheel for; a newer jax may be there.

`--isa AVX2` emulates a processor without wider vectors: what XLA compiles, torch, oneDNN and MKL use no others; the
library that multiplies matrices for XLA still may. These ratios are kept as those of another processor, and the other
figures of the record stay.

Decoding is also compared with the memory's speed, measured in the same rounds: the best of several reads of a large
buffer, by both sides, on all threads. Prints a table, and for a missed aim where both sides spend the time; writes
`bench/results/cpu_vs_torch.json`, which keeps the ratios of other processors; exits with status 1 if an aim is missed.
"""

import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from bench import models, report, turns
from bench.turns import TimedTask

CONTEXT = 256
BUFFER_MEGABYTES = 1000
MIN_BANDWIDTH_SHARE = 0.8
ANSWER = {"context": 64, "tokens": 24}
EMULATIONS = {
    "AVX2": {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
"""Instruction set -> what confines both sides to it, in their environment."""


class SpeedLine(NamedTuple):
    """One comparison."""

    title: str
    work: TimedTask
    amount: float
    """units of work in the time that the task reports"""
    unit: str
    ours: str
    theirs: tuple[str, ...]
    """their ways to do it; the fastest counts"""
    aim: float | None


def prefill(tokens: int) -> SpeedLine:
    """A prompt up to its first new token; theirs by `generate` or a bare forward pass, whichever is faster."""
    work = TimedTask("prefill", {"tokens": tokens})
    return SpeedLine(f"prefill, {tokens:,} tokens", work, tokens, "tokens/s", "generate", ("generate", "forward"), 1.0)


def vision(side: int) -> SpeedLine:
    """A square image through the ViT and merger."""
    work = TimedTask("vision", {"rows": side, "columns": side})
    return SpeedLine(f"ViT, {side**2:,} patches", work, side**2, "patches/s", "encode", ("encode",), 1.0)


DECODE = SpeedLine(
    f"decode after {CONTEXT} tokens", TimedTask("decode", {"context": CONTEXT, "short": 9, "long": 41}), 1, "tokens/s",
    "generate", ("generate", "loop"), 1.2,
)  # fmt: skip
TOGETHER, ALONE = (TimedTask("preprocess", {"together": together}) for together in (True, False))
LINES = (
    prefill(512), prefill(1024), vision(32), vision(64), DECODE,
    SpeedLine("photographs in one call, their slow processor", TOGETHER, 1, "images/s", "slow", ("slow",), 2.0),
    SpeedLine("photographs in one call, their fast processor", TOGETHER, 1, "images/s", "slow", ("fast",), 1.2),
    SpeedLine("one photograph a call, their slow processor", ALONE, 1, "images/s", "slow", ("slow",), 2.0),
    SpeedLine("one photograph a call, their fast processor", ALONE, 1, "images/s", "slow", ("fast",), 1.2),
    SpeedLine("both fast processors, in one call", TOGETHER, 1, "images/s", "fast", ("fast",), None),
)  # fmt: skip
Times = list[dict[str, Any]]
"""Of each round, of each side: the way it was done -> seconds."""


def compare(line: SpeedLine, times: Times) -> dict[str, Any]:
    """The figures of one comparison."""
    way = min(line.theirs, key=lambda way: statistics.median(one["theirs"][way] for one in times))
    ours, theirs = [one["ours"][line.ours] for one in times], [one["theirs"][way] for one in times]
    figures = turns.compare(ours, theirs, line.amount, line.aim)
    return {"what": line.title, "unit": line.unit, "their_way": way, **figures}


def compare_bandwidth(config: dict[str, Any], decode: Times, reads: Times) -> dict[str, Any]:
    """What fraction of the memory's speed decoding reaches."""
    # On average over the new tokens half of them are in the context too.
    context = CONTEXT + (DECODE.work.arguments["short"] + DECODE.work.arguments["long"]) // 2
    size = models.decode_bytes(config, context)
    fastest = [max(value for side in one.values() for value in side.values()) for one in reads]
    used = [size / one["ours"][DECODE.ours] for one in decode]
    fraction = turns.spread([a / b for a, b in zip(used, fastest, strict=True)])
    return {
        "what": "fraction of the memory's read bandwidth",
        "bytes_per_token": size,
        "read_bytes_per_second": turns.spread(fastest),
        "decode_bytes_per_second": turns.spread(used),
        "ratio": fraction,
        "aim": MIN_BANDWIDTH_SHARE,
        "passed": fraction["median"] >= MIN_BANDWIDTH_SHARE,
    }


def run(
    workers: turns.Workers, config: dict[str, Any], directory: pathlib.Path, rounds: int, threads: int
) -> dict[str, Any]:
    """Load the checkpoint on both sides and measure everything."""
    load = turns.load_average()
    for worker in workers.values():
        worker("load", directory=str(directory))
    answers = [worker("answer", **ANSWER) for worker in workers.values()]
    works = [TimedTask("bandwidth", {"megabytes": BUFFER_MEGABYTES, "threads": threads})]
    for line in (DECODE, *LINES):  # decoding next to the reads that it is compared with
        if line.work not in works:
            works.append(line.work)
    times = turns.measure(workers, [dict.fromkeys(workers, work) for work in works], rounds)
    lines = [compare(line, times[works.index(line.work)]) for line in LINES]
    bandwidth = compare_bandwidth(config, times[works.index(DECODE.work)], times[0])
    missed = [line.work for line, figures in zip(LINES, lines, strict=True) if not figures["passed"]]
    missed += [] if bandwidth["passed"] else [DECODE.work]
    one_each = {work.task: work for work in missed}.values()
    return {
        "machine": turns.facts(workers),
        "threads": threads,
        "rounds": rounds,
        "load_before": load,
        "parameters": models.num_parameters(config),
        "same_greedy_answer": answers[0] == answers[1],
        "lines": lines,
        "bandwidth": bandwidth,
        "profiles": turns.profiles(
            workers, {f"{work.task} {dict(work.arguments)}": dict.fromkeys(workers, work) for work in one_each}
        ),
        "passed": answers[0] == answers[1] and bandwidth["passed"] and all(line["passed"] for line in lines),
    }


def ratios(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run once another processor or jax was measured."""
    ours = figures["machine"]["ours"]
    lines = {line["what"]: line["ratio"] for line in (*figures["lines"], figures["bandwidth"])}
    return {"processor": ours.get("processor"), "jax": ours["jax"], "rounds": figures["rounds"], "ratios": lines}


def others(figures: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The runs of other processors and versions of jax in the record that this run replaces."""
    if before is None:
        return []
    kept = {(run["processor"], run["jax"]): run for run in (*before.get("others", ()), ratios(before))}
    kept.pop((figures["machine"]["ours"]["processor"], figures["machine"]["ours"]["jax"]), None)
    return list(kept.values())


def with_ratios(before: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with the ratios of one more run, which replace those of the same processor and jax."""
    return {**before, "others": others(before, {**figures, "others": before.get("others", ())})}


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """The comparisons; and the ratios on all processors that were measured."""
    ours, theirs = (figures["machine"][side] for side in ("ours", "theirs"))
    title = (
        f"jax {ours['jax']} on Python {ours['python']}, torch {theirs['torch']} on Python {theirs['python']}; "
        f"{figures['parameters'] / 1e6:.0f}M parameters, float32, {figures['threads']} threads, "
        f"{figures['rounds']} rounds"
    )
    rows = []
    for line in figures["lines"]:
        speeds = [f"{line[side]['median']:,.4g}" for side in ("ours", "theirs")]
        rows.append((line["what"], line["unit"], *speeds, *report.judged(line)))
    bandwidth = figures["bandwidth"]
    speeds = [f"{bandwidth[f'{name}_bytes_per_second']['median'] / 1e9:.1f}" for name in ("decode", "read")]
    rows.append((bandwidth["what"], "GB/s", *speeds, *report.judged(bandwidth)))
    runs = [ratios(figures), *figures.get("others", ())]
    names = [f"{run['processor'] or 'not recorded'}, jax {run['jax']}, {run['rounds']} rounds" for run in runs]
    whats = [what for what in runs[0]["ratios"] if any(what in run["ratios"] for run in runs[1:])]
    return [
        report.Table(title, ("", "unit", "this package", "transformers", "ratio", "aim", ""), rows),
        report.Table(
            "ratios on processors that were measured", ("", *names),
            [(what, *(report.spread(run["ratios"].get(what, {})) for run in runs)) for what in whats],
        ),
    ]  # fmt: skip


def main() -> int:
    """Measure, print, write; 1 if an aim is missed."""
    parser = report.parser("bench.cpu_vs_torch", __doc__)
    parser.add_argument("--ours-python", default=sys.executable, help="interpreter of this package's side")
    parser.add_argument("--theirs-python", default=sys.executable, help="interpreter of the reference's side")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side, in turns")
    parser.add_argument("--threads", type=int, default=2, help="cores of each side")
    parser.add_argument("--isa", choices=EMULATIONS, help="emulate a processor without wider vectors")
    parser.add_argument("--name", default="cpu_vs_torch", help="of the file in bench/results")
    arguments = parser.parse_args()
    before = report.read(arguments.name) if (report.RESULTS / f"{arguments.name}.json").is_file() else None
    if arguments.isa and before is None:
        parser.error(
            f"--isa: there is no record {arguments.name!r} of the processor itself to add to; run without it first"
        )
    confined = EMULATIONS.get(arguments.isa, {})
    if "XLA_FLAGS" in confined:
        confined = confined | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {confined['XLA_FLAGS']}".strip()}
    os.environ.update(confined)
    pythons = dict(ours=arguments.ours_python, theirs=arguments.theirs_python)
    with (
        tempfile.TemporaryDirectory() as temporary,
        turns.start(turns.sides("bench.cpu_sides", arguments.threads, **pythons)) as workers,
    ):
        directory = models.write_checkpoint(pathlib.Path(temporary), models.INFERENCE)
        figures = run(workers, models.INFERENCE, directory, arguments.rounds, arguments.threads)
    if arguments.isa:
        for facts in figures["machine"].values():
            facts["processor"] = f"{facts['processor']}, emulated {arguments.isa}"
    figures["others"] = others(figures, before)
    agree = f"greedy answers agree: {'yes' if figures['same_greedy_answer'] else 'NO'}"
    shown: list[report.Table | str] = [*tables(figures), agree, *report.profile_tables(figures["profiles"])]
    if arguments.isa and before is not None:
        report.finish(arguments.name, with_ratios(before, figures), *shown)
        return 0 if figures["passed"] else 1
    return report.finish(arguments.name, figures, *shown)


if __name__ == "__main__":
    sys.exit(main())
