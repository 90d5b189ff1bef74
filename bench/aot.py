"""The 9B and GLM-OCR compiled for TPU slices that are not here: memory, collectives, copies and floors of programs.

Run by `make aot`, in an environment of its own with libtpu. A line fails if the program does not fit its chips beside
what else is there, if it decodes and copies weights or a cache, or has temporaries of more than MAX_TEMPORARIES, where
it misses targets of its own, and where it is worse than in the committed table (`aot_changes`); so does the run where
a program of the table is not compiled any more. With --accept the table is written, and nothing compared; with --only,
these cases alone are compiled, and the others keep their lines and their verdicts.

Other members of the family run the programs of the 9B but for the base of the rope, which changes no shape.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from bench import aot_changes, aot_rl, aot_train, report

# (program, its numbers, slice, mesh and scheme of weights). Images of 4K have 24,576 patches, small ones 256.
LATENCY = {4: dict(kv=2, q=2), 8: dict(kv=2, q=4), 16: dict(kv=2, q=8)}
LONG = {4: dict(kv=2, seq=2), 8: dict(kv=2, seq=4)}
CHIPS = {"v5e:2x2": 4, "v5e:2x4": 8, "v5e:4x4": 16, "v6e:2x2": 4, "v6e:2x4": 8, "v5p:2x2x2": 8}
INT8 = dict(quantize="int8")
OCR = dict(model="GLM-OCR")
"""A member of the family, of `MEMBERS`; the 9B where none is named."""
CASES: list[tuple[str, Any, str, dict[str, Any]]] = [
    *(("decode", (8, 4096), slice_, LATENCY[chips]) for slice_, chips in CHIPS.items()),
    ("decode", (1, 4096), "v5e:2x2", LATENCY[4]),
    ("decode", (1, 4096), "v5e:2x4", LATENCY[8]),
    ("decode", (64, 4096), "v5e:2x4", LATENCY[8]),
    ("decode", (64, 4096), "v5e:4x4", dict(data=2, kv=2, q=4)),
    ("decode", (8, 65536), "v5e:2x2", LATENCY[4]),
    ("decode", (8, 65536), "v5e:2x2", LONG[4]),
    ("decode", (8, 65536, "int8"), "v5e:2x2", LATENCY[4]),
    ("decode", (8, 65536, "int8"), "v5e:2x2", LONG[4]),
    ("decode", (8, 65536), "v5e:2x4", LONG[8]),
    ("decode", (8, 65536), "v6e:2x4", LATENCY[8]),
    ("decode", (8, 4096), "v6e:1x1", {}),
    ("decode", (1, 4096), "v6e:1x1", {}),
    ("decode", (8, 4096), "v5e:1x1", INT8),
    ("decode", (1, 4096), "v5e:1x1", INT8),
    ("prefill", (1, 8192, 8192), "v5e:2x2", LATENCY[4]),
    ("prefill", (1, 8192, 8192), "v5e:2x4", LATENCY[8]),
    ("prefill", (8, 2048, 4096, 8192), "v5e:2x4", LATENCY[8]),
    ("prefill", (8, 2048, 4096, 8192), "v6e:2x4", LATENCY[8]),
    ("prefill", (1, 1024, 4096, 2048, 8), "v5e:2x4", LATENCY[8]),
    ("prefill", (1, 1024, 4096, 8192, 8), "v5e:1x1", INT8),
    ("prefill", (1, 1024, 65536), "v5e:2x2", LATENCY[4]),
    ("prefill", (1, 65536, 65536), "v5e:2x2", LATENCY[4]),
    ("prefill", (1, 65536, 65536), "v5e:2x4", LATENCY[8]),
    ("prefill", (1, 1024, 65536), "v5e:2x4", LONG[8]),
    ("encode", (1, 24576, 24576), "v5e:2x2", LATENCY[4]),
    ("encode", (1, 24576, 24576, 8, 4096), "v5e:1x1", INT8),
    ("encode", (2, 8192, 256), "v5e:2x4", dict(data=2, kv=2, q=2)),
    ("encode", (2, 8192, 256), "v6e:2x4", dict(data=2, kv=2, q=2)),
    ("decode", (8, 4096), "v5e:1x1", OCR),
    ("decode", (1, 4096), "v5e:1x1", OCR),
    ("decode", (32, 4096), "v5e:1x1", OCR),
    ("decode", (8, 4096), "v6e:1x1", OCR),
    ("prefill", (1, 1024, 4096, 4096, 8), "v5e:1x1", OCR),
    ("encode", (1, 12288, 12288, 8, 4096), "v5e:1x1", OCR),
    *aot_train.CASES,
    *aot_rl.CASES,
]
COLUMNS = (
    "program", "slice", "mesh", "compile s", "arguments", "temporaries", "outputs", "beside", "of HBM",
    "x its part", "in the layer loop", "elsewhere", "copies", "floor ms", "estimated ms", "",
)  # fmt: skip
MAX_TEMPORARIES = 0.05
"""GiB, of decoding; of rollouts, whose rows are many, beside the logits of them."""
TARGET = ("decode", (8, 4096), "v5e:2x4")
MAX_RATIO, MAX_ALL_REDUCES, MAX_SECONDS = 1.03, 2, 30
MAX_ARGUMENTS = {("decode", (8, 4096), "v5e:1x1"): 11.3}


def aot_environment() -> dict[str, str]:
    """The environment of libtpu where there is no TPU, and where others compile at the same time."""
    libtpu = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # Or a note of JAX's is the last line of an error.
    return libtpu | {"JAX_TRACEBACK_FILTERING": "off"}


def compile_case(number: int) -> dict[str, Any]:
    """Compile one case in this process."""
    from glm4v_jax.config.members import DEFAULT, MEMBERS
    from glm4v_jax.planning import compile_for_topology

    kind, numbers, topology, sizes = CASES[number]
    if kind == "train":
        return aot_train.compile_step(numbers, topology, sizes)
    if kind in aot_rl.KINDS:
        return aot_rl.compile_case(kind, numbers)
    makers: dict[str, Callable[..., compile_for_topology.Program]] = {
        "decode": compile_for_topology.decode_program,
        "prefill": compile_for_topology.prefill_program,
        "encode": compile_for_topology.encode_program,
    }
    model = sizes.get("model", DEFAULT)
    config = MEMBERS[model].config()
    others = {name: value for name, value in sizes.items() if name != "model"}
    compiled = compile_for_topology.compile_for(makers[kind](config, *numbers), config, topology, **others)
    found = dataclasses.asdict(compiled) | {"fits": compiled.fits}
    return found if model == DEFAULT else found | {"program": f"{model}: {compiled.program}"}


def in_process(module: str, number: int) -> dict[str, Any] | str:
    """What `python -m MODULE --case NUMBER` compiles, in a process of its own; or the last line of its error."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--case", str(number)], env=os.environ | aot_environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compile_all(
    module: str, titles: Mapping[int, str], passes: Callable[[int, dict[str, Any]], bool], is_busy: bool
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Compile cases of a module, each in a process of its own, and print how long each takes.

    `titles`: number -> description of each; `passes`: (number, what was compiled) -> whether it keeps its targets;
    `is_busy`: the times do not count. Returns what was compiled, with case and verdict; and the errors of the others.
    """
    out, lines, broken = report.console(), [], []
    for number, title in titles.items():
        found = in_process(module, number)
        if isinstance(found, str):
            broken.append({"case": title, "error": found})
            out.print(f"{title}: {found}", style="red", markup=False)
            continue
        out.print(f"{title}: {found['seconds']:.0f} s", style="dim")
        verdict = {"case": title, "passed": passes(number, found)}
        lines.append(found | verdict | ({"seconds": None} if is_busy else {}))
    return lines, broken


def meets_targets(found: dict[str, Any]) -> bool:
    """Whether the line that has targets keeps them."""
    inside = {kind: counts[0] for kind, counts in found["collectives"].items()}
    ratio = (found["arguments"] + found["temporaries"]) / found["arguments"]
    return (
        ratio <= MAX_RATIO
        and set(inside) - {"all-reduce"} <= {kind for kind, count in inside.items() if not count}
        and inside.get("all-reduce", 0) <= MAX_ALL_REDUCES
        and not found["copies"]
        and found["seconds"] <= MAX_SECONDS
    )


def passes(case: tuple[str, Any, str, dict[str, Any]], found: dict[str, Any], megacycles: dict[Any, float]) -> bool:
    """Whether a line fits, copies nothing where it decodes, and keeps targets of its own.

    A single row must not take longer than eight, of which `megacycles` has what was compiled before.
    """
    kind, numbers, topology, sizes = case
    faults = [not found["fits"], found["arguments"] > MAX_ARGUMENTS.get((kind, numbers, topology), math.inf)]
    if "rollout" in kind:
        faults += [bool(found["copies"]), found["temporaries"] > MAX_TEMPORARIES + aot_rl.logits(sizes)]
    if kind == "decode":
        batch, *slots = numbers
        megacycles[batch, *slots, topology] = found["megacycles"]
        slower = batch == 1 and found["megacycles"] > megacycles.get((8, *slots, topology), math.inf)
        faults += [bool(found["copies"]), found["temporaries"] > MAX_TEMPORARIES, slower]
    if (kind, numbers, topology) == TARGET:
        faults.append(not meets_targets(found))
    return not any(faults)


def main() -> int:
    """Compile every case in a process of its own, print, write; 1 if one does not fit or misses its targets."""
    parser = report.parser("bench.aot", __doc__)
    parser.add_argument("--case", type=int, help="compile this one alone and print it as JSON")
    parser.add_argument("--only", default="", help="cases whose description has this in it; others keep their lines")
    parser.add_argument("--accept", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--busy", action="store_true", help="record no times, as the machine also does other things")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(compile_case(arguments.case)))
        return 0
    titles = [
        f"{kind} {'' if kind in aot_rl.KINDS else numbers} on {slice_} {sizes}"
        for kind, numbers, slice_, sizes in CASES
    ]
    chosen = {title for title in titles if arguments.only in title}
    if not chosen:
        parser.error(f"--only: found {arguments.only!r}; expected a part of a description, such as {titles[0]!r}")
    out, megacycles = report.console(), dict[Any, float]()
    wanted = {number: title for number, title in enumerate(titles) if title in chosen}
    lines, broken = compile_all(
        "bench.aot", wanted, lambda number, found: passes(CASES[number], found, megacycles), arguments.busy
    )
    has_failed = bool(broken) or not all(line["passed"] for line in lines)
    out.print(*(table for table in tables({"programs": lines}) if table.rows))
    record = report.read("aot")
    if not arguments.accept:
        worse = aot_changes.regressions(record["programs"], lines)
        worse += aot_changes.missing(record["programs"], lines, chosen if arguments.only else None)
        for fault in worse:
            out.print(fault, style="red", markup=False, soft_wrap=True)
        out.print("not written: pass --accept to write the table", style="dim")
        return 1 if has_failed or worse else 0
    if arguments.only:
        lines = aot_changes.merged(record["programs"], lines, chosen)
        broken += [one for one in record["not_compiled"] if one["case"] not in chosen]
    facts = record["machine"] if arguments.only else report.machine_facts("jax", "libtpu")
    figures = {"machine": facts, "programs": lines, "not_compiled": broken}
    figures["passed"] = not broken and all(line["passed"] for line in lines)
    return report.finish("aot", figures)


def tables(figures: Mapping[str, Any]) -> tuple[report.Table, report.Table]:
    """Of programs that answer, and of those that train."""
    lines = figures["programs"]
    steps = [aot_train.row(line) for line in lines if "train" in line]
    return (
        report.Table("GiB a chip", COLUMNS, [_row(line) for line in lines if "train" not in line]),
        report.Table("GiB a chip", aot_train.COLUMNS, steps),
    )


def _row(line: dict[str, Any]) -> tuple[str, ...]:
    figure = functools.partial(aot_train.figure, line)
    bandwidth, flops = line["floor_ms"]
    return (
        line["program"], line["topology"], aot_train.mesh_cell(line),
        figure("seconds", ".0f"), figure("arguments", ".2f"), figure("temporaries", ".3f"), figure("outputs", ".2f"),
        figure("beside", ".2f"), figure("hbm", "g"), figure("held", ".2f"),
        aot_train.collectives(line, 0), aot_train.collectives(line, 1),
        ", ".join(f"{shape}{' in the loop' if inside else ''}" for shape, inside in line["copies"]),
        f"{max(bandwidth, flops):.2f} ({'bandwidth' if bandwidth > flops else 'FLOP/s'})",
        figure("estimated_ms", ".1f"), report.verdict(line["passed"]),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
