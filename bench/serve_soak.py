"""A server at saturation for minutes, with clients that leave and requests that are wrong; and with faults put into it.

    python -m bench.serve_soak 600
    python -m bench.serve_soak --faults

The soak: the packaged model's answers to a list of requests are asked for one by one first. Then three times as many
clients as slots ask at random; a fifth close their streams, one in twenty sends what is invalid. Every answer is
compared. Nothing may be compiled after that first pass, nothing restarted, and memory at the end must be that of the
first quarter.

The faults: an error in the decode program, one in a thread that prepares, a client that is killed, a full disk for the
log. What streams, what is asked next, and how long it takes until all is well again.

Writes `bench/results/serve_soak.json` or `bench/results/serve_faults.json`; exits with status 1 if something was lost.
"""

import asyncio
import collections
import functools
import itertools
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from bench import report, serve_client
from bench.report import Check
from bench.serve_client import Answer, Body, Client, Server, message
from glm4v_jax.tiny import TINY_CHECKPOINT
from glm4v_jax.tiny.digits import held_out

SLOTS, CONTEXT, REQUESTS = 8, 512, 32
LEAVING, INVALID, WHOLE = 0.2, 0.05, 0.3
"""Fractions of the requests: closed before their end, invalid, not streamed."""
MAX_GROWTH = 0.05
COMPILED = "Finished XLA compilation"
WRONG: Sequence[tuple[Body | bytes, int]] = (
    (b'{"model": ', 400),
    ({"messages": []}, 400),
    ({"messages": [{"role": "nobody", "content": "Hi"}]}, 400),
    ({"messages": [message("Hi")], "temperature": -1}, 400),
    ({"messages": [message("Hi")], "max_tokens": 10**9}, 400),
    ({"messages": [message("What?", "data:image/png;base64,AAAA")]}, 400),
    ({"messages": [message("What?", "http://127.0.0.1/cat.png")]}, 400),
    ({"messages": [message("What?", "file:///etc/passwd")]}, 400),
)
"""Bodies, and the status of the response."""
STREAMS = 4
Cause = Callable[[Client], Awaitable[None]]
DECODE, PREPARE = signal.SIGUSR1, signal.SIGUSR2
"""Signals that make the next dispatch, or the next preparation, fail."""


def requests(count: int = REQUESTS) -> list[Body]:
    """Digits to read, some of them sampled, and texts."""
    found: list[Body] = []
    for number, example in zip(range(count), itertools.cycle(held_out("reading")[:24]), strict=False):
        (shown,) = example.prompt
        parts = shown["content"]
        images = [serve_client.data_url(part["image"]) for part in parts if part["type"] == "image"]
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        sampled = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "seed": number} if number % 2 else {"temperature": 0}
        shown = message(text, *images) if number % 4 else message(f"Hello number {number}")
        found.append({"messages": [shown], "max_tokens": 8 + 3 * number, **sampled})
    return found


