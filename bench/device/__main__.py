"""Figures of one accelerator, in nine minutes: `python -m bench.device`.

    python -m bench.device [--tiny] [--only PART,...] [--seconds N] [--restart] [--out DIRECTORY]

The 9B with random weights, made on the device, in bfloat16 and in int8: bandwidth and matrix products of the device,
decoding, prefill, the ViT, attention kernels, training steps, 1,000 requests with an image, and the start of a process.
The workloads and their floors are in `bench.device.work`. Nothing is downloaded.

Figures are written as they come: a run that is cut off keeps what it has, and the next one measures what is missing.
A part that fails, runs out of memory or takes too long is one line; the next one begins, in a new process if need be.
`python -m bench.page device` then writes the page. Exits with status 1 if a part failed or an aim is missed.
"""

import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench import report
from bench.device import table
from bench.device.worker import PARTS, Part

SECONDS = 540
GRACE = 20
"""Seconds after which a part that has none left is ended."""
START = 120
"""Seconds that a process may take until it has found the device."""
LEAST = 5
"""Seconds that are worth beginning a part."""
COMMAND = (sys.executable, "-m", "bench.device.worker")
# JAX takes a fraction of a GPU's memory at once: its default of 0.75 leaves too little beside the 9B on one of 80 GB.
DEFAULTS = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
TINY_DEFAULTS = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""Compiling takes most of the time of a tiny run."""


class Gone(Exception):  # noqa: N818
    """The process that measures has ended, or was ended: the last line of its log, or why."""


class Worker:
    """A process that measures parts."""

    def __init__(self, tiny: bool, log: pathlib.Path, programs: pathlib.Path):
        self._log = log
        environment = DEFAULTS | (TINY_DEFAULTS if tiny else {}) | os.environ
        environment["JAX_COMPILATION_CACHE_DIR"] = str(programs)
        command = [*COMMAND, "tiny" if tiny else "full", str(time.time())]
        with log.open("a", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        self._lines = queue.Queue[str]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def replies(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Yield replies until the caller stops; raises Gone if one takes too long, or the process has ended."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise Gone(f"ended after {seconds:.0f} seconds") from None
            if not line:
                lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
                raise Gone(f"the process ended with status {self._process.wait()}: {lines[-1][:300]}")
            yield json.loads(line)

    def ask(self, part: str, seconds: float) -> Iterator[dict[str, Any]]:
        """Have a part measured; yields as `replies` does."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `replies` says why
            print(json.dumps({"part": part, "seconds": seconds}), file=self._process.stdin, flush=True)
        return self.replies(seconds + GRACE)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class Results:
    """What was measured so far, in a file."""

    def __init__(self, path: pathlib.Path, restart: bool):
        self.path = path
        self.content: dict[str, Any] = {"machine": {}, "workloads": {}, "figures": {}, "parts": {}}
        if path.exists() and not restart:
            self.content = json.loads(path.read_text(encoding="utf-8"))

    def write(self) -> None:
        """Replace the file."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self.path)

    def begin(self, machine: dict[str, Any], workloads: dict[str, Any]) -> None:
        """Take what a process says of itself; SystemExit if the file is of another machine."""
        old = self.content["machine"] or machine
        for name in {**machine, **old}:
            if old.get(name) != machine.get(name):
                raise SystemExit(
                    f"{self.path}: found figures of {name} {old.get(name)!r}; expected {machine.get(name)!r}: "
                    "pass --restart"
                )
        self.content |= {"machine": machine, "workloads": workloads}

    def take(self, part: str, figure: Mapping[str, Any]) -> None:
        """Keep a figure."""
        name = part if figure["what"] == "start" else figure["what"]
        self.content["figures"][name] = {**figure, "what": name, "part": part}
        self.write()

    def end(self, part: str, seconds: float, error: str | None) -> None:
        """Note how a part ended."""
        self.content["parts"][part] = {"seconds": round(seconds, 1), "error": error}
        self.write()


def measure(parts: Sequence[Part], results: Results, tiny: bool, seconds: float) -> None:
    """Measure parts one after the other, in as few processes as they allow."""
    out, deadline = report.console(), time.monotonic() + seconds
    log, worker = results.path.with_suffix(".log"), None
    with contextlib.ExitStack() as workers:
        for part in parts:
            begin = time.monotonic()
            if part.in_own_process:
                workers.close()
                worker = None
            try:
                if deadline - begin < LEAST:
                    raise Gone("not begun: no time left")
                if worker is None:
                    worker = Worker(tiny, log, _programs(results.path, part))
                    workers.callback(worker.close)
                    results.begin(**next(worker.replies(min(START, deadline - begin))))
                limit = max(LEAST, min(part.seconds, deadline - time.monotonic()))
                error = _take(part.name, worker.ask(part.name, limit), results)
            except Gone as gone:
                workers.close()
                worker, error = None, str(gone)
            if part.in_own_process:
                workers.close()
                worker = None
            taken, left = time.monotonic() - begin, deadline - time.monotonic()
            results.end(part.name, taken, error)
            line = f"{part.name}: {taken:.0f} s, {max(0, left):.0f} s left" + (f"; {error}" if error else "")
            out.print(line, style="red" if error else "dim", markup=False)


def _take(part: str, replies: Iterable[dict[str, Any]], results: Results) -> str | None:
    """Keep and print the figures of a part; return why it failed, or what it had no time for, None if it is whole."""
    error: str | None = None
    measured = set[str]()
    for reply in replies:
        figure = reply.get("figure", {})
        error = reply.get("error") or figure.get("error") or error
        if not figure:
            break
        results.take(part, figure)
        measured.add(figure["what"])
        shown = f"{1e3 * figure['seconds']:,.2f} ms" if "seconds" in figure else figure.get("error", "")
        line = f"  {figure['what']}: {shown}  {figure.get('note', '')}"
        report.console().print(line, markup=False, highlight=False)
    # A part ends between two figures where its time is up: the next run measures it again.
    missing = [what for what, (of, *_) in results.content["workloads"].items() if of == part and what not in measured]
    return error or (f"no time left for {', '.join(missing)}" if missing else None)


def _programs(path: pathlib.Path, part: Part) -> pathlib.Path:
    """Where compiled programs are kept: a start without any, and the one after it, share a directory of their own."""
    return path.parent / "programs" / ("start" if part.in_own_process else "all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; 1 if a part failed or an aim is missed."""
    parser = report.parser("bench.device", __doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and small sizes, on any device")
    parser.add_argument("--only", help=f"measure these again: {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="end after this many")
    parser.add_argument("--restart", action="store_true", help="discard figures of earlier runs")
    parser.add_argument("--out", type=pathlib.Path, help="directory of device.json; by default bench/results")
    parsed = parser.parse_args(arguments)
    directory = parsed.out or (report.ROOT / "build" / "device" if parsed.tiny else report.RESULTS)
    directory.mkdir(parents=True, exist_ok=True)
    results = Results(directory / "device.json", parsed.restart)
    names = [part.name for part in PARTS]
    wanted = [name.strip() for name in parsed.only.split(",")] if parsed.only else names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--only: found {unknown[0]!r}; expected one of {', '.join(names)}")
    done = {name for name, part in results.content["parts"].items() if part["error"] is None and not parsed.only}
    measure([p for p in PARTS if p.name in wanted and p.name not in done], results, parsed.tiny, parsed.seconds)
    content, out = results.content, report.console()
    if not content["machine"]:
        return 1
    judged = table.tables(content)
    out.print(*judged)
    failed = any(part["error"] for part in content["parts"].values())
    content["passed"] = not failed and not any("FAIL" in cell for row in judged[0].rows for cell in row)
    results.write()
    out.print(f"written to {results.path}", soft_wrap=True)
    return 0 if content["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
