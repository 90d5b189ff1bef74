"""docs/guides/performance.md from performance_page.md and bench/results: `python -m bench.performance_page`."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from bench import aot_vllm, cpu_vs_torch
from bench.ocr import ACCEPTED
from bench.report import RESULTS, ROOT, markdown, read

PAGE = ROOT / "docs" / "guides" / "performance.md"
TEXT = ROOT / "bench" / "performance_page.md"
"""The page without its figures."""


def number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def spread(ratio: Mapping[str, float]) -> str:
    """Median, smallest and largest; runs of other processors may lack some of it."""
    form = "{median:.2f} [{min:.2f}, {max:.2f}]" if "min" in ratio else "{median:.2f}" if ratio else ""
    return form.format_map(ratio)


def target(line: Mapping[str, Any]) -> str:
    """The aim of a line, and whether it is missed."""
    return "" if line["aim"] is None else f"{line['aim']:g}" + ("" if line["passed"] else " (missed)")


def compared(lines: Iterable[Any], first: str, sides: tuple[str, str] = ("this package", "transformers")) -> str:
    """Figures of two sides, by default those of transformers."""
    rows = []
    for line in lines:
        values = (number(line[side]["median"]) for side in ("ours", "theirs"))
        label = (line.get("what") or f"`{line['task']}`") + (f", {line['unit']}" if "unit" in line else "")
        rows.append((label, *values, spread(line["ratio"]), target(line)))
    return markdown((first, *sides, "ratio", "target"), rows)


def processors(cpu: Mapping[str, Any]) -> str:
    """Ratios to transformers on all processors that were measured."""
    runs = [cpu_vs_torch.ratios(cpu), *cpu["others"]]
    names = [f"{run['processor'] or 'not recorded'}, jax {run['jax']}, {run['rounds']} rounds" for run in runs]
    whats = (what for what in runs[0]["ratios"] if any(what in run["ratios"] for run in runs[1:]))
    rows = ((what, *(spread(run["ratios"].get(what, {})) for run in runs)) for what in whats)
    return markdown(("", *names), rows)


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
    return TEXT.read_text(encoding="utf-8").format(
        parity=markdown(
            ("prompts", "tokens", "patches", "logits differ by", "greedy tokens equal"),
            (
                (m["case"], f"{m['tokens']:,}", f"{m['patches']:,}", f"{m['logit_difference']:.1e}",
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
        **_preprocess(read("preprocess")),
        **_ocr(ocr),
        lookup_parameters=round(lookup["parameters"] / 1e6),
        lookup_draft=lookup["draft"],
        lookup=markdown(
            ("answer", "tokens/s one by one", "tokens/s", "tokens a step", "ratio"),
            (
                (line["case"], number(line["plain_tokens_per_second"]), number(line["tokens_per_second"]),
                 f"{line['tokens_per_step']:.1f}", spread(line["ratio"]))
                for line in lookup["lines"]
            ),
        ),
        grammar_parameters=round(grammar["parameters"] / 1e6),
        grammar_rows=grammar["rows"],
        grammar=markdown(
            ("rows with a grammar", "tokens/s of the others", "tokens/s of these", "others, to a batch without any"),
            (
                (line["with_grammar"], number(line["tokens_per_second"]),
                 number(line["tokens_per_second_with_grammar"]) if line["with_grammar"] else "",
                 spread(line["ratio"]) if line["with_grammar"] else "")
                for line in grammar["lines"]
            ),
        ),
        warm_programs=len(recompile["warmup"]["programs"]),
        warm_seconds=recompile["warmup"]["seconds"],
        requests=len(recompile["requests"]),
        compilations=len(recompile["compilations_after_warmup"]),
        padded_patches=recompile["padded_share_vision"],
        padded_tokens=recompile["padded_share_text"],
        memory=markdown(
            ("what", "n, 2n, 4n", "increment, MiB", "exponent", "S x S, MiB"),
            (
                (m["what"], ", ".join(f"{n:,}" for n in m["sizes"]),
                 ", ".join(f"{n / 2**20:,.0f}" for n in m["increment_bytes"]), f"{m['exponent']:.2f}",
                 f"{m['square_bytes'][-1] / 2**20:,.0f}")
                for m in (memory[name] for name in ("image", "prompt", "gradient"))
            ),
        ),
        engine_prompts=slots["prompts"],
        engine_tokens=slots["new_tokens"],
        engine_slots=slots["slots"],
        engine=markdown(
            ("", "slots", "batches"),
            [
                ("busy", f"{slots['busy']:.0%}", f"{slots['busy_in_batches']:.0%}"),
                ("tokens/s", number(slots["tokens_per_second"]), number(slots["tokens_per_second_in_batches"])),
            ],
        ),
        host=markdown(
            ("rows", "decode step, ms", "of which host, ms"),
            ((h["rows"], f"{h['engine_ms']:.3f}", f"{h['host_ms']:.3f}") for h in engine["host"]),
        ),
        cold=markdown(
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
        convert=markdown(
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
        **_starts(install),
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


def _preprocess(found: Any) -> dict[str, Any]:
    """What the page says of preprocessing."""
    return {
        **{f"preprocess_{name}": found[name] for name in ("cores", "count", "rounds")},
        **{f"preprocess_{name}": 1e3 * found["overlap"][name] for name in ("data", "both")},
        "preprocess_hidden": found["overlap"]["hidden"],
        "preprocess": markdown(
            ("what", "this package", "beside it", "", "ratio", "target"),
            (
                (f"{line['what']}, {line['unit']}", number(line["ours"]["median"]), line["other"],
                 number(line["theirs"]["median"]), spread(line["ratio"]), target(line))
                for line in found["lines"]
            ),
        ),
        "preprocess_scaling": markdown(
            ("in", "one, images/s", "two, images/s", "ratio"),
            (
                (line["way"], number(line["theirs"]["median"]), number(line["ours"]["median"]), spread(line["ratio"]))
                for line in found["scaling"]
            ),
        ),
    }  # fmt: skip


def _rl(rl: Any) -> dict[str, Any]:
    """What the page says of learning by reward."""
    job, vision = rl["job"], rl["vision"]
    return {
        **{f"rl_{name}": rl["sizes"][name] for name in ("groups", "n", "prompt", "answer", "image")},
        "rl_parameters": round(rl["parameters"] / 1e6),
        "rl_rounds": rl["rounds"],
        "rl": compared(rl["lines"], "what", ("shared", "each its own")),
        "rl_vision": markdown(
            ("what", "shared", "each its own", "ratio", "target"),
            (
                (name.replace("_", " "), *map("{:,}".format, vision[name]), f"{ratio:g}", vision["aim"])
                for name, ratio in vision["ratios"].items()
            ),
        ),
        "rl_job": markdown(
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


def _starts(install: Any) -> dict[str, Any]:
    """What the page says of starts; only some measurements have another checkout beside this one."""
    seconds = {start: statistics.median(one["seconds"]) for start, one in install["starts"].items()}
    before = ""
    if "other, cold" in seconds:
        before = (
            "A version that traced its programs at every start, in turns with this one, took "
            f"{seconds['other, cold']:.1f} s and {seconds['other, warm']:.1f} s."
        )
    return {"start_cold": seconds["this, cold"], "start_warm": seconds["this, warm"], "start_before": before}


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
        "ocr": markdown(
            ("weights in", "MB", "first token, s", "tokens/s", "ratio", "target", "peak of the process, MB"),
            (
                (line["variant"], f"{line['weights'] / 1e6:,.0f}", f"{line['first_token_seconds']:.1f}",
                 number(line["tokens_per_second"]["median"]), spread(line["ratio"]), target(line),
                 f"{line['peak'] / 1e6:,.0f}")
                for line in ocr["lines"]
            ),
        ),
        "ocr_drafts": markdown(
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
