"""Two processes that take turns: while one computes, the other sleeps in a read.

Neither's thread pool disturbs the other's, and each may have an interpreter of its own. A request is one line of JSON
on the worker's input, `{"task": name, **arguments}`; the reply is one line of JSON.
"""

import argparse
import heapq
import json
import operator
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

from bench import report

PAUSE = 0.05
"""Seconds between two turns, in which the threads of the last one stop spinning."""


PROFILE_LENGTH = 10
"""Operations that a profile lists."""


class Worker:
    """The asking side: a process that runs `python -m MODULE`."""

    def __init__(self, name: str, python: str | pathlib.Path, module: str, threads: int):
        self.name = name
        self.process = subprocess.Popen(
            [str(python), "-m", module, "--threads", str(threads)],
            cwd=report.ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    def __call__(self, task: str, **arguments: Any) -> Any:
        """Have one task done.

        Raises:
          SystemExit: the process ended; it has said why on its error output.
        """
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
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve(tasks: Mapping[str, Callable[..., Any]]) -> None:
    """The answering side: do tasks until the input ends. What else is printed goes to the error output."""
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(tasks[request.pop("task")](**request)), file=replies, flush=True)


def main(make: Callable[[], object], *, with_torch: bool = False) -> None:
    """The answering side as a program: its tasks are the public methods of what is made, called by their names.

    Args:
      make: called when the process has its cores.
      with_torch: whether torch is to have as many threads.
    """
    parser = argparse.ArgumentParser(description="One side of a comparison: reads tasks, a line of JSON each.")
    parser.add_argument("--threads", type=int, required=True)
    threads = parser.parse_args().threads
    use_cores(threads)
    if with_torch:
        import torch

        torch.set_num_threads(threads)
    side = make()
    serve({name: getattr(side, name) for name in dir(side) if not name.startswith("_")})


def xla_operations(function: Callable[[], Any]) -> Iterator[tuple[str, float]]:
    """Operations on XLA's threads during a call, and how many milliseconds each took."""
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            function()
        file = next(pathlib.Path(directory).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(file))
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events if "XLA" in line.name else ():
                # These enclose others.
                if not event.name.startswith(("ThunkExecutor", "end: ", "while", "call")):
                    yield event.name.rstrip(".0123456789"), event.duration_ns / 1e6


def slowest(operations: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    """The operations that take the most milliseconds together."""
    total, calls = defaultdict[str, float](float), Counter[str]()
    for name, milliseconds in operations:
        total[name] += milliseconds
        calls[name] += 1
    longest = heapq.nlargest(PROFILE_LENGTH, total.items(), key=operator.itemgetter(1))
    return [{"name": name, "calls": calls[name], "milliseconds": milliseconds} for name, milliseconds in longest]


def torch_profile(function: Callable[[], Any]) -> list[dict[str, Any]]:
    """The operations of torch that take the most time by themselves during a call."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    ordered = sorted(profiler.key_averages(), key=_self_time, reverse=True)
    return [
        {"name": event.key, "calls": event.count, "milliseconds": _self_time(event) / 1e3}
        for event in ordered[:PROFILE_LENGTH]
    ]


def _self_time(event: Any) -> float:
    return event.self_cpu_time_total


def use_cores(count: int) -> None:
    """Confine this process to so many cores, where the system allows that; before anything starts threads.

    Raises:
      SystemExit: there are not so many.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise SystemExit(f"found {len(cores)} cores, expected {count} for as many threads")
    os.sched_setaffinity(0, cores[:count])


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """The median time of a call, of so many calls or as many as begin within a second."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
