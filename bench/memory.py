"""Does memory grow with the number of patches and tokens, or with its square? Peak resident memory for n, 2n and 4n.

    python -m bench.memory

A 4K image (24,576 patches) through a ViT of the released depth, and a prompt of 32,768 tokens through a decoder;
both narrow, so that scores [S, S] of a single layer would be most of the memory if anything kept them. Each
measurement is a process of its own, run twice: the first fills a cache of compiled programs, for the compiler's own
memory would hide the program's. Writes `bench/results/memory.json`; exits with status 1 if the growth is not linear.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench import report, turns
from glm4v_jax import Glm4vConfig, Glm4vForConditionalGeneration, Glm4vTextConfig, Glm4vVisionConfig, Glm4vVisionModel

MEGABYTE = 1_000_000
MAX_EXPONENT = 1.15
GRADIENT_DEPTH = 6
GRIDS = {1024: (32, 32), 3072: (48, 64), 6144: (64, 96), 12288: (96, 128), 24576: (128, 192)}
"""Patches -> rows and columns of an image of that many: the largest has 1,792 x 2,688 pixels."""


class Plan(NamedTuple):
    """What to measure: sizes n, 2n, 4n, and a small one that runs the same blocks and costs little but the process."""

    title: str
    baseline: int
    sizes: tuple[int, int, int]
    limited: bool
    """whether its growth decides the exit status"""


def vision_config() -> Glm4vVisionConfig:
    """The released depth, patches and position table; one narrow head."""
    return Glm4vVisionConfig(hidden_size=16, num_heads=1, out_hidden_size=32, intermediate_size=32)


def text_config() -> Glm4vTextConfig:
    """Two layers, as many query heads to a key head as make scores the largest thing by far."""
    return Glm4vTextConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=65536, partial_rotary_factor=0.5,
        rope_scaling={"mrope_section": (2, 3, 3)},
    )  # fmt: skip


def image(patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise for patches [patches, P], and its grid [1, 3]."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((patches, vision_config().patch_dim), np.float32)
    return values, np.array([[1, *GRIDS[patches]]])


def encode_image(patches: int) -> None:
    """One image through the ViT."""
    values, grid = image(patches)
    Glm4vVisionModel(vision_config())(values, grid).block_until_ready()


def differentiate_image(patches: int) -> None:
    """The gradient of one image through the ViT, blocks recomputed as in training."""
    import jax
    import jax.numpy as jnp

    from glm4v_jax.devices.mesh import use_mesh
    from glm4v_jax.inputs.medium import Medium
    from glm4v_jax.inputs.vision_rows import pack

    config = dataclasses.replace(vision_config(), depth=min(GRADIENT_DEPTH, vision_config().depth))
    values, grid = image(patches)
    rows, _ = pack([Medium(values, grid[0])], merge_size=config.spatial_merge_size, position_grid=config.position_grid)

    def loss(module: Any) -> Any:
        return jnp.sum(module(rows, remat="full") ** 2)

    with use_mesh():
        jax.block_until_ready(jax.jit(jax.grad(loss))(Glm4vVisionModel(config).module))


def read_prompt(tokens: int) -> None:
    """A prompt through prefill, and the first new token."""
    text = text_config()
    config = Glm4vConfig(
        text_config=text,
        vision_config=Glm4vVisionConfig(
            depth=1, hidden_size=16, num_heads=1, out_hidden_size=text.hidden_size, intermediate_size=16
        ),
        image_token_id=511, video_token_id=510, image_start_token_id=509, image_end_token_id=508,
        video_start_token_id=507, video_end_token_id=506,
    )  # fmt: skip
    prompt = np.random.default_rng(0).integers(0, 500, (1, tokens))
    Glm4vForConditionalGeneration(config).generate(prompt, max_new_tokens=1, eos_token_id=-1)


TASKS: dict[str, Callable[[int], None]] = {
    "image": encode_image,
    "prompt": read_prompt,
    "gradient": differentiate_image,
}
PLANS = {
    "image": Plan("patches of an image, ViT forward", 1024, (6144, 12288, 24576), True),
    "prompt": Plan("tokens of a prompt, prefill", 1024, (8192, 16384, 32768), True),
    "gradient": Plan(f"patches of an image, gradient of {GRADIENT_DEPTH} ViT layers", 1024, (3072, 6144, 12288), False),
}


def measure(task: str, size: int) -> tuple[int, float]:
    """Peak bytes and seconds of one task in a process of its own that finds its programs compiled."""
    with tempfile.TemporaryDirectory() as cache:
        settings = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for _ in range(2):
            start = time.perf_counter()
            printed = turns.printed_by("bench.memory", "--task", task, "--size", size, **settings)
        return int(printed), time.perf_counter() - start


def growth_exponent(sizes: Sequence[int], increments: Sequence[float], baseline: int = 0) -> float:
    """k of the least-squares fit `increment ~ (size - baseline)^k`: 1 is linear, 2 quadratic."""
    slope, _ = np.polyfit(np.log(np.subtract(sizes, baseline)), np.log(increments), 1)
    return float(slope)


def square_bytes(task: str, size: int) -> int:
    """What float32 scores [S, S] of one layer would take."""
    heads = text_config().num_attention_heads if task == "prompt" else vision_config().num_heads
    return 4 * heads * size**2


def run(task: str, plan: Plan) -> dict[str, Any]:
    """All sizes of one plan."""
    base, _ = measure(task, plan.baseline)
    peaks, seconds = zip(*(measure(task, size) for size in plan.sizes), strict=True)
    increments = [max(peak - base, 1) for peak in peaks]
    exponent = growth_exponent(plan.sizes, increments, plan.baseline)
    return {
        "what": plan.title,
        "baseline_size": plan.baseline,
        "baseline_bytes": base,
        "sizes": list(plan.sizes),
        "peak_bytes": list(peaks),
        "increment_bytes": increments,
        "square_bytes": [square_bytes(task, size) for size in plan.sizes],
        "seconds": list(seconds),
        "exponent": exponent,
        "limited": plan.limited,
        "passed": not plan.limited or exponent <= MAX_EXPONENT,
    }


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """One of each plan."""
    return [_table(figures[task]) for task in PLANS]


def _table(figures: Mapping[str, Any]) -> report.Table:
    lines = [
        ("the process", f"{figures['baseline_size']:,}", f"{figures['baseline_bytes'] / MEGABYTE:,.0f}", *[""] * 4)
    ]
    measured = ("sizes", "peak_bytes", "increment_bytes", "square_bytes", "seconds")
    for name, size, peak, more, square, seconds in zip(
        ("n", "2n", "4n"), *(figures[key] for key in measured), strict=True
    ):
        each = more / (size - figures["baseline_size"])
        megabytes = [f"{x / MEGABYTE:,.0f}" for x in (peak, more, square)]
        lines.append((name, f"{size:,}", *megabytes[:2], f"{each:,.0f}", megabytes[2], f"{seconds:.0f}"))
    aim = f"aim: at most {MAX_EXPONENT}, {'met' if figures['passed'] else 'MISSED'}"
    columns = (
        "", "size", "peak MB", "more than the process, MB", "bytes each", "scores [S, S] would be, MB", "seconds",
    )  # fmt: skip
    grows = f"grows like n^{figures['exponent']:.2f} ({aim if figures['limited'] else 'no aim'})"
    return report.Table(f"{figures['what']}: {grows}", columns, lines)


def main() -> int:
    """Measure, print, write; 1 if a growth is not linear."""
    parser = report.parser("bench.memory", __doc__)
    parser.add_argument("--task", choices=list(TASKS), help="do one task in this process and print its peak in bytes")
    parser.add_argument("--size", type=int, help="of that task")
    arguments = parser.parse_args()
    if arguments.task is not None:
        TASKS[arguments.task](arguments.size)
        print(turns.peak_bytes())
        return 0
    results = {task: run(task, plan) for task, plan in PLANS.items()}
    passed = all(found["passed"] for found in results.values())
    figures = {"machine": report.machine_facts("jax", "numpy"), **results, "passed": passed}
    return report.finish("memory", figures, *tables(figures))


if __name__ == "__main__":
    sys.exit(main())
