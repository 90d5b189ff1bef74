"""Two processes that take turns: while one computes, the other sleeps in a read.

Neither's thread pool disturbs the other's, and each may have an interpreter of its own. A request is one line of JSON
on the worker's input, `{"task": name, **arguments}`; the reply is one line of JSON.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
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
