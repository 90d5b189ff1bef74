"""What an installation costs: size, packages, import, and the way from a cold start to the first token of an image.

    python -m bench.install [--against CHECKOUT]

Makes a clean temporary environment, installs this checkout into it without extras, measures there, prints a table and
writes `bench/results/install.json`. Exits with status 1 if an aim is missed. On CPU; starts are measured with an empty
cache of compiled programs and with that of the start before. With `--against`, another checkout starts in the same
environment, the two taking turns.
"""

import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from bench import report

MEGABYTE = 1_000_000
REPEATS = 3
STARTS = 5

MAX_MEGABYTES = 900
MAX_IMPORT_SECONDS = 3
MAX_START_SECONDS = {"cold": 15, "warm": 3}
"""Without compiled programs on disk, and with those of the start before."""

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
        }

    def run(self, *arguments: str | pathlib.Path, variables: Mapping[str, str] = MappingProxyType({})) -> str:
        """Runs this environment's Python outside of the checkout; returns what it writes to standard output."""
        return subprocess.run(
            [self.python, *arguments],
            cwd=self.directory,
            env=self.variables | dict(variables),
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

    def starts(self, other: pathlib.Path | None = None) -> dict[str, "Starts"]:
        """From the start of a process to its exit after one token about a 640 x 480 image, in turns, several times.

        Returns which code (also that of the checkout `other`), and whether with compiled programs on disk -> figures.
        """
        image = self.directory / "image.png"
        self.run("-c", MAKE_IMAGE, image)
        sources = {"this": None} | ({} if other is None else {"other": other})
        found = {f"{name}, {kind}": Starts([], []) for name in sources for kind in ("cold", "warm")}
        texts = set()
        for _ in range(STARTS):
            for name, source in sources.items():
                for kind in ("cold", "warm"):
                    cache = self.directory / "programs"
                    if kind == "cold":
                        shutil.rmtree(cache, ignore_errors=True)
                    variables = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
                    if source is not None:
                        variables["PYTHONPATH"] = str(source)
                    start, cpu_start = time.perf_counter(), children_cpu_seconds()
                    output = self.run(
                        *("-m", "glm4v_jax", "generate", "--image", image, "--max-new-tokens", "1", "--json"),
                        "What is this?",
                        variables=variables,
                    )
                    figures = found[f"{name}, {kind}"]
                    figures.seconds.append(time.perf_counter() - start)
                    figures.cpu_seconds.append(children_cpu_seconds() - cpu_start)
                    texts.add(json.loads(output)["text"])
        if len(texts) != 1:
            raise RuntimeError(f"starts: found answers {sorted(texts)}; expected the same of all")
        return found


class Starts(NamedTuple):
    """Seconds on the clock, and seconds of CPU: the latter say what another load on the machine added."""

    seconds: list[float]
    cpu_seconds: list[float]


def children_cpu_seconds() -> float:
    """User and system time of the processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(directory: pathlib.Path, other: pathlib.Path | None) -> dict[str, Any]:
    """Installs and measures in `directory`, beside the checkout `other`; returns the figures, seconds and bytes."""
    facts, load = report.machine_facts(), os.getloadavg()[0]
    environment = Environment(directory)
    size_before, packages_before = environment.size(), environment.packages()
    start = time.perf_counter()
    environment.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", report.ROOT)
    install_seconds = time.perf_counter() - start
    # Before anything is run: what is measured afterwards writes files of its own.
    size = environment.size() - size_before
    packages = {name: size for name, size in environment.packages().items() if name not in packages_before}
    starts = environment.starts(other)
    return {
        "machine": facts,
        "bytes": size,
        "packages": len(packages),
        "largest_packages": dict(sorted(packages.items(), key=lambda item: -item[1])[:10]),
        "install_seconds": install_seconds,
        "import_seconds": environment.import_seconds("import glm4v_jax"),
        "import_model_seconds": environment.import_seconds("from glm4v_jax import Glm4vForConditionalGeneration"),
        "starts": {name: figures._asdict() for name, figures in starts.items()},
        "reference_packages_found": json.loads(environment.run("-c", FIND_REFERENCE)),
        "load_average_before": load,
    }


def rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, figure, aim, whether it is met) of each line of the table."""
    megabytes = figures["bytes"] / MEGABYTE
    package, model = figures["import_seconds"], figures["import_model_seconds"]
    found = figures["reference_packages_found"]
    import_aim = f"< {MAX_IMPORT_SECONDS} s"
    return [
        ("size on disk", f"{megabytes:,.0f} MB", f"< {MAX_MEGABYTES} MB", megabytes < MAX_MEGABYTES),
        ("packages", str(figures["packages"]), "", True),
        ("time to install", f"{figures['install_seconds']:.0f} s", "", True),
        ("import glm4v_jax", f"{package:.2f} s", import_aim, package < MAX_IMPORT_SECONDS),
        ("import the model class", f"{model:.2f} s", import_aim, model < MAX_IMPORT_SECONDS),
        *(start_row(name, one["seconds"], one["cpu_seconds"]) for name, one in figures["starts"].items()),
        ("torch, transformers", ", ".join(found) or "absent", "absent", not found),
    ]


def start_row(name: str, seconds: list[float], cpu_seconds: list[float]) -> tuple[str, str, str, bool]:
    """The line of a kind of start."""
    code, kind = name.split(", ")
    median = statistics.median(seconds)
    figure = f"{median:.1f} s ({min(seconds):.1f} to {max(seconds):.1f}; CPU {statistics.median(cpu_seconds):.1f} s)"
    what = f"{kind} start to the first token of an image" + (", the other checkout" if code == "other" else "")
    if code == "other":
        return what, figure, "", True
    return what, figure, f"< {MAX_START_SECONDS[kind]} s", median < MAX_START_SECONDS[kind]


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """The figures with their aims, and what takes most of the disk."""
    machine, load = figures["machine"], figures["load_average_before"]
    system = f"Python {machine['python']}, {machine['system']}, {machine['cores']} cores"
    title = f"a clean installation, {system}; load average before: {load:.1f}"
    judged = [(what, figure, aim, report.verdict(met) if aim else "") for what, figure, aim, met in rows(figures)]
    largest = [(name, f"{size / MEGABYTE:,.0f}") for name, size in figures["largest_packages"].items()]
    return [
        report.Table(title, ("what", "measured", "aim", ""), judged),
        report.Table("the largest packages", ("package", "MB"), largest),
    ]


def main() -> int:
    """Measures, prints, writes the result; 1 if an aim is missed."""
    parser = report.parser("bench.install", __doc__)
    parser.add_argument("--against", type=pathlib.Path, metavar="CHECKOUT", help="start this code as well, in turns")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glm4v_jax_install_") as directory:
        figures = measure(pathlib.Path(directory) / "environment", arguments.against)
    figures["passed"] = all(met for *_, met in rows(figures))
    medians = f"medians of {STARTS} starts and {REPEATS} imports"
    return report.finish("install", figures, *tables(figures), medians)


if __name__ == "__main__":
    sys.exit(main())
