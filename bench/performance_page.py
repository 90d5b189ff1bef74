"""docs/guides/performance.md from bench/results: `python -m bench.performance_page`, after a measurement."""

import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from bench import aot_vllm, cpu_vs_torch
from bench.ocr import ACCEPTED
from bench.report import RESULTS, ROOT

PAGE = ROOT / "docs" / "guides" / "performance.md"

TEXT = """\
# Performance

Written by `python -m bench.performance_page` from `bench/results/`; change that program, not this page.

Every table comes from a program in `bench/` that prints it, keeps it as JSON and fails where its target is missed.
Unless a table says otherwise: two cores of a CPU, float32, beside transformers 4.57.1 with PyTorch 2.13 in the same
run. Nothing here was measured on a TPU or GPU: programs for TPUs are compiled and inspected, not timed. What is
measured on an accelerator, and what is not yet, is in [Speed on accelerators](../performance.md).

| program | measures |
|---|---|
| `python -m bench.parity` | logits, greedy tokens, pixels, token ids, grids and positions against transformers |
| `python -m bench.cpu_vs_torch` | decoding, prefill, ViT and preprocessing beside transformers on a CPU |
| `python -m bench.ocr` | GLM-OCR at its full size beside transformers 5.24 on a CPU; the cost of its MTP layer |
| `python -m bench.recompile` | compilations after warm-up for requests of random images and videos; padding |
| `python -m bench.memory` | peak memory against the number of patches and of tokens |
| `python -m bench.engine` | host time per decode step, busy slots, cold start |
| `python -m bench.prompt_lookup` | decoding with prompt lookup and without, where the answer copies its prompt |
| `python -m bench.grammar` | what rows with a grammar cost the other rows of a batch |
| `python -m bench.serve` | `glm4v serve` beside `generate_many`; prompts that join, and that begin alike |
| `python -m bench.serve_soak` | the server at saturation for ten minutes; faults put into it |
| `python -m bench.train` | training throughput beside transformers with torch's AdamW; padding |
| `python -m bench.rl` | learning by reward: what groups share, the phases of a step, compilations |
| `python -m bench.eval` | evaluation throughput beside transformers' `generate` in batches of 8 |
| `python -m bench.lmms_eval --python ENV` | lmms-eval through this engine |
| `python -m bench.convert` | peak memory and time of conversions beside `cp` |
| `python -m bench.install` | a clean installation: size, import time, start to first token |
| `python -m bench.quant` | speed and memory with weights in int8 and int4 on a CPU ([Quantize](quantize.md)) |
| `python -m bench.quant_quality` | tokens and scores with weights in int8 and int4 ([Quantize](quantize.md)) |
| `python -m bench.device` | one accelerator, in nine minutes ([Speed on accelerators](../performance.md)) |
| `make aot` | the 9B and GLM-OCR compiled for TPU slices: memory, collectives, copies |

## Parity

Largest difference of logits, and equal greedy tokens, against transformers in float32 on the random test
checkpoint:

{parity}

Pixel values: bit-identical to the reference's default (slow) image processor for {images}, and within one step of 8
bits of its video processor for {videos}.

Options of generation, from `min_new_tokens` to prompt lookup and beam search: the reference's tokens, and its scores
and logits (for beams, scores of sequences) within 1e-5 of the largest, in {options}.

## CPU, beside transformers

A model of {cpu_parameters}M parameters; median of {cpu_rounds} rounds, and the range of the ratios.

{cpu}

Decoding reads {bytes_per_token:,.0f} MB per token at {bandwidth:.0%} of the machine's read bandwidth (target:
{bandwidth_target:.0%}).

Ratios depend on the processor, for XLA and oneDNN use its vectors differently. The run above, and those of others:

{cpu_others}

## GLM-OCR

Random weights in the released size, and a page of {ocr_patches:,} patches: {ocr_tokens:,} tokens with the question.
transformers 5.24 runs bare forward passes with scaled dot-product attention. The first token is without compiling;
ratios of tokens per second are to transformers in float32, the median of {ocr_rounds} rounds, and their range.
{ocr_load}

{ocr}

A token reads {ocr_weights:,.0f} MB of weights in float32 and {ocr_cache:,.0f} MB of keys and values, at
{ocr_bandwidth:.0%} of the machine's read bandwidth.

The checkpoint's layer for multi-token prediction (MTP) is kept by conversions and not run. What a draft of one token
would cost is a step of that layer with the head, and the decode step of two tokens that verifies it: it pays where more
than this fraction is accepted. Random weights do not say how many are; published are {ocr_receipt:.0%} on a receipt and
{ocr_accepted:.0%} on a page ([vLLM](https://github.com/vllm-project/vllm/issues/37551)), which would give these speeds:

{ocr_drafts}

## Prompt lookup

A model of {lookup_parameters}M parameters that is constructed to write one given text, at batch 1, greedy, with
`prompt_lookup_num_tokens={lookup_draft}`, beside decoding one by one; the tokens are equal. How much an answer of a
real model copies depends on the task: this measures what a copied token saves.

{lookup}

## Structured output

A model of {grammar_parameters}M parameters, {grammar_rows} rows of which some have a grammar: tokens per second of a
row. A row with a grammar takes one token a dispatch, besides forced ones, and dispatches are shorter while there is one
(at most 4 decode steps of 32). Each dispatch costs the host as much as the table under Engine says.

{grammar}

## Recompilation

After a warm-up of {warm_programs} programs ({warm_seconds:.0f} s), {requests} requests of random images and videos
compiled {compilations} programs. {padded_patches:.0%} of the patches and {padded_tokens:.0%} of the tokens were
padding.

## Memory against length

Peak memory over that of a short input, for n, 2n and 4n; the exponent is 1 where growth is linear. The last column
is one array of S x S scores at 4n.

{memory}

## Engine

{engine_prompts} prompts and {engine_tokens:,} new tokens of a small model, through {engine_slots} slots, and in
batches that wait for their longest answer:

{engine}

{host}

Cold start of the tiny model, seconds from the start of the process:

{cold}

## Training

A model of {train_parameters}M parameters, {train_steps} steps of {train_tokens:,} tokens, beside transformers with
torch's AdamW:

{train}

Padding, as a fraction of all positions:

{padding}

## Learning by reward

A model of {rl_parameters}M parameters, {rl_groups} groups of {rl_n} answers, {rl_rounds} rounds. Prompts of text have
{rl_prompt} tokens and their answers {rl_answer}; images are {rl_image} x {rl_image} pixels.

{rl}

The ViT encodes, where a group shares its image and where each answer has its own:

{rl_vision}

A job of the tiny model, which locates digits, after its first step; phases as shares of its time:

{rl_job}

## Evaluation

The tiny model, items per second, with equal answers; transformers generates in batches of {eval_batch}:

{eval}

lmms-eval through its entry point scores {lmms:.0%} on {lmms_items} items, and `glm4v eval` {lmms_own:.0%} on the
same.

## Conversion

Beside `cp`, on one disk; the peak is that of the whole process.

{convert}

## Installation

A clean installation for CPU: {packages} packages, {megabytes:.0f} MB, {install_seconds:.0f} s. `import glm4v_jax`
takes {import_seconds:.2f} s, the model class {import_model_seconds:.2f} s. The first token about an image comes
after {first_token_seconds:.1f} s without compiled programs on disk, and after {started_seconds:.1f} s with those
of the start before. In turns with these a version that traced its programs at every start took {before_cold:.1f} s
and {before_warm:.1f} s.

## Programs compiled for TPU slices

The 9B in bfloat16, or quantised where a line says so, and GLM-OCR, from `make aot` (jax {aot_jax}, libtpu
{aot_libtpu}). GLM-4.6V-Flash and the others of the 9B's structure run the same programs but for the base of their rope,
which changes no shape. Memory is GiB per chip; "beside" is what else lies there, such as the weights of other parts of
the model, and "x its part" what a chip holds over an even division. The floor follows from memory bandwidth and peak
arithmetic of the chip. Neither it nor the estimate is a measurement. Lines without a compile time were compiled on a
busy machine, those without an estimate by an earlier version, which counted what unrolled loops receive once; what it
said of that is left out. `make aot` compares memory, copies, collectives and estimates of each program with this table
and fails where one is worse; `make aot ARGS=--accept` writes it.

The estimated time is of a run, or of a decode step: cycles that the compiler estimates for each instruction, at the
chip's clock; what is received, over all links at their rate; and attention kernels, whose cycles it does not estimate,
at peak arithmetic. Use it to compare programs:

- Large matrix products are estimated at 92 % of peak on a v5e, 94 % on a v5p and 78 % on a v6e, reading a matrix for
  eight rows at 75 %, 65 % and 88 % of bandwidth, but additions that only read and write HBM at 15 to 21 % of it.
- Each instruction has about 2,000 cycles of overhead, which many small ones in a decode step add up to.
- The latency of collectives is not in it, nor that they run beside products, nor that kernels are below their peak.

Where programs exchange or hold more than they need:

- **Prefill on tensor meshes has collective-permutes.** No sharding of the model asks for them: the compiler sends the
  sum of the down projection round a ring, in pieces, while the next products run, which moves 1.3 times what a sum into
  shards would. One more moves a few hundred rows at the borders of shards (392 of 8,192), since the compiler pads the
  pieces of the other sum.
- **The encoder's weights are 2.8 times an even division on `data=2 kv=2 q=2`**, and its patches make 2.9 of that. Two
  times are the replicas along `data`; within one, the 12 heads divide by `kv` alone, so attention is replicated along
  `q`, where the patches are sharded instead. 80 MB of the merger's first products are replicated too: their inputs are
  sharded by patches, and sharding the weights would cost an exchange of the tokens.
- **Training on tensor meshes receives up to twice the least.** Sums whose results are sharded by tokens are to be sums
  into shards, but the compiler makes an all-reduce and a slice, which moves twice as much, of the gradients of gathered
  states, whatever their size, and of long rows' forward sums too: with 32,768 tokens on `kv=2 q=8` four sums a layer
  receive 503 MB instead of 252, and the gradients of keys and of values are summed apart from those of queries.

{aot}

## Training steps compiled for TPU slices

{aot_train}

## Programs lowered for NVIDIA GPUs

`tests/planning/test_gpu_lowering.py` lowers decoding, prefill, the encoder and training steps for CUDA on a machine
without a GPU, in bfloat16, int8 and int4. All of them lower; products are of bfloat16; cuDNN's attention is called in
the ViT and in training, forward and backward, and blocks take its place where rows are packed and after a cache; what
is donated is reused; there is neither float64 nor a callback to the host. Without a GPU nothing shows what XLA and
cuDNN make of that: memory, fusions, whether cuDNN has a plan for a shape, and time.

## The vLLM plug-in's programs compiled for TPU slices

The 9B in [vLLM](vllm.md), from `make aot-vllm` (jax {vllm_jax}, libtpu {vllm_libtpu}, tpu-inference
{vllm_tpu-inference}): the plug-in's class as tpu-inference jits it, with its own kernel of paged attention, which runs
twice a layer, for sequences that decode and for others. Memory is GiB per chip. Pages fill what weights leave of
{vllm_utilization:.0%} of it (those of two layers are a fixed number); the sum is that of weights, pages, and what the
program takes beside them.

{aot_vllm}
"""