async def soak(client: Client, server: Server, bodies: Sequence[Body], seconds: float) -> dict[str, Any]:
    """Ask at random for this many seconds."""
    expected = [(await client.chat(body)).text for body in bodies]
    assert any(expected)
    whole = [(await client.send(body)).text for body in bodies]
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    begun, compiled, resident = time.perf_counter(), server.logged(COMPILED), list[int]()

    async def ask(rng: random.Random) -> None:
        kind, i = rng.random(), rng.randrange(len(bodies))
        if kind < INVALID:
            body, status = rng.choice(WRONG)
            answer = await client.send(body)
            counts["invalid"] += 1
            if answer.status not in (status, 429):
                wrong.append(f"{str(body)[:60]}: {answer.status}, not {status}: {answer.error}")
            return
        if kind < INVALID + LEAVING:
            answer = await client.chat(bodies[i], leave_after=rng.randrange(3))
            counts["left"] += 1
            if answer.status in (0, 200) and not expected[i].startswith(answer.text):
                wrong.append(f"request {i}, left: {answer.text!r}, not the beginning of {expected[i]!r}")
            return
        is_whole = kind > 1 - WHOLE
        answer = await (client.send(bodies[i]) if is_whole else client.chat(bodies[i]))
        if answer.status == 429:
            counts["refused"] += 1
            await asyncio.sleep(0.1)
            return
        counts["answered"] += 1
        if answer.status != 200 or answer.text != (whole if is_whole else expected)[i]:
            wrong.append(f"request {i}: {answer.status} {answer.text!r} {answer.error}, not {expected[i]!r}")

    async def loop(seed: int) -> None:
        rng = random.Random(seed)
        while time.perf_counter() - begun < seconds:
            await ask(rng)

    async def watch() -> None:
        for share in (0.25, 0.5, 0.75, 1.0):
            await asyncio.sleep(max(0.0, begun + share * seconds - time.perf_counter()))
            resident.append(server.resident_bytes())

    await asyncio.gather(watch(), *(loop(seed) for seed in range(3 * SLOTS)))
    elapsed, idle = time.perf_counter() - begun, await _until_idle(client, 0)
    metrics = await client.metrics()
    return {
        "seconds": elapsed,
        "counts": dict(counts),
        "wrong": wrong[:10],
        "num_wrong": len(wrong),
        "resident_bytes": resident,
        "growth": resident[-1] / resident[0] - 1,
        "restarts": metrics["glm4v:engine_restarts_total"],
        "compilations": server.logged(COMPILED) - compiled,
        "seconds_until_idle": idle,
        "metrics": metrics,
    }


async def _until_idle(client: Client, running: int, limit: float = 10.0) -> float:
    """Seconds until no more than `running` sequences are left; infinite after `limit`."""
    begun = time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < limit:
        metrics = await client.metrics()
        if metrics["glm4v:num_requests_running"] <= running and not metrics["glm4v:num_requests_waiting"]:
            return elapsed
        await asyncio.sleep(0.02)
    return float("inf")


def options(directory: pathlib.Path, log: str = "serve.log", main: str = "glm4v_jax") -> Server:
    """A server of the packaged model, which logs what it compiles."""
    return serve_client.serve(
        TINY_CHECKPOINT, directory / log, "--slots", SLOTS, "--max-model-len", CONTEXT, main=main, JAX_LOG_COMPILES="1"
    )


def run_soak(seconds: float) -> int:
    """Run, print, write; 1 if anything was lost."""
    bodies = requests()
    with tempfile.TemporaryDirectory(prefix="glm4v_jax_soak_") as name, options(pathlib.Path(name)) as server:
        found = serve_client.run(lambda client: soak(client, server, bodies, seconds), server)
    growth, idle = found["growth"], found["seconds_until_idle"]
    checks = [
        Check("answers that are wrong", found["num_wrong"], 0, not found["num_wrong"]),
        Check("growth of memory", f"{growth:+.1%}", f"{MAX_GROWTH:.0%}", growth <= MAX_GROWTH),
        Check("restarts", found["restarts"], 0, not found["restarts"]),
        Check("compilations", found["compilations"], 0, not found["compilations"]),
        Check("seconds until idle", f"{idle:.2f}", "1", idle < 1),
    ]
    title = f"{found['seconds']:.0f} s: " + ", ".join(f"{count} {kind}" for kind, count in found["counts"].items())
    figures = {"machine": report.machine_facts("jax"), **found, "passed": report.all_pass(checks)}
    return report.finish("serve_soak", figures, report.check_table(title, checks), *found["wrong"])


async def fault(client: Client, *, server: Server, cause: Cause) -> dict[str, Any]:
    """Put a fault into the server while some stream; returns what the streams and the next requests got."""
    streaming = {"messages": [message("Tell me")], "max_tokens": CONTEXT - 100, "temperature": 1.5, "ignore_eos": True}
    streams = [asyncio.create_task(client.chat({**streaming, "seed": i})) for i in range(STREAMS)]
    while (await client.metrics())["glm4v:num_requests_running"] < STREAMS and not any(t.done() for t in streams):
        await asyncio.sleep(0.01)
    begun = time.perf_counter()
    await cause(client)
    next_one = await client.send({"messages": [message("Hi")], "max_tokens": 2})
    last = next_one
    while last.status != 200 and time.perf_counter() - begun < 30:
        last = await client.send({"messages": [message("Hi")], "max_tokens": 2})
    recovered = time.perf_counter() - begun if last.status == 200 else float("inf")
    answers = await asyncio.gather(*streams)
    return {
        "streams": _told(answers),
        "next": _told([next_one]),
        "seconds": recovered,
        "restarts": (await client.metrics())["glm4v:engine_restarts_total"],
        "is_alive": server.process.poll() is None,
    }


