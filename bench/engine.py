"""What the engine costs beside the device's own work, and how full it keeps the batch.

Three figures of the packaged tiny model, for which the device's work is next to nothing and the host's shows:

- host time a decoding step: an engine's step less the bare decoding program's, the two taking turns;
- the share of slots that were busy over 200 prompts with answers of random lengths through 8 slots, and the same
  prompts in batches of 8 that wait for their longest;
- a process's start to its first answer, without and with compiled programs from the process before.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bench import report
from glm4v_jax.generate.engine import Engine, Request
from glm4v_jax.generate.prefill_chunks import Start
from glm4v_jax.generate.slots import MAX_STEPS, Slots
from glm4v_jax.tiny import TINY_CHECKPOINT

SLOTS, PROMPTS, STEPS, ROUNDS = 8, 200, 256, 7
CAPACITY = 512
MAX_HOST_MS = 0.2
MIN_BUSY = 0.9
GREEDY: dict[str, Any] = dict(do_sample=False, eos_token_id=-1)
WORDS = "a small brown dog sits on the green grass and looks at us while it rains in the old town"

COLD_START = """
import time; start = time.perf_counter()
import json, sys
import numpy as np
from glm4v_jax.generate.engine import Engine
from glm4v_jax.tiny import TINY_CHECKPOINT
engine = Engine.from_pretrained(TINY_CHECKPOINT)
loaded = time.perf_counter() - start
image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
prompt = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
stream = engine.stream(prompt, max_new_tokens=33, do_sample=False)
next(stream)
first = time.perf_counter() - start
for _ in stream:
    pass
print(json.dumps({"loaded": loaded, "first_token": first, "answer": time.perf_counter() - start}))
"""


def bare_step(engine: Engine, rows: int) -> float:
    """Seconds of a decoding step of the program alone, called with nothing done between calls."""
    config = engine.config(**GREEDY)
    slots = Slots(engine.runtime, rows, CAPACITY, pool=engine.pool)
    slots.start({row: Start(engine.prompt("Hi"), config, STEPS + 1) for row in range(rows)})
    slots.read(slots.decode(1))
    start, calls = time.perf_counter(), (STEPS - 1) // MAX_STEPS
    for _ in range(calls):
        jax.block_until_ready(slots.decode())
    return (time.perf_counter() - start) / (calls * MAX_STEPS)


def engine_step(engine: Engine, rows: int) -> float:
    """Seconds of a decoding step of the engine: the time between two answers of different lengths, a step."""
    seconds = []
    for new in (MAX_STEPS + 1, STEPS + 1):
        prompts = [engine.prompt("Hi")] * rows
        start = time.perf_counter()
        if rows == 1:
            engine.generate(prompts[0], max_new_tokens=new, **GREEDY)
        else:
            list(engine.generate_many(prompts, max_new_tokens=new, **GREEDY))
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (STEPS - MAX_STEPS)


def host_time(rows: int) -> dict[str, Any]:
    """Milliseconds a step, of the engine and of the program alone, in turns; medians and the spread."""
    loaded = Engine.from_pretrained(TINY_CHECKPOINT)
    engine = Engine(loaded.runtime, loaded.processor, num_slots=rows, capacity=CAPACITY)
    engine_step(engine, rows)
    bare_step(engine, rows)
    pairs = [(engine_step(engine, rows), bare_step(engine, rows)) for _ in range(ROUNDS)]
    hosts = [1e3 * (whole - bare) for whole, bare in pairs]
    return {
        "rows": rows,
        "steps_per_dispatch": MAX_STEPS,
        "engine_ms": statistics.median(1e3 * whole for whole, _ in pairs),
        "program_ms": statistics.median(1e3 * bare for _, bare in pairs),
        "host_ms": statistics.median(hosts),
        "host_ms_least": min(hosts),
        "host_ms_most": max(hosts),
    }


def busy_slots() -> dict[str, Any]:
    """Prompts and answers of random lengths through slots that are refilled, and in batches that wait."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS.split(), rng.integers(1, 40))) for _ in range(PROMPTS)]
    lengths = np.clip(rng.lognormal(4, 0.7, PROMPTS).astype(int), 4, 256).tolist()
    engine = Engine.from_pretrained(TINY_CHECKPOINT, num_slots=SLOTS)
    engine.warmup(prompt_lengths=(1, 256), max_new_tokens=256, one=False, progress=lambda _: None)
    requests = [Request(text, dict(max_new_tokens=n)) for text, n in zip(texts, lengths, strict=True)]

    start = time.perf_counter()
    found = list(engine.generate_many(requests, **GREEDY))
    refilled = time.perf_counter() - start
    stats = engine.stats
    assert sum(len(one.tokens) for one in found) == sum(lengths)
    busy = stats.busy_steps / stats.slot_steps

    # The same prompts in the same engine, eight at a time: every batch waits for its longest answer.
    before, start = stats.slot_steps, time.perf_counter()
    for i in range(0, PROMPTS, SLOTS):
        list(engine.generate_many(requests[i : i + SLOTS], **GREEDY))
    waiting = time.perf_counter() - start
    return {
        "prompts": PROMPTS,
        "slots": SLOTS,
        "new_tokens": sum(lengths),
        "longest": max(lengths),
        "busy": busy,
        "tokens_per_second": sum(lengths) / refilled,
        "busy_in_batches": (sum(lengths) - PROMPTS) / (stats.slot_steps - before),
        "tokens_per_second_in_batches": sum(lengths) / waiting,
        "ratio": waiting / refilled,
    }


