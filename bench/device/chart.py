"""What docs/performance.md has beside the figures in bench/results/device.json: floors, others' figures, the chart.

`python -m bench.page device` writes both. Without that file they have the workloads, their floors and aims, and say
that nothing was measured.
"""

import html
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from bench import report
from bench.device import table, work

CHART = report.ROOT / "docs" / "performance.svg"
RESULTS = report.RESULTS / "device.json"
CHIPS = ("NVIDIA H100", "NVIDIA H200")


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


def floors() -> report.Table:
    """What workloads read and compute, and the least time of that on some chips."""
    rates = [table.published(chip) for chip in CHIPS]
    rows = [
        (
            what, f"{one.read / 1e9:,.1f}" if one.read else "", f"{one.flops / 1e12:,.2f}" if one.flops else "",
            *(f"{1e3 * table.floor(one, rate):,.2f}" for rate in rates if rate), one.aim or "",
        )
        for what, one in work.workloads(tiny=False).items() if one.part not in ("ceilings", "attention")
    ]  # fmt: skip
    return report.Table("floors", ("workload", "GB", "TFLOP", *(f"{chip}, ms" for chip in CHIPS), "aim"), rows)


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
