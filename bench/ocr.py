"""GLM-OCR at its full size on a CPU, beside transformers 5.24: a page to its first token, and tokens a second.

    make .venv-5x
    python -m bench.ocr

A checkpoint of random weights in float32 (`glm4v convert synth --config GLM-OCR`), and the image of a page of text,
1,240 x 1,754 pixels: 2,772 tokens. Here the weights are in float32 and in int8; transformers has float32, scaled
dot-product attention, and bare forward passes, which are faster than its `generate`; `--bfloat16` measures it with
half of the bytes as well. Every variant is a process of its own on two threads, and they take turns. Decoding follows
the page, in rounds; the pixels are made before. The time to the first token is that of the first page of a
process, without compiling, which is read from disk after the first time.

Of speculative decoding with the checkpoint's MTP layer, which is kept and not run, this measures what random weights
can say: what a step costs that verifies a draft, and one of such a layer. Writes `bench/results/ocr.json`; exits with
status 1 if a target is missed.
"""

import pathlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw

from bench import report, turns

WIDTH, HEIGHT = 1240, 1754
TOKENS, ROUNDS = 8, 5
AIM = 1.5
BUFFER_MEGABYTES = 500
ACCEPTED = {"a receipt": 0.69, "a page": 0.81}
"""Fractions of drafts of one token that are published for GLM-OCR, by https://github.com/vllm-project/vllm/issues/37551."""
OURS = ("float32", "int8")


