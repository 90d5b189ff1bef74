"""How much memory and time converting takes, both ways, beside copying the same bytes.

    python -m bench.convert [--gigabytes 4] [--full] [--directory DIR]

Writes a random checkpoint of the 9B's widths (all of it with --full), converts it to Orbax and back, and compares the
results bit by bit. Every conversion is a process of its own, as a person would run it; its peak memory is the kernel's
count, mapped files included. Every timing begins with the source's pages out of the cache and ends with the result on
the disk, for `cp` as for the converter; `cp` runs before and after, and the mean counts. Needs twice the size on the
disk, three times for the second `cp`. Writes `bench/results/convert.json`,
or `convert_full.json` of all of it; exits with status 1 if a limit is not kept.
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import report
from convert.verify import verify
from glm4v_jax import Glm4vConfig

GIBIBYTE = 1 << 30
MAX_PEAK_BYTES = 3 * GIBIBYTE
MAX_RATIO = 3.0
LAYER_BYTES = 2 * 203_969_024
OTHER_BYTES = 20_585_554_944 - 40 * LAYER_BYTES
"""Of the 9B in bfloat16: a decoder layer, and all else."""


# Linux counts in what a process had before it became another program: the one that starts it must be small.
WATCH = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def model_config(gigabytes: float) -> Glm4vConfig:
    """The 9B with as few decoder layers as make at least this size."""
    config = Glm4vConfig.glm4_1v_9b()
    layers = min(40, max(1, math.ceil((gigabytes * 1e9 - OTHER_BYTES) / LAYER_BYTES)))
    return dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, num_hidden_layers=layers))


def files_in(directory: Path) -> list[Path]:
    """All files, at any depth."""
    return [path for path in directory.rglob("*") if path.is_file()]


def settle(directory: Path, *, forget: bool) -> None:
    """Put files on the disk, and forget what of them is in memory."""
    for path in files_in(directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if forget:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(command: list[str], source: Path, target: Path) -> dict[str, float]:
    """Seconds until `target` is on the disk, and the peak memory of the process in bytes."""
    settle(source, forget=True)
    start = time.perf_counter()
    watch = [sys.executable, "-S", "-c", WATCH, *command]
    done = subprocess.run(watch, cwd=report.ROOT, check=True, stdout=subprocess.PIPE, text=True)
    settle(target, forget=False)
    return {"seconds": time.perf_counter() - start, "peak_bytes": int(done.stdout) * 1024}


def convert(*arguments: object) -> list[str]:
    """`python -m convert ...`."""
    return [sys.executable, "-m", "convert", *map(str, arguments)]


def copy_seconds(source: Path, copy: Path) -> float:
    """How long `cp` takes; nothing stays."""
    seconds = measure(["cp", "-r", str(source), str(copy)], source, copy)["seconds"]
    shutil.rmtree(copy)
    return seconds


def room_for(source: Path) -> bool:
    """Whether the disk has room for another copy."""
    return shutil.disk_usage(source).free > 1.1 * sum(path.stat().st_size for path in files_in(source))


def direction(name: str, options: list[str], source: Path, target: Path) -> dict[str, Any]:
    """Copy, convert, copy again and compare: disks are not equally fast at all times."""
    copies = [copy_seconds(source, target.with_name("copy"))]
    done = measure(convert(name, source, target, *options), source, target)
    if room_for(source):
        copies.append(copy_seconds(source, target.with_name("copy")))
    nbytes = sum(path.stat().st_size for path in files_in(source))
    different = verify(source, target).different(0.0)
    assert not different, different
    ratio = done["seconds"] / statistics.mean(copies)
    return {
        "direction": name,
        "nbytes": nbytes,
        "copy_seconds": copies,
        "seconds": done["seconds"],
        "ratio": ratio,
        "peak_bytes": done["peak_bytes"],
        "passed": ratio <= MAX_RATIO and done["peak_bytes"] <= MAX_PEAK_BYTES,
    }


def run(config: Glm4vConfig, directory: Path) -> dict[str, Any]:
    """Everything, in a directory with room for the checkpoint twice."""
    config.save_pretrained(directory)
    source, orbax, back = directory / "hf", directory / "orbax", directory / "back"
    made = measure(convert("synth", "--config", directory / "config.json", "--out", source), directory, source)
    index = json.loads((source / "model.safetensors.index.json").read_text())["metadata"]
    there = direction("to-orbax", [], source, orbax)
    shutil.rmtree(source)
    home = direction("to-hf", ["--max-shard-size", "original"], orbax, back)
    return {
        "layers": config.text_config.num_hidden_layers,
        "tensor_bytes": index["total_size"],
        "parameters": index["total_parameters"],
        "synth": made,
        "directions": [there, home],
        "passed": there["passed"] and home["passed"],
    }


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """Every conversion."""
    size, synth = figures["tensor_bytes"], figures["synth"]

    def line(name: str, seconds: float, peak: float, *rest: str) -> tuple[str, ...]:
        return name, f"{seconds:.1f}", f"{size / seconds / 1e6:.0f}", *rest, f"{peak / GIBIBYTE:.2f}"

    lines = [(*line("synth", synth["seconds"], synth["peak_bytes"], "", ""), "")]
    for each in figures["directions"]:
        compared = (", ".join(f"{seconds:.1f}" for seconds in each["copy_seconds"]), f"{each['ratio']:.2f}")
        lines.append(
            (*line(each["direction"], each["seconds"], each["peak_bytes"], *compared), report.verdict(each["passed"]))
        )
    columns = ("", "seconds", "MB/s", "cp, seconds", "ratio", "peak, GiB", "")
    return [report.Table(f"{figures['parameters']:,} parameters, {size:,} bytes", columns, lines)]


def main() -> int:
    """Measure, print, write; 1 if a limit is not kept."""
    parser = report.parser("bench.convert", __doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint, at least")
    parser.add_argument("--full", action="store_true", help="the whole 9B, 20.6 GB")
    parser.add_argument("--directory", type=Path, help="where there is room for it twice; a temporary one by default")
    arguments = parser.parse_args()
    config = Glm4vConfig.glm4_1v_9b() if arguments.full else model_config(arguments.gigabytes)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        figures = run(config, Path(directory))
    machine = report.machine_facts("jax", "numpy", "orbax-checkpoint")
    # A smaller run does not replace the result of the whole 9B, which takes much of a disk.
    name = "convert_full" if arguments.full else "convert"
    limits = f"limits: {MAX_RATIO} times as long as cp, {MAX_PEAK_BYTES / GIBIBYTE:.0f} GiB of memory"
    return report.finish(name, {"machine": machine, **figures}, *tables(figures), limits)


if __name__ == "__main__":
    sys.exit(main())
