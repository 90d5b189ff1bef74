"""The process that measures: asked for parts by `bench.device`, a line of JSON each, it answers with figures."""

import importlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import report

if TYPE_CHECKING:
    from bench.device.model import Device, Figures


class Part(NamedTuple):
    """Something to measure: the function `where` yields its figures.

    A part that has no `seconds` left stops between two figures, and is ended a little later if it does not.
    """

    name: str
    seconds: int
    where: str
    in_own_process: bool = False


PARTS = (
    Part("ceilings", 40, "kernels.ceilings"),
    Part("decode", 110, "generate.decode"),
    Part("prefill", 80, "generate.prefill"),
    Part("requests", 150, "generate.requests"),
    Part("lora", 80, "train.lora"),
    Part("vision", 60, "generate.vision"),
    Part("attention", 50, "kernels.attention"),
    Part("profile", 30, "generate.profile"),
    Part("int8", 100, "generate.int8"),
    Part("unstacked", 60, "generate.unstacked"),
    Part("full", 60, "train.full"),
    Part("cold start", 60, "generate.start", in_own_process=True),
    Part("warm start", 40, "generate.start", in_own_process=True),
)
"""The most valuable first; those without compiled programs on disk, and with them, after all others have ended."""


def machine(tiny: bool) -> dict[str, Any]:
    """Facts about the device and what runs on it."""
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return report.machine_facts("jax", "jaxlib", "flax", "optax") | {
        "device": device.device_kind,
        "platform": device.platform,
        "platform_version": " ".join(str(jax.extend.backend.get_backend().platform_version).split()),
        "memory": stats.get("bytes_limit"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "tiny": tiny,
    }


def measure(where: str, device: "Device") -> "Figures":
    """Yield the figures of a part until it has no time left."""
    module, _, function = where.partition(".")
    for figure in getattr(importlib.import_module(f"bench.device.{module}"), function)(device):
        yield figure
        if time.monotonic() > device.deadline:
            break


def main() -> None:
    """Answer requests {"part", "seconds"} until the input ends: {"figure"} for each, then {"done"}, or {"error"}."""
    tiny, started = sys.argv[1] == "tiny", float(sys.argv[2])
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)

        def reply(**content: Any) -> None:
            print(json.dumps(content), file=replies, flush=True)

        from bench.device import model, work
        from glm4v_jax.devices.compilation_cache import use_compilation_cache

        use_compilation_cache()
        reply(machine=machine(tiny), workloads=work.workloads(tiny))
        device = model.Device(tiny, started)
        where = {part.name: part.where for part in PARTS}
        for line in sys.stdin:
            request = json.loads(line)
            device.deadline = time.monotonic() + request["seconds"]
            try:
                for figure in measure(where[request["part"]], device):
                    reply(figure=figure)
                reply(done=True)
            except Exception as error:
                reply(error=model.one_line(error))


if __name__ == "__main__":
    main()
