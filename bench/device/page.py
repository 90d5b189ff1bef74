"""docs/performance.md and its chart from bench/results/device.json: `python -m bench.device.page`, after a measurement.

Without that file the page has the workloads, their floors and aims, and says that nothing was measured.
"""

import html
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from bench import report
from bench.device import table, work
from bench.report import markdown
from glm4v_jax.generate.prefill_chunks import CHUNK

PAGE = report.ROOT / "docs" / "performance.md"
CHART = PAGE.with_suffix(".svg")
RESULTS = report.RESULTS / "device.json"
CHIPS = ("NVIDIA H100", "NVIDIA H200")

TEXT = """\
# Speed on accelerators

Written by `python -m bench.device.page`; change that program, not this page. What a CPU does, and what is compiled for
TPUs without having one, is in [Performance](guides/performance.md).

{state}

## How it is measured

- `python -m bench.device` measures on one accelerator of 80 GB or more, in nine minutes; `--only PART,...` some of
  it. Figures are kept as they come, a second run measures what is missing, and a part that fails is one line.
- `python -m bench.device.page` writes this page and the chart.
- For a machine without a network, `make device-wheels` fills `wheels/` on another one: 8 MB for Linux, x86-64 and
  Python 3.12, beside jax, flax, optax, orbax-checkpoint, safetensors and tokenizers. There,
  `python -m pip install --no-index --no-deps --target build/site wheels/*.whl`, and `PYTHONPATH=build/site:.` before
  the command.

GLM-4.1V-9B with random weights, made on the device by its own program; inputs are random too: some chips multiply
zeros faster. A time is the median of up to eight runs, each waited for, after two that compile and warm up.

What runs:

- **decode**: `generate.device_steps.decode`, greedy, for B = {batches}: {steps} steps a dispatch, {slots:,} cache slots
  a row, nearly all of them in use. One row also runs with the loop over layers unrolled: the loop slices stacked
  weights, which XLA may copy.
- **prefill**: a prompt of text in a row alone, from tokens on the host to the first new token on the device, in the
  engine's chunks of {chunk} tokens, and in longer ones.
- **int8**: both, with all kernels and the embedding in int8.
- **ViT**: `generate.encode_media.encode_wave` on rows that are on the device: 672 x 672 pixels ({patches:,} patches),
  an image of 4K, 64 small ones one after the other.
- **attention**: cuDNN on a GPU, the splash kernel on a TPU; and blocks of matrix products. Results and gradients are
  compared with attention in float32.
- **training**: a step with AdamW, in bfloat16, of {rows} rows of {length:,} tokens and {vision_rows} images of
  {vision_length:,} patches: LoRA on the whole decoder, and all weights of a model with {layers} of 40 layers.
- **requests**: `Engine.generate_many` over {requests:,} requests: {text:,} tokens of text, an image of {side} x {side}
  (256 tokens) that no other request has, {new} new tokens; {num_slots} at a time, images are prepared meanwhile. Fewer
  where the time is short; the table says how many.
- **cold start, warm start**: from the start of the process to the first token about an image, without the time that the
  weights take; without compiled programs on disk, and with them.

## Floors and aims

What a run reads from memory and computes at least: weights, keys and values once, products without padding and
recomputation. The floor is the longer of both at the chip's published rates; of requests it is their sum, since prefill
and decoding are different programs.

{floors}

## Figures

![Fractions of ceilings that workloads reach]({chart})

Blue is this package, gray are others (below), the orange marks are aims.

{figures}

## What others have published

{others}

Models, chips and lengths differ: these figures say what is possible, not who is faster.
"""


class Published(NamedTuple):
    """A figure of others: what it is a fraction of ("" for none), and where it stands."""

    what: str
    of: str
    fraction: float
    text: str
    source: str
    address: str


OTHERS = (
    Published(
        "Llama-3.1-70B, B = 8, 4,096 tokens, TPU v5e-16, JAX", "decode", 0.7812, "146 tokens/s a row, 78% of bandwidth",
        "jax-llm-examples", "https://github.com/jax-ml/jax-llm-examples/blob/main/llama3/README.md",
    ),
    Published(
        "Llama-2-7B, B = 1, A100 at 330 W, PyTorch", "decode", 1397.31 / 2039,
        "104.9 tokens/s, 1,397 GB/s: 69% of the chip's 2,039",
        "gpt-fast", "https://github.com/pytorch-labs/gpt-fast/blob/main/README.md",
    ),
    Published(
        "Llama-2-7B in int8, B = 1, A100 at 330 W, PyTorch", "decode", 1069.20 / 2039,
        "155.6 tokens/s, 1,069 GB/s: 52%",
        "gpt-fast", "https://github.com/pytorch-labs/gpt-fast/blob/main/README.md",
    ),
    Published(
        "MPT-7B, 2,048 tokens, 8 H100, PyTorch", "training", 0.4644, "46.4% MFU",
        "llm-foundry", "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md",
    ),
    Published(
        "MPT-7B, 4,096 tokens, recomputing, 8 H100, PyTorch", "training", 0.4042, "40.4% MFU",
        "llm-foundry", "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md",
    ),
    Published(
        "Qwen3-VL-32B, the same requests over HTTP, 4 chips of TPU v7x, JAX", "", 0, "15.5 requests/s",
        "sglang-jax", "https://github.com/sgl-project/sglang-jax/blob/main/docs/cookbook/autoregressive/Qwen/Qwen3-VL.md",
    ),
)  # fmt: skip

