"""What of the 9B fits where, in floats and integers: a table of docs/guides/quantize.md, from the shapes of arrays."""

from collections.abc import Mapping
from typing import NamedTuple

from bench import report
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.hardware import GIB
from glm4v_jax.planning.compile_for_topology import SLICES
from glm4v_jax.planning.memory_table import describe

CONTEXT = 4096
HOST, DEVICE, SYSTEM, DRIVER = 1.0, 0.5, 2, 0.08
"""GiB of a process beside weights and cache, 0.9 and less by `bench.quant`, and of programs' temporaries on other
devices, 0.3 and less by the page of performance; GiB that a computer's system takes, and the fraction of a GPU's memory
that is not free."""


class Place(NamedTuple):
    """Where a model runs.

    name: in the table.
    beside: GiB that it takes besides weights and cache.
    memories: name -> GiB that are free, smallest first.
    weights: what weights are in -> dtype and scheme of `describe`.
    """

    name: str
    beside: float
    memories: Mapping[str, float]
    weights: Mapping[str, tuple[str, str]]


AVAILABLE = {name: SLICES[name].available / GIB for name in ("v5e", "v6e")}
PLACES = (
    Place(
        "CPU", HOST, {f"{size} GB": size - SYSTEM for size in (8, 12, 16, 24, 32, 48, 64)},
        {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), "int8": ("float32", "int8"),
         "int4": ("float32", "int4")},
    ),
    Place(
        "GPU", DEVICE, {f"{size} GB": (1 - DRIVER) * size for size in (8, 12, 16, 24, 32, 40, 48, 80)},
        {"bfloat16": ("bfloat16", "none"), "int8": ("bfloat16", "int8"), "int4": ("bfloat16", "int4")},
    ),
    Place(
        "TPU", DEVICE, {f"{name} ({size} GiB)": size for name, size in AVAILABLE.items()},
        {"bfloat16": ("bfloat16", "none"), "int8": ("bfloat16", "int8")},
    ),
)  # fmt: skip


def table() -> report.Table:
    """Memory of the 9B, and the smallest memory that holds it."""
    config = Glm4vConfig.glm4_1v_9b()
    rows = []
    for place in PLACES:
        for name, (dtype, scheme) in place.weights.items():
            tables = [describe(config, {}, rows=n, capacity=CONTEXT, dtype=dtype, scheme=scheme) for n in (1, 8)]
            sums = [found.device_bytes / GIB + place.beside for found in tables]
            smallest = [next(memory for memory, free in place.memories.items() if free >= total) for total in sums]
            sizes = [tables[0].weight_bytes, *(found.cache.device_bytes for found in tables)]
            rows.append(
                (place.name, name, *(f"{size / GIB:.2f}" for size in sizes),
                 *(f"{total:.1f}: {memory}" for total, memory in zip(sums, smallest, strict=True)))
            )  # fmt: skip
    columns = ("on", "weights in", "weights", "cache of 1", "cache of 8", "in all with 1: fits", "in all with 8: fits")
    return report.Table("what fits where, GiB", columns, rows)