def cold_start() -> dict[str, Any]:
    """A new process from its start to an image's answer, with an empty compilation cache and with a full one."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": directory, "PYTHONPATH": str(report.ROOT)}
        runs = []
        for _ in range(3):
            done = subprocess.run(
                [sys.executable, "-c", COLD_START], env=environment, capture_output=True, text=True, check=True
            )
            runs.append(json.loads(done.stdout))
    return {"empty_cache": runs[0], "full_cache": runs[1], "full_cache_again": runs[2]}


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """Host time, slots and starts."""
    slots, milliseconds = figures["slots"], ("engine_ms", "program_ms", "host_ms", "host_ms_least", "host_ms_most")
    hosts = [
        (host["rows"], *(f"{host[name]:.3f}" for name in milliseconds), report.verdict(host["host_ms"] <= MAX_HOST_MS))
        for host in figures["host"]
    ]
    busy = [
        ("refilled", f"{slots['busy']:.1%}", f"{slots['tokens_per_second']:,.0f}",
         report.verdict(slots["busy"] >= MIN_BUSY)),
        ("in batches", f"{slots['busy_in_batches']:.1%}", f"{slots['tokens_per_second_in_batches']:,.0f}", ""),
    ]  # fmt: skip
    starts = [
        (name.replace("_", " "), *(f"{run[key]:.2f}" for key in ("loaded", "first_token", "answer")))
        for name, run in figures["cold_start"].items()
    ]
    return [
        report.Table(
            f"milliseconds a decoding step, {MAX_STEPS} steps a call",
            ("rows", "engine", "program alone", "host", "least", "most", ""), hosts,
        ),
        report.Table(
            f"{slots['prompts']} prompts, {slots['new_tokens']} new tokens, the longest answer {slots['longest']}; "
            f"refilled slots are {slots['ratio']:.2f} times as fast",
            (f"{slots['slots']} slots", "busy", "tokens/s", ""), busy,
        ),
        report.Table(
            "seconds from a new process's start",
            ("compilation cache", "model loaded", "first token", "whole answer"), starts,
        ),
    ]  # fmt: skip


def main() -> int:
    """Measure, print, write; 1 if an aim is missed."""
    report.parser("bench.engine", __doc__).parse_args()
    hosts, slots = [host_time(rows) for rows in (1, SLOTS)], busy_slots()
    figures = {
        "machine": report.machine_facts("jax", "numpy"),
        "host": hosts,
        "slots": slots,
        "cold_start": cold_start(),
        "passed": all(host["host_ms"] <= MAX_HOST_MS for host in hosts) and slots["busy"] >= MIN_BUSY,
    }
    return report.finish("engine", figures, *tables(figures))


if __name__ == "__main__":
    sys.exit(main())
