"""What an installation costs: size, packages, import, and the way from a cold start to the first token of an image.

    python -m bench.install

Makes a clean temporary environment, installs this checkout into it without extras, measures there, prints a table and
writes `bench/results/install.json`. Exits with status 1 if an aim is missed. On CPU, and without any cache of compiled
programs.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from typing import Any

from bench import report

MEGABYTE = 1_000_000
REPEATS = 3

MAX_MEGABYTES = 900
MAX_IMPORT_SECONDS = 3
MAX_FIRST_TOKEN_SECONDS = 15

MAKE_IMAGE = """
import sys, numpy, PIL.Image
y, x = numpy.mgrid[:480, :640]
rgb = numpy.stack([x * 255 // 639, y * 255 // 479, (x // 40 + y // 40) % 2 * 255], axis=-1)
PIL.Image.fromarray(rgb.astype(numpy.uint8)).save(sys.argv[1])
"""

LIST_PACKAGES = """
import importlib.metadata, json
sizes = {}
for package in importlib.metadata.distributions():
    files = [package.locate_file(file) for file in package.files or ()]
    sizes[package.name] = sum(file.stat().st_size for file in files if file.is_file())
print(json.dumps(sizes))
"""

TIME_IMPORT = """
import time
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
"""

FIND_REFERENCE = """
import importlib.util, json
print(json.dumps([name for name in ("torch", "transformers") if importlib.util.find_spec(name)]))
"""


class Environment:
    """A clean virtual environment in `directory`, and a process' view of it: no caches, no modules from elsewhere."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.python = directory / "bin" / "python"
        venv.create(directory, with_pip=True)
        home = directory / "home"
        home.mkdir()
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX_", "XLA_"))
        }
        self.variables = inherited | {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "0",  # the command line keeps compiled programs otherwise
        }

    def run(self, *arguments: str | pathlib.Path) -> str:
        """Runs this environment's Python outside of the checkout; returns what it writes to standard output."""
        return subprocess.run(
            [self.python, *arguments],
            cwd=self.directory,
            env=self.variables,
            check=True,
            text=True,
            stdout=subprocess.PIPE,
        ).stdout

    def size(self) -> int:
        """Bytes of all files, what pip compiled included."""
        return sum(path.lstat().st_size for path in self.directory.rglob("*") if not path.is_dir())

    def packages(self) -> dict[str, int]:
        """Name of each installed package -> bytes of its files."""
        return json.loads(self.run("-c", LIST_PACKAGES))

    def import_seconds(self, statement: str) -> float:
        """Median over fresh processes."""
        program = TIME_IMPORT.format(statement=statement)
        return statistics.median(float(self.run("-c", program)) for _ in range(REPEATS))

    def first_token_seconds(self) -> tuple[list[float], list[float]]:
        """From the start of a process to its exit after one token about a 640 x 480 image, several times.

        Returns:
            Seconds on the clock, and seconds of CPU: the latter say what another load on the machine added.
        """
        image = self.directory / "image.png"
        self.run("-c", MAKE_IMAGE, image)
        seconds, cpu_seconds = [], []
        for _ in range(REPEATS):
            start, cpu_start = time.perf_counter(), children_cpu_seconds()
            output = self.run(
                "-m", "glm4v_jax", "generate", "--image", image, "--max-new-tokens", "1", "--json", "What is this?"
            )
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(children_cpu_seconds() - cpu_start)
            if json.loads(output)["new_tokens"] != 1:
                raise RuntimeError(f"expected one new token, found {output}")
        return seconds, cpu_seconds


def children_cpu_seconds() -> float:
    """User and system time of the processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(directory: pathlib.Path) -> dict[str, Any]:
    """Installs and measures in `directory`; returns the figures, seconds and bytes."""
    facts, load = report.machine_facts(), os.getloadavg()[0]
    environment = Environment(directory)
    size_before, packages_before = environment.size(), environment.packages()
    start = time.perf_counter()
    environment.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", report.ROOT)
    install_seconds = time.perf_counter() - start
    # Before anything is run: what is measured afterwards writes files of its own.
    size = environment.size() - size_before
    packages = {name: size for name, size in environment.packages().items() if name not in packages_before}
    first_token, first_token_cpu = environment.first_token_seconds()
    return {
        "machine": facts,
        "bytes": size,
        "packages": len(packages),
        "largest_packages": dict(sorted(packages.items(), key=lambda item: -item[1])[:10]),
        "install_seconds": install_seconds,
        "import_seconds": environment.import_seconds("import glm4v_jax"),
        "import_model_seconds": environment.import_seconds("from glm4v_jax import Glm4vForConditionalGeneration"),
        "first_token_seconds": statistics.median(first_token),
        "first_token_seconds_all": first_token,
        "first_token_cpu_seconds": statistics.median(first_token_cpu),
        "reference_packages_found": json.loads(environment.run("-c", FIND_REFERENCE)),
        "load_average_before": load,
    }


def rows(figures: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, figure, aim, whether it is met) of each line of the table."""
    megabytes = figures["bytes"] / MEGABYTE
    package, model = figures["import_seconds"], figures["import_model_seconds"]
    first, every = figures["first_token_seconds"], figures["first_token_seconds_all"]
    first_figure = f"{first:.1f} s ({min(every):.1f} to {max(every):.1f})"
    found = figures["reference_packages_found"]
    import_aim = f"< {MAX_IMPORT_SECONDS} s"
    first_aim = f"< {MAX_FIRST_TOKEN_SECONDS} s"
    return [
        ("size on disk", f"{megabytes:,.0f} MB", f"< {MAX_MEGABYTES} MB", megabytes < MAX_MEGABYTES),
        ("packages", str(figures["packages"]), "", True),
        ("time to install", f"{figures['install_seconds']:.0f} s", "", True),
        ("import glm4v_jax", f"{package:.2f} s", import_aim, package < MAX_IMPORT_SECONDS),
        ("import the model class", f"{model:.2f} s", import_aim, model < MAX_IMPORT_SECONDS),
        ("cold start to the first token of an image", first_figure, first_aim, first < MAX_FIRST_TOKEN_SECONDS),
        ("the same in seconds of CPU", f"{figures['first_token_cpu_seconds']:.1f} s", "", True),
        ("torch, transformers", ", ".join(found) or "absent", "absent", not found),
    ]


def main() -> int:
    """Measures, prints, writes the result; 1 if an aim is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.install", description="what a clean installation costs")
    parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glm4v_jax_install_") as directory:
        figures = measure(pathlib.Path(directory) / "environment")
    machine, lines = figures["machine"], rows(figures)
    title = f"a clean installation, Python {machine['python']}, {machine['system']}, {machine['cores']} cores"
    judged = [(what, figure, aim, report.verdict(met) if aim else "") for what, figure, aim, met in lines]
    largest = [(name, f"{size / MEGABYTE:,.0f}") for name, size in figures["largest_packages"].items()]
    out = report.console()
    out.print(report.Table(title, ("what", "measured", "aim", ""), judged))
    out.print(f"medians of {REPEATS} processes; load average before: {figures['load_average_before']:.1f}")
    out.print(report.Table("the largest packages", ("package", "MB"), largest))
    return report.finish("install", figures | {"passed": all(met for *_, met in lines)})


if __name__ == "__main__":
    sys.exit(main())