def read(name: str) -> Any:
    """A file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def words(text: str) -> str:
    """The terms of the pages, for labels in older results."""
    for old, new in (("a picture", "an image"), ("picture", "image"), (" | ", " / ")):
        text = text.replace(old, new)
    return text


def compared(lines: Iterable[Any], first: str, sides: tuple[str, str] = ("this package", "transformers")) -> str:
    """Figures of two sides, by default those of transformers."""
    rows = []
    for line in lines:
        ratio, aim = line["ratio"], line["aim"]
        target = "" if aim is None else f"{aim:g}" if line["passed"] else f"{aim:g} (missed)"
        values = (number(line[side]["median"]) for side in ("ours", "theirs"))
        label = words(line.get("what") or f"`{line['task']}`") + (f", {words(line['unit'])}" if "unit" in line else "")
        rows.append((label, *values, f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]", target))
    return table((first, *sides, "ratio", "target"), rows)


def processors(cpu: Mapping[str, Any]) -> str:
    """Ratios to transformers on all processors that were measured."""
    runs = [cpu_vs_torch.ratios(cpu), *cpu["others"]]

    def cell(ratio: Mapping[str, float] | None) -> str:
        if ratio is None:
            return ""
        return "{median:.2f} [{min:.2f}, {max:.2f}]".format_map(ratio) if "min" in ratio else f"{ratio['median']:.2f}"

    names = [f"{run['processor'] or 'not recorded'}, jax {run['jax']}, {run['rounds']} rounds" for run in runs]
    whats = (what for what in runs[0]["ratios"] if any(what in run["ratios"] for run in runs[1:]))
    return table(("", *names), ((words(what), *(cell(run["ratios"].get(what)) for run in runs)) for what in whats))


def page() -> str:
    """The page."""
    parity, cpu, recompile, memory = read("parity"), read("cpu_vs_torch"), read("recompile"), read("memory")
    ocr = read("ocr")
    lookup, grammar = read("prompt_lookup"), read("grammar")
    engine, train, evaluation, lmms, install = (read(n) for n in ("engine", "train", "eval", "lmms_eval", "install"))
    slots, cold = engine["slots"], engine["cold_start"]
    padding = (RESULTS / "train.md").read_text(encoding="utf-8").partition("| padding of")
    aot, _, aot_train = (RESULTS / "aot.md").read_text(encoding="utf-8").partition("Training steps with AdamW")
    conversions = [(size, line) for name, size in (("convert_full", "the 9B"), ("convert", "one decoder layer of it"))
                   for line in read(name)["directions"]]  # fmt: skip
    return TEXT.format(
        parity=table(
            ("prompts", "tokens", "patches", "logits differ by", "greedy tokens equal"),
            (
                (words(m["case"]), f"{m['tokens']:,}", f"{m['patches']:,}", f"{m['logit_difference']:.1e}",
                 f"{m['greedy_equal']} of {m['greedy_tokens']}")
                for m in parity["models"]
            ),
        ),
        images=f"{sum(p['pixel_difference'] == 0 for p in parity['images'])} of {len(parity['images'])} images",
        videos=f"{sum(v['max_steps'] <= 1 for v in parity['videos'])} of {len(parity['videos'])} videos",
        options=f"{sum(o['passed'] for o in parity['options'])} of {len(parity['options'])} scenarios",
        cpu_parameters=round(cpu["parameters"] / 1e6),
        cpu_rounds=cpu["rounds"],
        cpu=compared(cpu["lines"], "what"),
        bytes_per_token=cpu["bandwidth"]["bytes_per_token"] / 1e6,
        bandwidth=cpu["bandwidth"]["ratio"]["median"],
        bandwidth_target=cpu["bandwidth"]["aim"],
        cpu_others=processors(cpu),
        **_ocr(ocr),
        lookup_parameters=round(lookup["parameters"] / 1e6),
        lookup_draft=lookup["draft"],
        lookup=table(
            ("answer", "tokens/s one by one", "tokens/s", "tokens a step", "ratio"),
            (
                (line["case"], number(line["plain_tokens_per_second"]), number(line["tokens_per_second"]),
                 f"{line['tokens_per_step']:.1f}", "{median:.2f} [{min:.2f}, {max:.2f}]".format_map(line["ratio"]))
                for line in lookup["lines"]
            ),
        ),
        grammar_parameters=round(grammar["parameters"] / 1e6),
        grammar_rows=grammar["rows"],
        grammar=table(
            ("rows with a grammar", "tokens/s of the others", "tokens/s of these", "others, to a batch without any"),
            (
                (line["with_grammar"], number(line["tokens_per_second"]),
                 number(line["tokens_per_second_with_grammar"]) if line["with_grammar"] else "",
                 "{median:.2f} [{min:.2f}, {max:.2f}]".format_map(line["ratio"]) if line["with_grammar"] else "")
                for line in grammar["lines"]
            ),
        ),
        warm_programs=len(recompile["warmup"]["programs"]),
        warm_seconds=recompile["warmup"]["seconds"],
        requests=len(recompile["requests"]),
        compilations=len(recompile["compilations_after_warmup"]),
        padded_patches=recompile["padded_share_vision"],
        padded_tokens=recompile["padded_share_text"],
        memory=table(
            ("what", "n, 2n, 4n", "increment, MiB", "exponent", "S x S, MiB"),
            (
                (words(m["what"]), ", ".join(f"{n:,}" for n in m["sizes"]),
                 ", ".join(f"{n / 2**20:,.0f}" for n in m["increment_bytes"]), f"{m['exponent']:.2f}",
                 f"{m['square_bytes'][-1] / 2**20:,.0f}")
                for m in (memory[name] for name in ("picture", "prompt", "gradient"))
            ),
        ),
        engine_prompts=slots["prompts"],
        engine_tokens=slots["new_tokens"],
        engine_slots=slots["slots"],
        engine=table(
            ("", "slots", "batches"),
            [
                ("busy", f"{slots['busy']:.0%}", f"{slots['busy_in_batches']:.0%}"),
                ("tokens/s", number(slots["tokens_per_second"]), number(slots["tokens_per_second_in_batches"])),
            ],
        ),
        host=table(
            ("rows", "decode step, ms", "of which host, ms"),
            ((h["rows"], f"{h['engine_ms']:.3f}", f"{h['host_ms']:.3f}") for h in engine["host"]),
        ),
        cold=table(
            ("compiled programs on disk", "loaded", "first token"),
            (
                (text, f"{cold[name]['loaded']:.1f}", f"{cold[name]['first_token']:.1f}")
                for text, name in (("none", "empty_cache"), ("all", "full_cache"))
            ),
        ),
        train_parameters=round(train["parameters"] / 1e6),
        train_steps=train["data"]["timed_steps"],
        train_tokens=train["data"]["timed_tokens"],
        train=compared(train["lines"], "tokens/s"),
        padding="".join(padding[1:]).strip(),
        **_rl(read("rl")),
        eval_batch=evaluation["batch"],
        eval=compared(evaluation["lines"], "task"),
        lmms=lmms["lmms_eval"],
        lmms_own=lmms["glm4v_eval"],
        lmms_items=lmms["items"],
        convert=table(
            ("checkpoint", "direction", "GB", "seconds", "seconds of `cp`", "peak memory, GiB"),
            (
                (size, f"`{line['direction']}`", f"{line['nbytes'] / 1e9:.1f}", f"{line['seconds']:.0f}",
                 " to ".join(f"{seconds:.0f}" for seconds in sorted(line["copy_seconds"])),
                 f"{line['peak_bytes'] / 2**30:.1f}")
                for size, line in conversions
            ),
        ),
        packages=install["packages"],
        megabytes=install["bytes"] / 1e6,
        **{name: install[name] for name in install if name.endswith("_seconds")},
        **{
            name: statistics.median(install["starts"][start]["seconds"])
            for name, start in (
                ("started_seconds", "this, warm"), ("before_cold", "other, cold"), ("before_warm", "other, warm"),
            )
        },
        **{f"aot_{name}": read("aot")["machine"][name] for name in ("jax", "libtpu")},
        aot=aot.strip(),
        **{f"vllm_{name}": value for name, value in read("aot_vllm")["machine"].items()},
        vllm_utilization=aot_vllm.UTILIZATION,
        aot_vllm=aot_vllm.table(read("aot_vllm")["programs"]).markdown(),
        aot_train=f"Training steps with AdamW{aot_train}".strip(),
    )  # fmt: skip


def range_of(values: Iterable[float]) -> str:
    """From the least to the most."""
    return " to ".join(f"{round(value, 1):g}" for value in values)


def _rl(rl: Any) -> dict[str, Any]:
    """What the page says of learning by reward."""
    job, vision = rl["job"], rl["vision"]
    found = {
        **{name: rl["sizes"][name] for name in ("groups", "n", "prompt", "answer", "image")},
        "parameters": round(rl["parameters"] / 1e6),
        "rounds": rl["rounds"],
        "": compared(rl["lines"], "what", ("shared", "each its own")),
        "vision": table(
            ("what", "shared", "each its own", "ratio", "target"),
            (
                (name.replace("_", " "), *map("{:,}".format, vision[name]), f"{ratio:g}", vision["aim"])
                for name, ratio in vision["ratios"].items()
            ),
        ),
        "job": table(
            ("what", "figure", "target"),
            [
                ("steps; seconds a step", f"{job['steps']}; {job['seconds_per_step']:.2f}", ""),
                ("groups; tokens an answer", f"{range_of(job['groups'])}; {range_of(job['tokens'])}", ""),
                ("answers a second of rollout", number(job["answers_per_second"]), ""),
                ("samples a second of learning", number(job["samples_per_second"]), ""),
                *((name, f"{share:.1%}", "") for name, share in job["shares"].items()),
                ("handover, the median of the steps", f"{job['handover']:.1%}", f"at most {job['aim']:.0%}"),
                ("programs compiled", job["compilations_after_the_first_step"], 0),
            ],
        ),
    }  # fmt: skip
    return {f"rl_{name}".rstrip("_"): value for name, value in found.items()}


def _ocr(ocr: Any) -> dict[str, Any]:
    """What the page says of GLM-OCR."""
    exact, memory = ocr["lines"][0], ocr["memory"]
    read_bytes = (memory["weights"] + memory["cache"]) * exact["tokens_per_second"]["median"]
    return {
        "ocr_load": f"The machine had a load of {load:.1f} before." if (load := ocr["load_before"] or 0) > 1 else "",
        "ocr_patches": ocr["patches"],
        "ocr_tokens": ocr["prompt_tokens"],
        "ocr_rounds": ocr["rounds"],
        "ocr_weights": memory["weights"] / 1e6,
        "ocr_cache": memory["cache"] / 1e6,
        "ocr_receipt": ACCEPTED["a receipt"],
        "ocr_accepted": ACCEPTED["a page"],
        "ocr_bandwidth": read_bytes / memory["numpy"],
        "ocr": table(
            ("weights in", "MB", "first token, s", "tokens/s", "ratio", "target", "peak of the process, MB"),
            (
                (line["variant"], f"{line['weights'] / 1e6:,.0f}", f"{line['first_token_seconds']:.1f}",
                 number(line["tokens_per_second"]["median"]),
                 "{median:.2f} [{min:.2f}, {max:.2f}]".format_map(line["ratio"]),
                 "" if line["aim"] is None else f"{line['aim']:g}" if line["passed"] else f"{line['aim']:g} (missed)",
                 f"{line['peak'] / 1e6:,.0f}")
                for line in ocr["lines"]
            ),
        ),
        "ocr_drafts": table(
            ("weights in", "1 token, ms", "2 tokens, ms", "MTP layer, ms", "pays above", *ACCEPTED),
            (
                (line["variant"], *(f"{line[f'{work}_ms']:.1f}" for work in ("one", "two", "layer")),
                 "{median:.0%} [{min:.0%}, {max:.0%}]".format_map(line["pays_above"]),
                 *(f"{line['speed'][what]['median']:.2f} times" for what in ACCEPTED))
                for line in ocr["drafts"]
            ),
        ),
    }  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
