"""Two sides that take turns, each a process of its own: while one computes, the other sleeps in a read.

Neither's thread pool disturbs the other's, and each may have an interpreter of its own. A request is one line of JSON
on a process's input, `{"task": name, **arguments}`; the reply is one line of JSON. A bench with two sides declares them
as subclasses of `JaxSide` and `TorchSide`, whose public methods are the tasks, and ends its module with `main`.
"""

import argparse
import contextlib
import heapq
import json
import operator
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from bench import report

PAUSE = 0.05
"""Seconds between two turns, in which the threads of the last one stop spinning."""
PROFILE_LENGTH = 10
"""Operations that a profile lists."""

Workers = Mapping[str, Callable[..., Any]]
"""Side -> what does its tasks: called with a task's name and arguments, it returns the result."""


class TimedTask(NamedTuple):
    """What a side does in a turn."""

    task: str
    arguments: Mapping[str, Any]


def measure(workers: Workers, works: Sequence[Mapping[str, TimedTask]], rounds: int) -> list[list[dict[str, Any]]]:
    """Have the sides take turns at every piece of work, in `rounds` rounds and one before them for warming up.

    Returns, of each piece, of each round, side -> result.
    """
    results: list[list[dict[str, Any]]] = [[] for _ in works]
    for number in range(rounds + 1):
        for work, each in zip(works, results, strict=True):
            done = {side: workers[side](task, **arguments) for side, (task, arguments) in work.items()}
            if number:
                each.append(done)
    return results


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(ours: Sequence[float], theirs: Sequence[float], amount: float, aim: float | None) -> dict[str, Any]:
    """Compare seconds of both sides by round: amounts a second, the ratio within a round, and whether it meets its aim.

    >>> compare([1, 2, 4], [2, 6, 4], amount=8, aim=2)["ratio"]
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {
        "ours": spread([amount / seconds for seconds in ours]),
        "theirs": spread([amount / seconds for seconds in theirs]),
        **judge([b / a for a, b in zip(ours, theirs, strict=True)], aim),
    }


def judge(ratios: Sequence[float], aim: float | None) -> dict[str, Any]:
    """Ratios of rounds, their aim, and whether the median meets it; `report.judged` shows them."""
    ratio = spread(ratios)
    return {"ratio": ratio, "aim": aim, "passed": aim is None or ratio["median"] >= aim}


def profiles(
    workers: Workers, works: Mapping[str, Mapping[str, TimedTask]]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Title of a piece of work -> side -> where its time goes."""
    return {
        title: {
            side: workers[side]("profile", work=task, arguments=dict(arguments))
            for side, (task, arguments) in work.items()
        }
        for title, work in works.items()
    }


def facts(workers: Workers) -> dict[str, Any]:
    """Side -> the machine and the versions of what runs there."""
    return {side: worker("facts") for side, worker in workers.items()}


def load_average() -> float | None:
    """Of the last minute; None where the system does not count it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class Worker:
    """The asking end of a process that runs a side."""

    def __init__(self, name: str, command: Sequence[str], **environment: str):
        self.name = name
        self.process = subprocess.Popen(
            command, cwd=report.ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | environment,
        )  # fmt: skip

    def __call__(self, task: str, **arguments: Any) -> Any:
        """Have one task done; SystemExit if the process ended, having said why."""
        assert self.process.stdin is not None and self.process.stdout is not None
        time.sleep(PAUSE)
        try:
            self.process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise SystemExit(f"{self.name}: ended in {task!r} with status {self.process.wait()}")
        return json.loads(reply)

    def __enter__(self) -> Self:
        """Wait for nothing: the process answers once it has started."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        self.process.communicate()


def command(module: str, *arguments: object, python: str = sys.executable) -> list[str]:
    """`python -m MODULE ARGUMENT ...`."""
    return [python, "-m", module, *map(str, arguments)]


def printed_by(module: str, *arguments: object, **environment: str) -> str:
    """What a module prints that runs in a process of its own."""
    return subprocess.run(
        command(module, *arguments), cwd=report.ROOT, env=os.environ | environment, check=True, text=True,
        stdout=subprocess.PIPE,
    ).stdout  # fmt: skip


def sides(module: str, threads: int, **pythons: str) -> dict[str, list[str]]:
    """The commands of both sides of a module; `ours` and `theirs` name interpreters other than this one."""
    return {
        side: command(module, "--side", side, "--threads", threads, python=pythons.get(side, sys.executable))
        for side in ("ours", "theirs")
    }


