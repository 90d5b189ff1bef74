"""docs/guides/quantize.md from the abstract model and bench/results: `python -m bench.quantize_page`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bench import quant
from bench.report import ROOT, markdown, read
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.hardware import GIB
from glm4v_jax.planning.compile_for_topology import SLICES
from glm4v_jax.planning.memory_table import describe

PAGE = ROOT / "docs" / "guides" / "quantize.md"

TEXT = """\
# Quantize

Written by `python -m bench.quantize_page` from the shapes of all arrays and from `bench/results/`; change that program,
not this page.

`--quantize int8` or `--quantize int4` loads a checkpoint's weights as integers, which take a half or less of bfloat16's
memory. `generate`, `chat`, `describe` and `eval` have the option, as have `glm4v mesh` and `glm4v convert inspect`,
which say what it saves; in Python it is `quantize`. Nothing is converted before: each weight is rounded as it is read.
[`glm4v convert quantize`](convert.md#quantise) rounds them once instead, into a checkpoint of integers; those that
others made with compressed-tensors load too.

```sh
glm4v mesh latency --devices 1 --memory 16 --rows 8 --quantize int8
glm4v convert inspect path/to/GLM-4.1V-9B-Thinking --quantize int8
```

```python
from glm4v_jax import Engine

engine = Engine.from_pretrained("path/to/GLM-4.1V-9B-Thinking", quantize="int8")
```

## Which one

{schemes}

- Choose `int8` wherever the weights do not fit, or on a CPU.
- Choose `int4` only where int8 does not fit. Better than rounding is a checkpoint that AWQ or GPTQ made, which needs no
  option ([what is read](convert.md#quantise)).
- A checkpoint that is too large for the memory that is free is refused before anything is read, with what would fit.
- Biases, norms and activations stay in `--dtype`: float32 on a CPU, bfloat16 elsewhere by default.
- An adapter (`--adapter`) is applied beside the integers; it is not merged into them, and a quantised model is not
  saved.
- `target` and `group` of `glm4v_jax.model.quantize.QuantConfig` say which kernels are quantised, and in which groups.
- To fine-tune adapters over a quantised base, see [Fine-tune](finetune.md).

## What fits where

The 9B in GiB: its weights, and the KV cache of 1 and of 8 sequences of {context:,} tokens. In all, the process takes
{host} GiB more on a CPU, and temporaries of programs {device} GiB on other devices. "Fits" leaves {system} GiB to a
computer's system and {driver:.0%} of a GPU's memory to its driver and display.

{memory}

- Measured on a CPU: with int8, a checkpoint of the 9B's size answers a prompt with an image at a peak of 12.2 GB.
- JAX takes three quarters of a GPU's memory unless told otherwise: where that is too little, set
  `XLA_PYTHON_CLIENT_MEM_FRACTION=0.92`.
- On a CPU, bfloat16 needs jax 0.12 or newer (Python 3.12 or newer): programs of older versions keep a copy of all
  kernels in float32.
- [Models](../models.md#memory) has larger caches and meshes of several devices; `glm4v mesh` computes any other.

## Quality

The tiny model of the package, everything quantised as `--quantize` does, beside itself in float32
(`python -m bench.quant_quality`). {tokens:,} tokens of right answers about held-out digits: the divergence of the next
token's distribution, and how often the most likely token is the same:

{divergence}

Scores of its own answers, {items} items each, with 95% intervals:

{scores}

What rounding costs a larger model, only a measurement of that model shows: `glm4v eval --quantize int8` beside
`glm4v eval`, and `glm4v eval compare`. The divergence tells schemes apart long before scores do.

## Speed

A model of {parameters}M parameters on {cores} cores of a CPU, jax {jax}: new tokens of one request, and the time of a
prompt of {prefill} tokens (`python -m bench.quant`). Temporaries are those of the program that decodes: nothing there
holds a kernel in float32.

{speed}
{products}
- A single device multiplies a token in one pass over the integers, which runs on one core. For all cores, split the
  model over as many devices: `JAX_NUM_CPU_DEVICES=2 glm4v generate --quantize int8 --mesh q=2`.
- Before jax 0.12 (Python 3.12), integers are converted more slowly, and bfloat16 is not worth it; loading says so.
- On TPU and GPU, int8 weights are converted within the product that reads them.
"""

CONTEXT = 4096
HOST, DEVICE, SYSTEM, DRIVER = 1.0, 0.5, 2, 0.08
"""GiB of a process beside weights and cache, 0.9 and less by `bench.quant`, and of programs' temporaries on other
devices, 0.3 and less by the page of performance; GiB that a computer's system takes, and the fraction of a GPU's memory
that is not free."""

SCHEMES = (
    ("none", "nothing", "exact", "all"),
    ("`int8`", "all that is large; a scale for each output channel, of the embedding for each token",
     "as good as exact", "all"),
    ("`int4`", "the decoder's kernels, a scale for each 64 inputs; the rest as int8", "worse, see below",
     "CPU, GPU; refused on a TPU, whose compiler makes float32 copies of them"),
)  # fmt: skip


class Place(NamedTuple):
    """Where a model runs.

    name: in the table.
    beside: GiB that it takes besides weights and cache.
    memories: name -> GiB that are free, smallest first.
    weights: what weights are in -> dtype and scheme of `describe`.
    """

    name: str
    beside: float
    memories: Mapping[str, float]
    weights: Mapping[str, tuple[str, str]]


AVAILABLE = {name: SLICES[name].available / GIB for name in ("v5e", "v6e")}
PLACES = (
    Place(
        "CPU", HOST, {f"{size} GB": size - SYSTEM for size in (8, 12, 16, 24, 32, 48, 64)},
        {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), "int8": ("float32", "int8"),
         "int4": ("float32", "int4")},
    ),
    Place(
        "GPU", DEVICE, {f"{size} GB": (1 - DRIVER) * size for size in (8, 12, 16, 24, 32, 40, 48, 80)},
        {"bfloat16": ("bfloat16", "none"), "int8": ("bfloat16", "int8"), "int4": ("bfloat16", "int4")},
    ),
    Place(
        "TPU", DEVICE, {f"{name} ({size} GiB)": size for name, size in AVAILABLE.items()},
        {"bfloat16": ("bfloat16", "none"), "int8": ("bfloat16", "int8")},
    ),
)  # fmt: skip


def fits() -> list[tuple[str, ...]]:
    """Rows of what fits where."""
    config = Glm4vConfig.glm4_1v_9b()
    rows = []
    for place in PLACES:
        for name, (dtype, scheme) in place.weights.items():
            tables = [describe(config, {}, rows=n, capacity=CONTEXT, dtype=dtype, scheme=scheme) for n in (1, 8)]
            sums = [found.device_bytes / GIB + place.beside for found in tables]
            smallest = [next(memory for memory, free in place.memories.items() if free >= total) for total in sums]
            sizes = [tables[0].weight_bytes, *(found.cache.device_bytes for found in tables)]
            rows.append(
                (place.name, name, *(f"{size / GIB:.2f}" for size in sizes),
                 *(f"{total:.1f}: {memory}" for total, memory in zip(sums, smallest, strict=True)))
            )  # fmt: skip
    return rows


def page() -> str:
    """The page."""
    quality = read("quant_quality")
    exact, *schemes = quality["lines"]
    speed = read("quant")
    return TEXT.format(
        schemes=markdown(("`--quantize`", "integers", "quality", "devices"), SCHEMES),
        context=CONTEXT,
        host=HOST,
        device=DEVICE,
        system=SYSTEM,
        driver=DRIVER,
        memory=markdown(
            ("on", "weights in", "weights", "cache of 1", "cache of 8", "in all with 1: fits", "in all with 8: fits"),
            fits(),
        ),
        tokens=schemes[0]["tokens"],
        divergence=markdown(
            ("", "error of the decoder's kernels", "KL divergence, mean", "99th percentile", "same token"),
            (
                (line["scheme"], f"{line['weight_error']:.2%}", f"{line['kl_mean']:.1e}", f"{line['kl_p99']:.1e}",
                 f"{line['agreement']:.1%}")
                for line in schemes
            ),
        ),
        items=next(iter(exact["tasks"].values()))["count"],
        scores=markdown(
            ("", *exact["tasks"]),
            ((line["scheme"], *map(_score, line["tasks"].values())) for line in quality["lines"]),
        ),
        parameters=round(speed["parameters"] / 1e6),
        cores=speed["machine"]["cores"],
        jax=speed["machine"]["jax"],
        prefill=quant.PREFILL_TOKENS,
        speed=markdown(
            ("weights in", "MB", "peak of the process, MB", "temporaries, MB", "tokens/s", "of float32", "prompt"),
            (
                (line["variant"], *(f"{line[key] / 1e6:,.0f}" for key in ("weights", "peak")),
                 f"{line['temporaries'] / 1e6:.1f}", f"{line['tokens_per_second']:.0f}",
                 f"{line['decode_ratio']:.2f}", f"{line['prefill_ratio']:.2f} of the time")
                for line in speed["lines"]
            ),
        ),
        products=_products(speed.get("product_milliseconds")),
    )  # fmt: skip


def _products(milliseconds: Mapping[str, float] | None) -> str:
    """Figures of single products, where they were measured."""
    if milliseconds is None:
        return ""
    rows = ((name, f"{ms:.2f}", f"{milliseconds['float32'] / ms:.2f}") for name, ms in milliseconds.items())
    return (
        f"\nA token times one matrix of {quant.INPUTS:,} x {quant.OUTPUTS:,}, an MLP's of the 9B, beside ggml, the\n"
        f"library of llama.cpp:\n\n{markdown(('weights in', 'ms', 'speed of float32'), rows)}\n"
    )


def _score(task: Mapping[str, Any]) -> str:
    return "{score:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]".format_map(task)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