CEILINGS = {"decode": "of bandwidth", "prefill": "of the measured matmul rate", "training": "of published FLOP/s (MFU)"}


def read() -> dict[str, Any] | None:
    """The results; None where nothing was measured."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None


def page() -> str:
    """The page."""
    results, sizes = read(), work.FULL
    return TEXT.format(
        state=_state(results), batches=", ".join(map(str, sizes.batches)), steps=sizes.steps, slots=sizes.slots,
        chunk=CHUNK, patches=math.prod(sizes.images["672 x 672"]), rows=sizes.rows, length=sizes.length,
        layers=sizes.layers, vision_rows=sizes.vision_rows, vision_length=sizes.vision_length,
        requests=sizes.requests, text=sizes.text, side=14 * sizes.side, new=sizes.new, num_slots=sizes.num_slots,
        floors=_floors(), chart=CHART.name,
        figures="Not measured yet." if results is None else _figures(results),
        others=markdown(
            ("what", "published", "source"),
            ((one.what, one.text, f"[{one.source}]({one.address})") for one in OTHERS),
        ),
    )  # fmt: skip


def _state(results: dict[str, Any] | None) -> str:
    if results is None:
        return (
            "**Nothing here is measured yet: no accelerator was at hand.** Workloads, floors and aims are computed;\n"
            "the program that measures them is tested at tiny size on a CPU."
        )
    facts = results["machine"]
    return (
        f"Measured on one {facts['device']} with jax {facts['jax']}, Python {facts['python']}"
        f" ({facts['platform_version']})."
    )


def _floors() -> str:
    rates = [table.published(chip) for chip in CHIPS]
    rows = (
        (
            what, f"{one.read / 1e9:,.1f}" if one.read else "", f"{one.flops / 1e12:,.2f}" if one.flops else "",
            *(f"{1e3 * table.floor(one, rate):,.2f}" for rate in rates if rate), one.aim or "",
        )
        for what, one in work.workloads(tiny=False).items() if one.part not in ("ceilings", "attention")
    )  # fmt: skip
    return markdown(("workload", "GB", "TFLOP", *(f"{chip}, ms" for chip in CHIPS), "aim"), rows)


def _figures(results: dict[str, Any]) -> str:
    """The table, what failed, and where the time goes."""
    parts = [report.Table("", table.COLUMNS, table.rows(results)).markdown()]
    if failed := {name: part["error"] for name, part in results["parts"].items() if part["error"]}:
        parts.append("\n".join(f"- {name}: {error}" for name, error in failed.items()))
    for what, figure in results["figures"].items():
        if operations := figure.get("operations"):
            rows = ((f"`{one['name']}`", one["calls"], f"{one['milliseconds']:.2f}") for one in operations)
            parts.append(f"{what.capitalize()}:\n\n{markdown(('operation', 'calls', 'ms'), rows)}")
    return "\n\n".join(parts)


class Bar(NamedTuple):
    """A row of the chart; a heading where there is no fraction and no note."""

    label: str
    fraction: float | None = None
    aim: float | None = None
    note: str = ""
    is_ours: bool = True


def bars(results: dict[str, Any] | None) -> Iterator[Bar]:
    """Rows of the chart: what is measured or not yet, and below it what others have published."""
    measured = {} if results is None else {line.what: line for line in table.lines(results)}
    for part, ceiling in CEILINGS.items():
        yield Bar(f"{part.capitalize()}, {ceiling}")
        for what, one in work.workloads(tiny=False).items():
            if what.startswith(part) and "int8" not in what:
                line = measured.get(what)
                found = line and (line.of_floor if part == "prefill" else line.of_peak)
                yield Bar(what, found, one.aim and one.aim.least, "" if found else "not measured yet")
        yield from (Bar(one.what, one.fraction, is_ours=False) for one in OTHERS if one.of == part)


def chart() -> str:
    """The chart, as SVG."""
    rows, left, width, height = list(bars(read())), 370, 400, 22
    total = height * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 180} {total}" role="img" '
        'font-family="sans-serif" font-size="12">',
        "<title>Fractions of ceilings that workloads reach: this package, its aims, and others</title>",
        f'<rect width="{left + width + 180}" height="{total}" fill="#ffffff"/>',
    ]
    for i, bar in enumerate(rows):
        y = 10 + i * height
        text = html.escape(bar.label)
        if bar.fraction is None and not bar.note:
            parts.append(f'<text x="10" y="{y + 15}" font-weight="bold" fill="#222222">{text}</text>')
            continue
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end" fill="#222222">{text}</text>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{width}" height="{height - 6}" fill="#eeeeee"/>')
        if bar.fraction is not None:
            color = "#2463a5" if bar.is_ours else "#9a9a9a"
            length = f'width="{width * min(bar.fraction, 1):.0f}"'
            parts.append(f'<rect x="{left}" y="{y + 3}" {length} height="{height - 6}" fill="{color}"/>')
        if bar.aim is not None:
            x = left + width * bar.aim
            parts.append(f'<path d="M{x:.0f} {y + 1}V{y + height - 1}" stroke="#c04000" stroke-width="2"/>')
        note = bar.note if bar.fraction is None else f"{bar.fraction:.0%}"
        note += f" (aim {bar.aim:.0%})" if bar.aim is not None else ""
        parts.append(f'<text x="{left + width + 8}" y="{y + 15}" fill="#222222">{note}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write page and chart."""
    PAGE.write_text(page(), encoding="utf-8")
    CHART.write_text(chart(), encoding="utf-8")


if __name__ == "__main__":
    main()