def draw_page(width: int = WIDTH, height: int = HEIGHT) -> PIL.Image.Image:
    """A page with lines of text, the same everywhere up to the font."""
    page = PIL.Image.new("RGB", (width, height), "white")
    draw = PIL.ImageDraw.Draw(page)
    for number, top in enumerate(range(height // 20, height - height // 20, 28)):
        draw.text((width // 12, top), f"{number:3}. " + "The quick brown fox jumps over the lazy dog. " * 3, "black")
    return page


def write_page(path: pathlib.Path, config: Any, page: PIL.Image.Image) -> int:
    """Write what a processor makes of a question about the page, in tokens without meaning; how many these are."""
    from glm4v_jax import Glm4vImageProcessor

    made = Glm4vImageProcessor()([page])
    merged = int(np.prod(made.image_grid_thw)) // config.vision_config.spatial_merge_size**2
    text = np.random.default_rng(0).integers(0, min(config.text_config.vocab_size, config.image_start_token_id), 16)
    ids = [*text[:6], config.image_start_token_id, *[config.image_token_id] * merged, config.image_end_token_id,
           *text[6:]]  # fmt: skip
    np.savez(
        path, input_ids=np.array([ids], np.int64), pixel_values=np.asarray(made.pixel_values, np.float32),
        image_grid_thw=np.asarray(made.image_grid_thw, np.int64),
    )  # fmt: skip
    return len(ids)


def run(
    workers: Mapping[str, Any], directory: pathlib.Path, page: pathlib.Path, rounds: int, threads: int
) -> dict[str, Any]:
    """Measure all variants; the first is the package's own in float32."""
    new_tokens = 2 + TOKENS * (rounds + 1)
    begun = turns.load_average()
    loads = {
        name: worker("load", directory=str(directory), page=str(page), new_tokens=new_tokens)
        for name, worker in workers.items()
    }
    pages = {name: worker("page") for name, worker in workers.items()}
    work = turns.TimedTask("decode", {"tokens": TOKENS})
    (times,) = turns.measure(workers, [dict.fromkeys(workers, work)], rounds)
    answers = {name: worker("answer") for name, worker in workers.items()}
    theirs = [turn["transformers"]["decode"] for turn in times]
    lines = []
    for name in workers:
        seconds = [turn[name]["decode"] for turn in times]
        compared = turns.compare(seconds, theirs, 1, AIM if name == "float32" else None)
        lines.append(
            {
                "variant": name,
                "weights": loads[name]["weights"],
                "load_seconds": loads[name]["seconds"],
                "first_token_seconds": pages[name]["seconds"],
                "compile_seconds": pages[name]["compile"],
                "peak": workers[name]("peak"),
                "tokens_per_second": compared["ours"],
                "equal_tokens": sum(a == b for a, b in zip(answers[name], answers["transformers"], strict=True)),
                **{key: compared[key] for key in ("ratio", "aim", "passed")},
            }
        )
    exact = workers["float32"]
    memory = {"weights": exact("decode_bytes"), "cache": exact("cache_bytes")}
    memory |= exact("bandwidth", megabytes=BUFFER_MEGABYTES, threads=threads)
    equal = lines[0]["equal_tokens"] == len(answers["float32"])
    return {
        "machine": {side: workers[side]("facts") for side in ("float32", "transformers")},
        "threads": threads,
        "rounds": rounds,
        "load_before": begun,
        "prompt_tokens": int(np.load(page)["input_ids"].size),
        "patches": int(np.load(page)["pixel_values"].shape[0]),
        "new_tokens": len(answers["float32"]),
        "lines": lines,
        "memory": memory,
        "drafts": [draft_costs(name, workers[name], rounds) for name in OURS if name in workers],
        "same_greedy_answer": equal,
        "passed": equal and all(line["passed"] for line in lines),
    }


def draft_costs(name: str, worker: Any, rounds: int) -> dict[str, Any]:
    """What steps of one and of two tokens cost, and of an MTP layer, in turns; when a draft of one token would pay.

    A draft costs a step of the layer, and the step that verifies it runs two tokens: with a fraction p of drafts
    accepted, 1 + p tokens come for the price of both.
    """
    worker("free")
    works = {"one": {"tokens": 1}, "two": {"tokens": 2}, "layer": {"tokens": 1, "mtp": True}}
    tasks = [{name: turns.TimedTask("steps", arguments)} for arguments in works.values()]
    found = turns.measure({name: worker}, tasks, rounds)
    times = {work: [turn[name]["step"] for turn in each] for work, each in zip(works, found, strict=True)}
    each = list(zip(*times.values(), strict=True))
    return {
        "variant": name,
        **{f"{work}_ms": 1e3 * statistics.median(seconds) for work, seconds in times.items()},
        "pays_above": turns.spread([(two + layer) / one - 1 for one, two, layer in each]),
        "speed": {
            what: turns.spread([(1 + accepted) * one / (two + layer) for one, two, layer in each])
            for what, accepted in ACCEPTED.items()
        },
    }


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """Speed, and what drafts would cost."""
    versions = "jax {jax}, ".format_map(figures["machine"]["float32"]) + "torch {torch}, transformers {transformers}"
    title = (
        f"{versions.format_map(figures['machine']['transformers'])}; {figures['patches']:,} patches, "
        f"{figures['prompt_tokens']:,} tokens, {figures['threads']} threads, {figures['rounds']} rounds"
    )
    speed = report.Table(
        title,
        ("weights in", "MB", "first token, s", "compiled in, s", "tokens/s", "peak MB", "equal tokens", "ratio", "aim",
         ""),
        [
            (
                line["variant"], f"{line['weights'] / 1e6:,.0f}", f"{line['first_token_seconds']:.1f}",
                f"{line['compile_seconds']:.1f}", f"{line['tokens_per_second']['median']:.2f}",
                f"{line['peak'] / 1e6:,.0f}", f"{line['equal_tokens']} of {figures['new_tokens']}",
                *report.judged(line),
            )
            for line in figures["lines"]
        ],
    )  # fmt: skip
    drafts = report.Table(
        "milliseconds of a decode step, and of an MTP layer's",
        ("weights in", "1 token, ms", "2 tokens, ms", "MTP layer, ms", "pays above",
         *(f"speed on {what}" for what in ACCEPTED)),
        [
            (
                line["variant"], *(f"{line[f'{work}_ms']:.1f}" for work in ("one", "two", "layer")),
                "{median:.0%} [{min:.0%}, {max:.0%}]".format_map(line["pays_above"]),
                *(f"x {line['speed'][what]['median']:.2f}" for what in ACCEPTED),
            )
            for line in figures["drafts"]
        ],
    )  # fmt: skip
    return [speed, drafts]


def main() -> int:
    """Measure, print, write; 1 if a target is missed."""
    parser = report.parser("bench.ocr", __doc__)
    parser.add_argument("--theirs-python", default=".venv-5x/bin/python", help="interpreter with transformers 5.24")
    parser.add_argument("--tiny", action="store_true", help="measure the tiny model, to try this program")
    parser.add_argument("--checkpoint", help="a directory that has it already")
    parser.add_argument("--no-int8", action="store_true", help="measure the package in float32 alone")
    parser.add_argument("--bfloat16", action="store_true", help="measure transformers in bfloat16 as well")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(WIDTH, HEIGHT), metavar=("WIDTH", "HEIGHT"), help="of the page, in pixels"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measurements of each side, in turns")
    parser.add_argument("--threads", type=int, default=2, help="cores of each side")
    parser.add_argument("--name", default="ocr", help="of the file in bench/results")
    parsed = parser.parse_args()
    if shutil.which(parsed.theirs_python) is None:
        parser.error(f"--theirs-python: found no {parsed.theirs_python}; expected an interpreter (`make .venv-5x`)")
    from convert.synth import load_config, synth
    from glm4v_jax.config.model import Glm4vConfig

    sides = [("ours", sys.executable, name, name) for name in OURS if not (name == "int8" and parsed.no_int8)]
    sides.append(("theirs", parsed.theirs_python, "transformers", "float32"))
    if parsed.bfloat16:
        sides.append(("theirs", parsed.theirs_python, "transformers bfloat16", "bfloat16"))
    commands = {
        name: turns.command(
            "bench.ocr_sides", "--side", side, "--variant", weights, "--threads", parsed.threads, python=python
        )
        for side, python, name, weights in sides
    }
    with tempfile.TemporaryDirectory(prefix="glm4v_jax_ocr_") as directory, turns.start(commands) as workers:
        checkpoint = pathlib.Path(parsed.checkpoint or pathlib.Path(directory, "checkpoint"))
        if parsed.checkpoint is None:
            synth(load_config("GLM-OCR", tiny=parsed.tiny), checkpoint, dtype="float32")
        page = pathlib.Path(directory, "page.npz")
        write_page(page, Glm4vConfig.from_pretrained(checkpoint), draw_page(*parsed.size))
        figures = run(workers, checkpoint, page, parsed.rounds, parsed.threads)
    return report.finish(parsed.name, figures, *tables(figures))


if __name__ == "__main__":
    sys.exit(main())