@contextlib.contextmanager
def start(commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Worker]]:
    """Start a process on the CPU for each command."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Worker(name, words, JAX_PLATFORMS="cpu")) for name, words in commands.items()}


def serve(tasks: Mapping[str, Callable[..., Any]]) -> None:
    """The answering end: do tasks until the input ends. What else is printed goes to the error output."""
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(tasks[request.pop("task")](**request)), file=replies, flush=True)


def parse(
    parser: argparse.ArgumentParser, ours: Callable[..., Any], theirs: Callable[..., Any], *names: str
) -> argparse.Namespace:
    """Parse the arguments of a program that runs its own sides; as one of them, do its tasks and exit.

    `--side` and `--threads` are added; `names` are the arguments that the sides are made of.
    """
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="cores of each side")
    parsed = parser.parse_args()
    if parsed.side is not None:
        made = ours if parsed.side == "ours" else theirs
        run_side(made, parsed.side, parsed.threads, *(getattr(parsed, name) for name in names))
        sys.exit()
    return parsed


def main(ours: Callable[..., Any], theirs: Callable[..., Any], *names: str) -> None:
    """The answering end as a program, `--side ours --threads 2`; for other arguments see `parse`."""
    parser = argparse.ArgumentParser(description="One side of a comparison: reads tasks, a line of JSON each.")
    for name in names:
        parser.add_argument(f"--{name}", required=True)
    parse(parser, ours, theirs, *names)
    parser.error("--side: found no value; expected ours or theirs")


def run_side(made: Callable[..., Any], side: str, threads: int, *arguments: Any) -> None:
    """Confine this process to `threads` cores, make a side, and do its tasks: its public methods."""
    use_cores(threads)
    if side == "theirs":
        import torch

        torch.set_num_threads(threads)
    worker = made(*arguments)
    serve({name: getattr(worker, name) for name in dir(worker) if not name.startswith("_") and name != "packages"})


class Side:
    """What both sides answer: `packages` are those whose versions count."""

    packages: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Versions of what runs here."""
        return report.machine_facts(*self.packages)

    def peak(self) -> int:
        """Peak resident memory of the process."""
        return peak_bytes()


class JaxSide(Side):
    """The package's own side."""

    packages: tuple[str, ...] = ("jax", "jaxlib", "flax", "numpy")

    def profile(self, work: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """The operations on XLA's threads that take the most time while a task is done."""
        return slowest(xla_operations(lambda: getattr(self, work)(**arguments)))


class TorchSide(Side):
    """The reference's side."""

    packages: tuple[str, ...] = ("torch", "transformers", "numpy")

    def profile(self, work: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """The operations of torch that take the most time by themselves while a task is done."""
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            getattr(self, work)(**arguments)
        return slowest((event.key, event.count, event.self_cpu_time_total / 1e3) for event in profiler.key_averages())


def xla_operations(function: Callable[[], Any]) -> Iterator[tuple[str, int, float]]:
    """Operations during a call, and how many milliseconds each took: on XLA's threads, or on a GPU or TPU."""
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            function()
        file = next(pathlib.Path(directory).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(file))
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
    for plane in devices or planes:
        for line in plane.lines:
            # Of a GPU its streams; of a TPU its operations, and not the modules and steps that they make up.
            is_counted = line.name.startswith(("Stream", "XLA Ops")) if devices else "XLA" in line.name
            for event in line.events if is_counted else ():
                # These enclose others.
                if not event.name.startswith(("ThunkExecutor", "end: ", "while", "call")):
                    yield event.name.rstrip(".0123456789"), 1, event.duration_ns / 1e6


def slowest(operations: Iterable[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """The operations, given with their calls and milliseconds, that take the most time together.

    >>> slowest([("dot", 1, 1.5), ("add", 1, 2.0), ("dot", 2, 1.0)])[0]
    {'name': 'dot', 'calls': 3, 'milliseconds': 2.5}
    """
    milliseconds, calls = defaultdict[str, float](float), Counter[str]()
    for name, count, time_taken in operations:
        milliseconds[name] += time_taken
        calls[name] += count
    longest = heapq.nlargest(PROFILE_LENGTH, milliseconds.items(), key=operator.itemgetter(1))
    return [{"name": name, "calls": calls[name], "milliseconds": total} for name, total in longest]


def use_cores(count: int) -> None:
    """Confine this process to `count` cores, where the system allows that; before anything starts threads.

    Raises:
      SystemExit: there are fewer.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise SystemExit(f"--threads: found {len(cores)} cores; expected {count}")
    os.sched_setaffinity(0, cores[:count])


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage there counts what the parent had before this program took its place
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_bandwidth(megabytes: int, threads: int) -> float:
    """Bytes read a second by NumPy's maximum of a buffer, in parts, one to a thread; the median of five reads."""
    buffer = np.ones(megabytes * 250_000, np.float32)
    parts = np.array_split(buffer, threads)

    def read() -> None:
        readers = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()

    return buffer.nbytes / seconds(read, 5)


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """The median time of `repeats` calls, or of as many as begin within a second."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1:
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
