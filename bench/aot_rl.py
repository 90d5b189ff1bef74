"""Learning by reward with the 9B for TPU slices that are not here: what `bench.aot` compiles of it.

Rollouts are decode steps with the state of the training beside them, a policy step is the gradients of a micro-batch
with the optimizer's state beside them. The engine's weights and caches are released while a job learns.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

ROWS, VOCABULARY = 64, 151_552
"""Of rollouts."""
LENGTH = 8192
"""Tokens of a row, and patches of a vision row; as many rows of both as the mesh divides a batch into."""


class Slice(NamedTuple):
    """A slice, what is trained on it, and the meshes of training and rollouts: of short answers, of long ones."""

    topology: str
    lora: int | None
    training: dict[str, int]
    short: dict[str, int]
    long: dict[str, int]


# The smallest of each generation that holds the state of all weights and the engine; caches of 64 long answers fit only
# with their slots in shards.
SLICES = (
    Slice("v5e:4x4", None, dict(fsdp=4, kv=2, q=2), dict(data=2, kv=2, q=4), dict(data=2, kv=2, seq=4)),
    Slice("v6e:2x4", None, dict(fsdp=4, kv=2), dict(kv=2, q=4), dict(kv=2, seq=4)),
    Slice("v5p:2x2x1", None, dict(fsdp=4), dict(kv=2, q=2), dict(kv=2, q=2)),
    Slice("v5e:2x4", 8, dict(fsdp=8), dict(kv=2, q=4), dict(kv=2, seq=4)),
)
KINDS = ("short rollout", "long rollout", "policy step", "policy update", "handover")
CASES: list[tuple[str, Any, str, dict[str, Any]]] = [
    (kind, i, one.topology, {"short rollout": one.short, "long rollout": one.long}.get(kind, one.training))
    for i, one in enumerate(SLICES)
    for kind in KINDS
]
"""As `bench.aot` has them; the number is that of the slice."""


def compile_case(kind: str, number: int) -> dict[str, Any]:
    """Compile a program in this process."""
    from bench import aot_train
    from glm4v_jax.config.model import Glm4vConfig
    from glm4v_jax.model.lora import LoraConfig
    from glm4v_jax.planning.compile_for_topology import Program, compile_for
    from train.compile_for_topology import Shapes, StepCost
    from train.rl import compile_for_topology as programs

    one, config, counts = SLICES[number], Glm4vConfig.glm4_1v_9b(), list[StepCost]()
    lora = None if one.lora is None else LoraConfig(rank=one.lora)
    engine = one.long if kind == "long rollout" else one.short
    job = programs.RewardJob(config, one.training, engine, lora)
    program: Program
    if kind == "policy step":
        rows = one.training["fsdp"]
        program = programs.policy_program(job, Shapes(rows, LENGTH, rows, LENGTH), counts.append)
    elif kind == "policy update":
        program = programs.update_program(job)
    elif kind == "handover":
        program = programs.handover_program(job)
    else:
        program = programs.rollout_program(job, ROWS, 16_384 if kind == "long rollout" else 4096)
    sizes = engine if "rollout" in kind else one.training
    compiled = compile_for(program, config, one.topology, quantize=None, **sizes)
    found = dataclasses.asdict(compiled) | {"fits": compiled.fits}
    if "rollout" in kind:
        return found
    del found["held"]  # of weights in bfloat16 alone
    if counts:
        return aot_train.finished(found, dataclasses.asdict(counts[0]))
    return found | {"floor_ms": _moved_ms(found)}


def logits(sizes: Mapping[str, int]) -> float:
    """Logits of a rollout in float32, GiB a chip: rows are split over `data`, the vocabulary over `kv` and `q`."""
    return 4 * ROWS * VOCABULARY / math.prod(sizes.get(name, 1) for name in ("data", "kv", "q")) / 2**30


def _moved_ms(found: dict[str, Any]) -> tuple[float, float]:
    """The least time of a program that only moves: arguments read, and as much written as it gives."""
    from glm4v_jax.devices.hardware import GIB
    from glm4v_jax.planning.compile_for_topology import SLICES as CHIPS

    chip = CHIPS[found["topology"].partition(":")[0]]
    return 1e3 * (found["arguments"] + found["outputs"]) * GIB / chip.bandwidth, 0.0