def _told(answers: Sequence[Answer]) -> str:
    counts = collections.Counter(f"{answer.status or 'broken'} {answer.error}".strip() for answer in answers)
    return "; ".join(f"{count} x {what}" for what, count in counts.items())


async def kill_a_client(client: Client, server: Server) -> None:
    """Have a process read a stream, kill it, and wait until its row is free."""
    running = (await client.metrics())["glm4v:num_requests_running"]
    code = (
        "import asyncio, sys\nfrom bench.serve_client import Client, message\n"
        "body = {'messages': [message('Tell me')], 'max_tokens': 400, 'ignore_eos': True}\n"
        f"asyncio.run(Client({server.url!r}).chat(body))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=report.ROOT) as process:
        while (await client.metrics())["glm4v:num_requests_running"] <= running and process.poll() is None:
            await asyncio.sleep(0.005)
        process.kill()
    await _until_idle(client, int(running))


def run_faults() -> int:
    """Run, print, write; 1 if a server did not recover."""
    found: dict[str, Mapping[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="glm4v_jax_faults_") as name:
        directory = pathlib.Path(name)
        with options(directory, main="bench.serve_soak") as server:

            async def signalled(number: signal.Signals) -> None:
                server.process.send_signal(number)

            causes: dict[str, Cause] = {
                "error in the decode program": lambda _: signalled(DECODE),
                "error in a thread that prepares": lambda _: signalled(PREPARE),
                "client killed": lambda client: kill_a_client(client, server),
            }
            for title, cause in causes.items():
                found[title] = serve_client.run(functools.partial(fault, server=server, cause=cause), server)
        full = pathlib.Path("/dev/full")
        if full.exists():
            (directory / "full").symlink_to(full)
            with options(directory, "full") as server:
                nothing: Cause = lambda _: asyncio.sleep(0)  # noqa: E731
                found["no room for the log"] = serve_client.run(
                    functools.partial(fault, server=server, cause=nothing), server
                )
    report.console().print(
        report.Table(
            f"faults while {STREAMS} requests stream",
            ("fault", "streams", "next request", "seconds until an answer", "restarts"),
            [
                (title, line["streams"], line["next"], f"{line['seconds']:.2f}", f"{line['restarts']:.0f}")
                for title, line in found.items()
            ],
        )
    )
    passed = all(line["is_alive"] and line["seconds"] < 30 for line in found.values())
    return report.finish("serve_faults", {"faults": found, "passed": passed})


def serve_with_faults() -> None:
    """Run `glm4v` with two signals that make the next dispatch, or the next preparation, fail."""
    from glm4v_jax.cli.main import main as cli
    from glm4v_jax.generate.engine import Engine
    from glm4v_jax.generate.slots import Slots

    waiting: set[int] = set()

    def failing(number: signal.Signals, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if number in waiting:
                waiting.discard(number)
                raise RuntimeError("a fault")
            return function(*args, **kwargs)

        signal.signal(number, lambda *_: waiting.add(number))
        return call

    Slots.decode = failing(DECODE, Slots.decode)  # type: ignore[method-assign]
    Engine.prompt = failing(PREPARE, Engine.prompt)  # type: ignore[method-assign]
    sys.exit(cli(sys.argv[1:]))


def main() -> int:
    """Do one of the two."""
    if "serve" in sys.argv[1:2]:
        serve_with_faults()
    parser = report.parser("bench.serve_soak", __doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=600, help="to ask for")
    parser.add_argument("--faults", action="store_true", help="put faults into a server instead")
    arguments = parser.parse_args()
    return run_faults() if arguments.faults else run_soak(arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
