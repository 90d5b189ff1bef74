"""Training steps of the full 9B for TPU slices that are not here: what `bench.aot` compiles of them, and their table.

AdamW with float32 weights and moments, bfloat16 in the model. Rows are one sample without padding, vision rows one
frame: more packing is less attention.
"""

import dataclasses
import math
from typing import Any

from bench import report
from glm4v_jax.model.layers import Remat

COLUMNS = (
    "step", "slice", "mesh", "compile s", "arguments", "temporaries", "peak", "beside", "of HBM",
    "in the layer loop", "elsewhere", "GB received", "least", "TFLOP a chip", "least", "attention forward", "floor ms",
    "estimated ms", "",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of `micro_batches` of `rows` by `length` tokens, and of the patches of its vision rows.

    `lora` is the rank of the adapter that is trained; all weights are trained without.
    """

    rows: int
    length: int
    vision_rows: int = 0
    vision_length: int = 0
    remat: Remat = "full"
    lora: int | None = None
    micro_batches: int = 1


SPLIT = dict(fsdp=4, kv=2, q=2)
CASES: list[tuple[str, Step, str, dict[str, int]]] = [
    # 32k tokens a step, of all weights: slices that hold them, the smallest of each generation.
    ("train", Step(8, 4096, 8, 4096), "v5e:4x4", SPLIT),
    ("train", Step(4, 8192, 4, 8192), "v5e:4x4", SPLIT),
    ("train", Step(16, 2048, 16, 2048), "v5e:4x4", dict(fsdp=16)),
    ("train", Step(1, 32768), "v5e:4x4", dict(kv=2, q=8)),
    ("train", Step(4, 8192, 4, 8192), "v6e:2x4", dict(fsdp=4, kv=2)),
    ("train", Step(4, 8192, 4, 8192), "v5p:2x2x1", dict(fsdp=4)),
    ("train", Step(4, 8192, 4, 8192, remat="attention"), "v5p:2x2x1", dict(fsdp=4)),
    ("train", Step(4, 8192, 4, 8192, remat="dots"), "v5p:2x2x1", dict(fsdp=4)),
    ("train", Step(8, 8192, 8, 8192, lora=8), "v5e:2x4", dict(fsdp=8)),
    ("train", Step(8, 8192, 8, 8192, lora=8, remat="attention"), "v5e:2x4", dict(fsdp=8)),
    ("train", Step(1, 32768, 1, 8192, lora=8), "v5e:2x4", dict(kv=2, q=4)),
]


def compile_step(step: Step, topology: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Compile a step in this process."""
    from glm4v_jax.config.model import Glm4vConfig
    from glm4v_jax.model.lora import LoraConfig
    from glm4v_jax.planning import compile_for_topology
    from train.compile_for_topology import Shapes, StepCost, step_program

    config, found = Glm4vConfig.glm4_1v_9b(), list[StepCost]()
    shapes = Shapes(step.rows, step.length, step.vision_rows, step.vision_length, step.micro_batches)
    lora = None if step.lora is None else LoraConfig(rank=step.lora)
    program = step_program(config, shapes, remat=step.remat, lora=lora, report=found.append)
    compiled = dataclasses.asdict(compile_for_topology.compile_for(program, config, topology, **sizes))
    del compiled["held"]  # of weights in bfloat16 alone
    return finished(compiled, dataclasses.asdict(found[0]))


def finished(compiled: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """What was compiled, with what the step does and the least time of each part of it, in milliseconds.

    State is read and written once, products are those of the model alone, and all links of a chip are in use.
    """
    from glm4v_jax.devices.hardware import GIB
    from glm4v_jax.planning.compile_for_topology import SLICES, estimated_ms

    chip, chips = SLICES[compiled["topology"].partition(":")[0]], math.prod(compiled["mesh"].values())
    floors = {
        "bandwidth": 2 * compiled["arguments"] * GIB / chip.bandwidth * 1e3,
        "FLOP/s": counts["model_flops"] / chips / chip.flops * 1e3,
        "links": counts["least_sent"] / chip.links * 1e3,
    }
    estimated = estimated_ms(chip, compiled["megacycles"], compiled["received"], counts["kernel_flops"] / chips)
    fits = compiled["peak"] + compiled["beside"] <= compiled["hbm"]
    return compiled | {"floor_ms": floors, "estimated_ms": estimated, "fits": fits, "train": counts}


def mesh_cell(line: dict[str, Any]) -> str:
    """The axes that a program was compiled for."""
    return " ".join(f"{axis}={size}" for axis, size in line["mesh"].items())


def collectives(line: dict[str, Any], where: int) -> str:
    """How many collectives of each kind are in the layer loop (`where` 0) or elsewhere (1)."""
    return ", ".join(f"{counts[where]} {kind}" for kind, counts in line["collectives"].items() if counts[where])


def figure(line: dict[str, Any], name: str, form: str) -> str:
    """Write a number; a line of an earlier version, or of a busy machine, may lack it."""
    return "" if line.get(name) is None else format(line[name], form)


def row(line: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    counts, chips, floors = line["train"], math.prod(line["mesh"].values()), line["floor_ms"]
    least = counts["model_flops"] / chips / 1e12
    made = (counts["model_flops"] + counts["recomputed_flops"]) / chips / 1e12
    bound = max(floors, key=lambda name: floors[name])
    forward = sum(runs for name, runs in counts["kernels"].items() if "_fwd_" in name)
    return (
        line["program"], line["topology"], mesh_cell(line),
        figure(line, "seconds", ".0f"), f"{line['arguments']:.2f}", f"{line['temporaries']:.2f}", f"{line['peak']:.2f}",
        figure(line, "beside", ".2f"), f"{line['hbm']:.0f}", collectives(line, 0), collectives(line, 1),
        figure(line, "received", ".1f"),
        f"{counts['least_sent'] / 1e9:.1f}", f"{made:.1f}", f"{least:.1f}", f"{forward}",
        f"{floors[bound]:.0f} ({bound})", figure(line, "estimated_ms", ".0f"), report.verdict(line["passed"]),
    )  # fmt: skip
