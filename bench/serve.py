"""`glm4v serve` under load: speed beside `generate_many`, long prompts that join, and prefixes that requests share.

    python -m bench.serve

Two models, of random weights that write a known text: one of the packaged model's size and one of 250 million
parameters. The server, the clients, and what does the same work through `Engine.generate_many`, are processes of their
own.

- Closed loops of 1, as many clients as slots, and three times as many; an open loop at 70% of the requests per second
  that the last one reached.
- At saturation, tokens per second beside those of `generate_many`, in turns.
- Streams while prompts of 2,048 tokens join, beside the same streams alone: the time between two pieces of a text.
- Time to the first text of a conversation's second turn, and of requests that share a system prompt and an image,
  beside that of requests of the same lengths that share nothing.

Writes `bench/results/serve.json`; exits with status 1 if a target is missed. `--quick` runs all of it on the tiny model
with few requests, judges nothing but the answers and writes nothing. `bench/serve_soak.py` has the soak and the faults.
"""

import asyncio
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from bench import models, report, serve_client, turns
from bench.report import Check
from bench.serve_client import Answer, Body, Client, closed_loop, message, open_loop
from glm4v_jax.errors import counted
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.tiny import TINY_CHECKPOINT

ROUNDS = 3
MAX_PATCHES = 256
"""Of an image: those of the measurement have 96."""
SHARE = 0.7
"""Of the requests per second at saturation, in the open loop."""
MIN_OF_OFFLINE, MAX_STALL, MIN_SOONER = 0.85, 3.0, 3.0
WORDS = "a small brown dog sits on the green grass and looks at us while it rains in the old town by the sea"


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and how much it is asked."""

    name: str
    config: dict[str, Any]
    slots: int
    requests: int
    context: int
    long_prompt: int
    prefix: int
    streamed: int
    turns: int
    rounds: int = ROUNDS
    is_warmed: bool = True
    prompts: tuple[int, int] = (32, 160)
    answers: tuple[int, int] = (24, 96)


TINY = Size(
    "tiny", models.PACKAGED, slots=8, requests=160, context=4096, long_prompt=2048, prefix=1500, streamed=400,
    turns=20,
)  # fmt: skip
LARGE = Size(
    "250M", models.INFERENCE, slots=4, requests=24, context=4096, long_prompt=2048, prefix=1500,
    streamed=160, turns=5, rounds=2,
)  # fmt: skip
QUICK = dataclasses.replace(
    TINY, config=models.SHALLOW, slots=4, requests=8, context=256, long_prompt=112, prefix=112, streamed=30, turns=2,
    rounds=1, is_warmed=False, prompts=(24, 27), answers=(8, 24),
)  # fmt: skip


def write_model(directory: pathlib.Path, config: dict[str, Any]) -> pathlib.Path:
    """A checkpoint that answers every prompt with the same long text, greedily, and never ends it."""
    processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    decode, vocab = processor.tokenizer.decode, config["text_config"]["vocab_size"]
    prompt = processor.apply_chat_template([message("Hi")], add_generation_prompt=True, tokenize=True, return_dict=True)
    last = int(prompt["input_ids"][0][-1])
    shown = [token for token in range(models.PACKAGED["text_config"]["vocab_size"]) if decode([token]).isalpha()]
    chain = np.array([last, *shown, *sorted({*range(vocab)} - {last, *shown})])
    successors = np.empty_like(chain)
    successors[chain] = np.roll(chain, -1)
    models.write_checkpoint(directory, config, processor=True, successors=successors)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):  # few shapes to compile ahead
        settings = json.loads((directory / name).read_text(encoding="utf-8"))
        settings["size"]["longest_edge"] = 2 * 14 * 14 * MAX_PATCHES
        (directory / name).write_text(json.dumps(settings), encoding="utf-8")
    options = {"do_sample": False, "eos_token_id": [vocab - 1]}  # the last of the chain
    (directory / "generation_config.json").write_text(json.dumps(options), encoding="utf-8")
    return directory


class Prompts:
    """Random prompts of given lengths."""

    def __init__(self, seed: int = 0):
        """`seed`: of the words."""
        self._rng = np.random.default_rng(seed)
        self._encode = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT).tokenizer.encode

    def text(self, tokens: int) -> str:
        """Words of about this many tokens; the first differ from text to text, so that nothing is shared."""
        words = [str(self._rng.integers(10**9)), *self._rng.choice(WORDS.split(), tokens)]
        each = len(self._encode(" ".join(words))) / len(words)
        return " ".join(words[: max(2, round(tokens / each))])

    def image(self) -> str:
        """A data URL."""
        return serve_client.data_url(PIL.Image.fromarray(self._rng.integers(0, 256, (112, 168, 3), np.uint8)))

    def chat(self, size: Size) -> Body:
        """A request of random lengths; one in four shows an image."""
        images = [self.image()] if self._rng.random() < 0.25 else []
        text = self.text(int(self._rng.integers(*size.prompts)))
        return body([message(text, *images)], int(self._rng.integers(*size.answers)))


def body(messages: Sequence[dict[str, Any]], max_tokens: int) -> Body:
    """A chat request."""
    return {"model": "glm4v", "messages": list(messages), "max_tokens": max_tokens}


async def loads(client: Client, bodies: Sequence[Body], size: Size) -> dict[str, Any]:
    """Closed loops, and an open one."""
    found = {}
    for clients in (1, size.slots, 3 * size.slots):
        some = bodies[: max(size.slots, len(bodies) * min(clients, size.slots) // size.slots)]
        found[counted(clients, "client")] = serve_client.summary(*await closed_loop(client, some, clients))
    rate = SHARE * found[counted(3 * size.slots, "client")]["requests_per_second"]
    found[f"{rate:.1f} requests/s"] = serve_client.summary(*await open_loop(client, bodies, rate))
    return found


async def joining(client: Client, size: Size, prompts: Prompts) -> dict[str, Any]:
    """Streams in all slots but one, alone and while long prompts come into that one."""

    async def streams(begun: Callable[[], None] | None = None) -> list[Answer]:
        bodies = [body([message(prompts.text(size.prompts[0]))], size.streamed) for _ in range(size.slots - 1)]
        return list(await asyncio.gather(*(client.chat(body, begun=begun) for body in bodies)))

    alone = await streams()
    begun = list[None]()
    joined_streams = asyncio.create_task(streams(lambda: begun.append(None)))
    while len(begun) < size.slots - 1 and not joined_streams.done():
        await asyncio.sleep(0.001)
    long = list[Answer]()
    while not joined_streams.done():
        long.append(await client.chat(body([message(prompts.text(size.long_prompt))], 2)))
    joined = await joined_streams
    sides = {"alone": alone, "joined": joined}
    # From when all of them stream: before, they wait for each other's prompts.
    gaps = {name: serve_client.quantiles(serve_client.gaps_after_all_began(answers)) for name, answers in sides.items()}
    return {
        **gaps,
        "joining_prompts": len(long),
        "longest_ms": {name: 1e3 * max(gap for a in answers for gap in a.gaps) for name, answers in sides.items()},
        "prompt_tokens": size.long_prompt,
        "first_ms": serve_client.quantiles([answer.first for answer in long]),
        "failed": sum(answer.status != 200 for answer in (*alone, *joined, *long)),
        "ratio": gaps["joined"]["p99"] / gaps["alone"]["p99"],
    }


async def prefixes(client: Client, size: Size, prompts: Prompts) -> dict[str, Any]:
    """First text of second turns, and of requests with a system prompt and an image in common; and with nothing."""

    async def turn(history: list[dict[str, Any]]) -> tuple[Answer, list[dict[str, Any]]]:
        answer = await client.chat(body(history, 8))
        return answer, [*history, {"role": "assistant", "content": answer.text}, message(prompts.text(24))]

    async def shown(system: str, image: str) -> Answer:
        return await client.chat(body([{"role": "system", "content": system}, message(prompts.text(24), image)], 8))

    first, second, shared, unshared = list[Answer](), list[Answer](), list[Answer](), list[Answer]()
    system, image = prompts.text(size.prefix), prompts.image()
    await shown(system, image)
    for _ in range(size.turns):
        answer, history = await turn([message(prompts.text(size.prefix))])
        first.append(answer)
        second.append((await turn(history))[0])
        shared.append(await shown(system, image))
        unshared.append(await shown(prompts.text(size.prefix), prompts.image()))
    found: dict[str, Any] = {"prefix_tokens": size.prefix}
    for name, reused, new in (("second turn", second, first), ("shared image and system prompt", shared, unshared)):
        found[name] = {
            "first_ms": serve_client.median_first(reused),
            "unshared_first_ms": serve_client.median_first(new),
            "ratio": serve_client.median_first(new) / serve_client.median_first(reused),
            "failed": sum(answer.status != 200 for answer in (*reused, *new)),
        }
    return found


def measure(size: Size, directory: pathlib.Path) -> dict[str, Any]:
    """Everything about one model."""
    path, prompts = write_model(directory / size.name, size.config), Prompts()
    bodies = [prompts.chat(size) for _ in range(size.requests)]
    options = ["--slots", size.slots, "--max-model-len", size.context, "--served-model-name", "glm4v"]
    options += [] if size.is_warmed else ["--no-warmup"]
    with (
        turns.Worker("offline", turns.command("bench.serve_offline", path, size.slots, size.context)) as offline,
        serve_client.serve(path, directory / f"{size.name}.log", *options) as server,
    ):

        def saturated() -> dict[str, float]:
            answers, seconds = serve_client.run(lambda client: closed_loop(client, bodies, 3 * size.slots), server)
            return {"tokens": sum(answer.tokens for answer in answers), "seconds": seconds}

        offline("work", bodies=bodies), saturated()  # one of them compiles
        pairs = [(offline("work", bodies=bodies), saturated()) for _ in range(size.rounds)]
        assert all(mine["tokens"] == theirs["tokens"] for mine, theirs in pairs), pairs
        speeds = [[run["tokens"] / run["seconds"] for run in pair] for pair in pairs]
        return {
            "slots": size.slots,
            "parameters": models.num_parameters(size.config),
            "saturation": {
                "offline_tokens_per_second": statistics.median(speed for speed, _ in speeds),
                "tokens_per_second": statistics.median(speed for _, speed in speeds),
                "ratio": statistics.median(mine / theirs for theirs, mine in speeds),
            },
            "loads": serve_client.run(lambda client: loads(client, bodies, size), server),
            "joining": serve_client.run(lambda client: joining(client, size, prompts), server),
            "prefixes": serve_client.run(lambda client: prefixes(client, size, prompts), server),
            "metrics": serve_client.run(lambda client: client.metrics(), server),
        }


def checks(found: dict[str, Any]) -> list[Check]:
    """The aims of one model."""
    share, stall = found["saturation"]["ratio"], found["joining"]["ratio"]
    shared = {name: found["prefixes"][name]["ratio"] for name in ("second turn", "shared image and system prompt")}
    return [
        Check("tokens/s of generate_many's", f"{share:.0%}", f"{MIN_OF_OFFLINE:.0%}", share >= MIN_OF_OFFLINE),
        Check("p99 between tokens while long prompts join", f"{stall:.2f} x", f"{MAX_STALL:.0f} x", stall <= MAX_STALL),
        *(
            Check(f"first text, {name}", f"{ratio:.1f} x sooner", f"{MIN_SOONER:.0f} x", ratio >= MIN_SOONER)
            for name, ratio in shared.items()
        ),
    ]


def failures(found: dict[str, Any]) -> int:
    """Requests that were not answered."""
    groups = [
        *found["loads"].values(),
        found["joining"],
        *(x for x in found["prefixes"].values() if isinstance(x, dict)),
    ]
    return sum(group["failed"] for group in groups)


def tables(name: str, found: dict[str, Any]) -> list[report.Table]:
    """What was found of one model."""
    loads = [
        (
            load, line["requests"], f"{line['requests_per_second']:.2f}", f"{line['tokens_per_second']:.1f}",
            *(f"{line[kind][p]:.0f}" for kind in ("first_ms", "between_ms") for p in ("p50", "p99")), line["failed"],
        )
        for load, line in found["loads"].items()
    ]  # fmt: skip
    return [
        report.Table(
            f"{name}, {found['slots']} slots: milliseconds to the first text and between two pieces",
            ("load", "requests", "requests/s", "tokens/s", "first p50", "p99", "between p50", "p99", "failed"),
            loads,
        ),
        report.check_table(f"{name}: aims", checks(found)),
    ]


def main() -> int:
    """Measure, print, write; 1 if a target is missed."""
    parser = report.parser("bench.serve", __doc__)
    parser.add_argument("--quick", action="store_true", help="few requests to the tiny model; writes nothing")
    parser.add_argument("--only", choices=[TINY.name, LARGE.name], help="one of the models; writes nothing")
    arguments = parser.parse_args()
    sizes = [QUICK] if arguments.quick else [s for s in (TINY, LARGE) if arguments.only in (None, s.name)]
    out, results = report.console(), {}
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="glm4v_jax_serve_") as name:
            results[size.name] = measure(size, pathlib.Path(name))
        for table in tables(size.name, results[size.name]):
            out.print(table)
    answered = not any(map(failures, results.values()))
    if arguments.quick:
        return 0 if answered else 1
    passed = answered and all(report.all_pass(checks(found)) for found in results.values())
    if arguments.only:
        return 0 if passed else 1
    machine = report.machine_facts("jax", "numpy", "starlette", "uvicorn")
    return report.finish("serve", {"machine": machine, "models": results, "passed": passed})


if __name__ == "__main__":
    sys.exit(main())
