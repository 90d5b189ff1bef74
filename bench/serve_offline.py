"""A process that does a server's work through `Engine.generate_many`."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import report
from bench.serve_client import Body


@contextlib.contextmanager
def offline(directory: Path, slots: int, capacity: int) -> Iterator[Callable[[Sequence[Body]], dict[str, float]]]:
    """A process that does the same work through `Engine.generate_many`, in slots of the same size."""
    code = f"from bench.serve_offline import work_offline; work_offline({str(directory)!r}, {slots}, {capacity})"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=report.ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def work(bodies: Sequence[Body]) -> dict[str, float]:
            stdin.write(json.dumps(list(bodies)) + "\n")
            stdin.flush()
            return dict(json.loads(stdout.readline()))

        yield work
        stdin.close()


def work_offline(directory: str, slots: int, capacity: int) -> None:
    """Answer requests that come as lines of JSON, in batches; says what each batch took."""
    from glm4v_jax.generate.engine import Engine, Request

    engine = Engine.from_pretrained(directory, num_slots=slots)
    engine.reserve(capacity)
    for line in sys.stdin:
        requests = [Request(body["messages"], {"max_new_tokens": body["max_tokens"]}) for body in json.loads(line)]
        begun = time.perf_counter()
        tokens = sum(len(completion.tokens) for completion in engine.generate_many(requests))
        print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - begun}), flush=True)
