"""Does a new image size, a new number of images, a new prompt length compile anything? After warm-up, nothing may.

    python -m bench.recompile

Warms a small model up, then sends requests with random images, videos and texts through processor and `generate`, and
counts every compilation of XLA's, small eager operations included. Prints also how much of the vision rows and of the
prompts is padding. Writes `bench/results/recompile.json`; exits with status 1 if something was compiled, or more than
a quarter of the vision tokens is padding.
"""

import collections
import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bench import report
from bench.report import Check
from glm4v_jax import Glm4vForConditionalGeneration, Glm4vProcessor, make_batch
from glm4v_jax.devices.program_limit import COMPILED
from glm4v_jax.generate.warmup import warmup
from glm4v_jax.inputs.vision_waves import medium_shape, wave_size
from glm4v_jax.tiny import TINY_CHECKPOINT

REQUESTS = 40
MAX_PADDED_SHARE = 0.25

PROMPT_LENGTHS = (1, 3072)
VISION_PATCHES = (4, 8192)
NEW_TOKENS = 8
SIDES = (32, 580)
"""Pixels: four images and a video of the longest sides are within `VISION_PATCHES`, and their prompt is within
`PROMPT_LENGTHS`."""
FRAMES_PER_SECOND = 8
WORDS = "what who where is are there the a this that of in on picture video cat street red many describe count ?"


class Compilations:
    """Names of the programs that XLA compiles from now on."""

    def __init__(self) -> None:
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **details: Any) -> None:
        if event == COMPILED:
            self.names.append(str(details.get("fun_name", "unnamed")))


@dataclasses.dataclass
class RequestFacts:
    """What one request took."""

    images: int
    videos: int
    prompt_tokens: int
    prompt_bucket: int
    patches: int
    row_patches: int
    """patches and padding of the vision rows, rows that stay empty included"""
    calls: int
    """of the vision encoder"""
    seconds: float
    compiled: list[str]


def random_messages(rng: np.random.Generator) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A conversation of 0-4 images, 0-1 videos and text in random order; and what its video's frames need."""
    content: list[dict[str, Any]] = []
    for _ in range(rng.integers(5)):
        height, width = rng.integers(*SIDES, 2)
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        content.append({"type": "image", "image": image})
    options = {}
    if rng.random() < 0.4:
        frames, (height, width) = rng.integers(8, 40), rng.integers(40, 200, 2)
        video = rng.integers(0, 256, (frames, height, width, 3), np.uint8)
        content.append({"type": "video", "video": video})
        seconds = float(frames / FRAMES_PER_SECOND)
        options["video_metadata"] = [
            {"total_num_frames": int(frames), "fps": FRAMES_PER_SECOND, "duration": seconds, "video_backend": "numpy"}
        ]
    words = rng.choice(WORDS.split(), int(np.exp(rng.uniform(0, np.log(300)))))
    content.append({"type": "text", "text": " ".join(words)})
    order = rng.permutation(len(content))
    return [{"role": "user", "content": [content[i] for i in order]}], options


def send(
    model: Glm4vForConditionalGeneration,
    processor: Glm4vProcessor,
    rng: np.random.Generator,
    compilations: Compilations,
) -> RequestFacts:
    """One random request through processor and model."""
    messages, options = random_messages(rng)
    kinds = collections.Counter(item["type"] for item in messages[0]["content"])
    before, start = len(compilations.names), time.perf_counter()
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    model.generate(**inputs, max_new_tokens=NEW_TOKENS, eos_token_id=-1)
    seconds, compiled = time.perf_counter() - start, compilations.names[before:]
    batch, _ = make_batch(
        inputs["input_ids"],
        model.config,
        **{key: inputs[key] for key in inputs if key.startswith(("pixel", "image_", "video_"))},
    )
    grids = [grid for name in ("image_grid_thw", "video_grid_thw") for grid in inputs.get(name, ())]
    shapes = collections.Counter(medium_shape(grid, 1) for grid in grids)
    calls = {shape: -(-count // wave_size(shape, 1)) for shape, count in shapes.items()}
    return RequestFacts(
        images=kinds["image"],
        videos=kinds["video"],
        prompt_tokens=int(batch.segment_ids.sum()),
        prompt_bucket=batch.input_ids.shape[1],
        patches=sum(int(np.prod(grid)) for grid in grids),
        row_patches=sum(count * wave_size(shape, 1) * math.prod(shape) for shape, count in calls.items()),
        calls=sum(calls.values()),
        seconds=seconds,
        compiled=compiled,
    )


def padded_share(real: int, padded: int) -> float:
    """The share of `padded` that is not `real`."""
    return 1 - real / padded if padded else 0.0


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """The programs of the warm-up, and the requests."""
    warmed = figures["warmup"]
    lines = {name: [one for one in warmed["programs"] if one["program"] == name]
             for name in dict.fromkeys(one["program"] for one in warmed["programs"])}  # fmt: skip
    programs = [
        (name, len(some), f"{sum(one['seconds'] for one in some):.1f}", "; ".join(one["shape"] for one in some))
        for name, some in lines.items()
    ]
    requests = [
        (
            number, *(one[name] for name in ("images", "videos", "prompt_tokens", "prompt_bucket", "patches")),
            one["calls"] or "", f"{padded_share(one['patches'], one['row_patches']):.0%}" if one["calls"] else "",
            f"{one['seconds']:.2f}", len(one["compiled"]),
        )
        for number, one in enumerate(figures["requests"], start=1)
    ]  # fmt: skip
    ranges = "prompts of {}-{} tokens, {}-{} patches".format(*PROMPT_LENGTHS, *VISION_PATCHES)
    return [
        report.Table(
            f"warm-up: {ranges}, {NEW_TOKENS} new tokens: {warmed['compilations']} compilations in "
            f"{warmed['seconds']:.1f} s",
            ("program", "shapes", "seconds", "which"), programs,
        ),
        report.Table(
            f"{len(requests)} requests",
            ("request", "images", "videos", "prompt", "bucket", "patches", "calls", "padding", "seconds", "compiled"),
            requests,
        ),
    ]  # fmt: skip


def main() -> int:
    """Warm up, send, print, write; 1 if anything was compiled or too much padded."""
    parser = report.parser("bench.recompile", __doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of random images and videos")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    arguments = parser.parse_args()
    compilations, rng = Compilations(), np.random.default_rng(arguments.seed)
    processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    model = Glm4vForConditionalGeneration.from_pretrained(TINY_CHECKPOINT)

    loaded, start = len(compilations.names), time.perf_counter()
    done = warmup(model, prompt_lengths=PROMPT_LENGTHS, vision_patches=VISION_PATCHES, max_new_tokens=NEW_TOKENS)
    warm_seconds, warm_compiled = time.perf_counter() - start, len(compilations.names) - loaded
    requests = [send(model, processor, rng, compilations) for _ in range(arguments.requests)]
    compiled = collections.Counter(name for request in requests for name in request.compiled)
    vision = padded_share(sum(r.patches for r in requests), sum(r.row_patches for r in requests))
    text = padded_share(sum(r.prompt_tokens for r in requests), sum(r.prompt_bucket for r in requests))
    checks = [
        Check("compilations after warm-up", f"{compiled.total()} {dict(compiled) or ''}", 0, not compiled),
        Check("padding among vision tokens", f"{vision:.1%}", f"{MAX_PADDED_SHARE:.0%}", vision <= MAX_PADDED_SHARE),
        Check("padding among text tokens", f"{text:.1%}"),
    ]
    figures = {
        "machine": report.machine_facts("jax", "numpy"),
        "warmup": {"compilations": warm_compiled, "seconds": warm_seconds, "programs": [w._asdict() for w in done]},
        "requests": [dataclasses.asdict(request) for request in requests],
        "compilations_after_warmup": dict(compiled),
        "padded_share_vision": vision,
        "padded_share_text": text,
        "passed": report.all_pass(checks),
    }
    return report.finish("recompile", figures, *tables(figures), report.check_table("after warm-up", checks))


if __name__ == "__main__":
    sys.exit(main())
