"""Speed and memory of quantised weights on a CPU: a model in float32, int8, int4 and bfloat16, in turns.

    python -m bench.quant

Every variant is a process of its own: its peak memory is its own, and while one computes the others sleep. Decoding is
greedy, one request at a time; temporaries are those of the program that decodes, as XLA plans them. The last variant
splits the int8 model over as many devices as there are cores. A token times a single matrix is measured as well, beside
llama.cpp's products if pywhispercpp is installed. Writes `bench/results/quant.json`; exits with status 1 if a target is
missed. Before JAX 0.12, targets of speed do not hold.
"""

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench import ggml, models, report, turns

VARIANTS = ("float32", "int8", "int4", "bfloat16", "int8, a device a core")
PROMPT_TOKENS, PREFILL_TOKENS, NEW_TOKENS, ROUNDS = 64, 512, 65, 5
INPUTS, OUTPUTS = 4096, 13696
"""Of the matrix: an MLP's in the 9B."""
SPEED, PREFILL, COMPILE, TEMPORARIES = 2.0, 1.3, 1.5, 10_000_000


class Variant:
    """One of `VARIANTS`."""

    def __init__(self, name: str, threads: int):
        self._scheme, self._devices = name.partition(",")[0], threads if "," in name else 1
        self._slots: Any = None

    def load(self, directory: str) -> dict[str, Any]:
        """Load the model, compile, and say what that took."""
        import jax

        from glm4v_jax.checkpoints.load import load_runtime
        from glm4v_jax.checkpoints.plan import device_bytes
        from glm4v_jax.devices.mesh import make_mesh

        is_float = self._scheme in ("float32", "bfloat16")
        self._runtime = load_runtime(
            directory, dtype=self._scheme if is_float else "float32", mesh=make_mesh(q=self._devices),
            quantize=None if is_float else self._scheme,
        )  # fmt: skip
        self._product: Callable[[], Any] | None = None
        tokens, _ = self._generate()
        seconds, temporaries = self._compile()
        return {
            "weights": device_bytes(jax.tree.leaves(self._runtime.module)) * self._runtime.mesh.size,
            "temporaries": temporaries,
            "compile_seconds": seconds,
            "tokens": tokens,
            "peak": turns.peak_bytes(),
        }

    def decode(self) -> float:
        """Seconds from the first token to the last."""
        return self._generate()[1]

    def prefill(self) -> float:
        """Seconds of a prompt, to its first token."""
        return self._start(PREFILL_TOKENS, 1)[1]

    def product(self) -> float:
        """Seconds of a token times a matrix."""
        if self._product is None:
            self._product = self._make_product()
        return turns.seconds(self._product, 9)

    def _make_product(self) -> Callable[[], Any]:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from glm4v_jax.devices.mesh import use_mesh
        from glm4v_jax.model.nn import Init, Linear
        from glm4v_jax.model.quantize import QuantConfig, quantize_kernel

        mesh, dtype = self._runtime.mesh, self._runtime.dtype
        with use_mesh(mesh):
            layer = Linear({"embed": INPUTS}, {"mlp": OUTPUTS}, Init(nnx.Rngs(params=0), dtype=dtype))
            if self._scheme in ("int8", "int4"):
                made = quantize_kernel(layer.kernel[...], ("embed",), ("mlp",), QuantConfig(self._scheme))  # type: ignore[arg-type]
                layer.kernel, layer.kernel_scale = map(nnx.Param, made)
            x, multiply = jnp.ones((1, 1, INPUTS), dtype), jax.jit(lambda layer, x: layer(x))

        def product() -> None:
            with use_mesh(mesh):
                jax.block_until_ready(multiply(layer, x))

        product()
        return product

    def _generate(self) -> tuple[list[int], float]:
        tokens, _ = self._start(PROMPT_TOKENS, NEW_TOKENS)
        begun = time.perf_counter()
        while len(tokens) < NEW_TOKENS:
            chosen, counts, _ = self._slots.read(self._slots.decode())
            tokens += chosen.tokens[0, : counts[0]].tolist()
        return tokens, time.perf_counter() - begun

    def _start(self, prompt_tokens: int, new_tokens: int) -> tuple[list[int], float]:
        from glm4v_jax.config.generation import GenerationConfig
        from glm4v_jax.generate.prefill_chunks import Start
        from glm4v_jax.generate.slots import Slots
        from glm4v_jax.inputs.prompt import Prompt

        if self._slots is None:
            self._slots = Slots(self._runtime, capacity=1024, reuse_prefixes=False)
        words = min(1000, self._runtime.config.text_config.vocab_size)
        ids = np.random.default_rng(prompt_tokens).integers(0, words, prompt_tokens).tolist()
        begun = time.perf_counter()
        start = Start(Prompt.of_text(ids), GenerationConfig(eos_token_id=()), new_tokens)
        return np.asarray(self._slots.start({0: start}).tokens).tolist(), time.perf_counter() - begun

    def _compile(self) -> tuple[float, int]:
        """Seconds to compile the program that decodes, and bytes of its temporaries."""
        import jax

        from glm4v_jax.generate import device_steps

        runtime = self._runtime
        with runtime.on_mesh():
            state = device_steps.init_state(runtime.text, 1, 1024, 1, stacked=False)
            number = jax.ShapeDtypeStruct((), "int32")
            lowered = device_steps.decode.lower(runtime.text, runtime.head, state, number, number, num_steps=16)
            begun = time.perf_counter()
            compiled = lowered.compile()
            return time.perf_counter() - begun, compiled.memory_analysis().temp_size_in_bytes


class Ggml:
    """llama.cpp's products."""

    def __init__(self, threads: int):
        self._products = {kind: ggml.Product(kind, INPUTS, OUTPUTS, threads) for kind in ("Q8_0", "Q4_0")}

    def product(self, kind: str) -> float:
        """Seconds of a token times a matrix."""
        return turns.seconds(self._products[kind].seconds, 9)


def measure_products(workers: Mapping[str, turns.Worker], rounds: int) -> dict[str, list[float]]:
    """Variant, or ggml's type -> seconds of a product in each round."""
    works = [{name: turns.TimedTask("product", {}) for name in VARIANTS}]
    if "ggml" in workers:
        works += [{"ggml": turns.TimedTask("product", {"kind": kind})} for kind in ("Q8_0", "Q4_0")]
    ours, *theirs = turns.measure(workers, works, rounds)
    found = {name: [turn[name] for turn in ours] for name in VARIANTS}
    return found | {
        f"ggml {kind}": [turn["ggml"] for turn in each] for kind, each in zip(("Q8_0", "Q4_0"), theirs, strict=False)
    }


def measure(
    directory: pathlib.Path, threads: int, rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Variant -> what `Variant.load` says, and seconds of decoding and of prefill; and those of products."""
    found: dict[str, dict[str, Any]] = {}
    commands = {
        name: turns.command("bench.quant", "--variant", name, "--threads", threads)
        for name in (*VARIANTS, *(["ggml"] if ggml.available() else []))
    }
    with turns.start(commands) as workers:
        for name in VARIANTS:
            found[name] = workers[name]("load", directory=str(directory))
        works = [{name: turns.TimedTask(task, {}) for name in VARIANTS} for task in ("decode", "prefill")]
        for task, results in zip(("decode", "prefill"), turns.measure(workers, works, rounds), strict=True):
            for name in VARIANTS:
                found[name][task] = [turn[name] for turn in results]
        return found, measure_products(workers, rounds)


def lines(found: dict[str, dict[str, Any]], is_fast: bool) -> list[dict[str, Any]]:
    """Every variant beside float32."""
    exact = found["float32"]

    def ratio(name: str, task: str) -> float:
        return statistics.median(a / b for a, b in zip(exact[task], found[name][task], strict=True))

    result = []
    for name, each in found.items():
        line = {
            "variant": name,
            "weights": each["weights"],
            "peak": each["peak"],
            "temporaries": each["temporaries"],
            "tokens_per_second": (NEW_TOKENS - 1) / statistics.median(each["decode"]),
            "decode_ratio": ratio(name, "decode"),
            "prefill_seconds": statistics.median(each["prefill"]),
            "prefill_ratio": 1 / ratio(name, "prefill"),
            "compile_seconds": each["compile_seconds"],
            "compile_ratio": each["compile_seconds"] / exact["compile_seconds"],
            "equal_tokens": sum(a == b for a, b in zip(each["tokens"], exact["tokens"], strict=True)),
        }
        is_int8 = name.startswith("int8")
        faults = [
            is_int8 and line["temporaries"] > TEMPORARIES,
            is_int8 and is_fast and line["prefill_ratio"] > PREFILL,
            name == "int8" and is_fast and line["compile_ratio"] > COMPILE,
            "," in name and is_fast and line["decode_ratio"] < SPEED,
        ]
        result.append(line | {"passed": not any(faults)})
    return result


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """The variants; and single products, where they were measured."""
    variants = [
        (
            line["variant"], *(f"{line[key] / 1e6:,.1f}" for key in ("weights", "peak", "temporaries")),
            f"{line['tokens_per_second']:.1f}", f"{line['decode_ratio']:.2f}",
            f"x {line['prefill_ratio']:.2f}", f"x {line['compile_ratio']:.2f}", report.verdict(line["passed"]),
        )
        for line in figures["lines"]
    ]  # fmt: skip
    milliseconds = figures.get("product_milliseconds", {})
    products = [(name, f"{ms:.2f}", f"{milliseconds['float32'] / ms:.2f}") for name, ms in milliseconds.items()]
    return [
        report.Table(
            f"{figures['parameters'] / 1e6:.0f}M parameters, {figures['machine']['cores']} cores",
            ("weights as", "MB", "peak MB", "temporaries MB", "tokens/s", "of float32", "prefill", "compile", ""),
            variants,
        ),
        report.Table(
            f"a token times a matrix of {INPUTS:,} x {OUTPUTS:,}", ("weights as", "ms", "of float32"), products
        ),
    ]  # fmt: skip


def main() -> int:
    """Measure, print, write; 1 if a target is missed."""
    parser = report.parser("bench.quant", __doc__)
    parser.add_argument("--variant", choices=(*VARIANTS, "ggml"), help="answer tasks as this variant")
    parser.add_argument("--threads", type=int, default=2, help="cores, and devices of the last variant")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measurements of each side, in turns")
    parsed = parser.parse_args()
    if parsed.variant is not None:
        turns.use_cores(parsed.threads)
        if parsed.variant == "ggml":
            turns.serve({"product": Ggml(parsed.threads).product})
            return 0
        import jax

        if "," in parsed.variant:
            jax.config.update("jax_num_cpu_devices", parsed.threads)
        variant = Variant(parsed.variant, parsed.threads)
        turns.serve({name: getattr(variant, name) for name in ("load", "decode", "prefill", "product")})
        return 0
    from glm4v_jax.model.cpu_matmul import FEW_TOKENS

    with tempfile.TemporaryDirectory(prefix="glm4v_jax_quant_") as name:
        path = models.write_checkpoint(pathlib.Path(name), models.INFERENCE)
        each, products = measure(path, parsed.threads, parsed.rounds)
    found = lines(each, bool(FEW_TOKENS))
    figures = {
        "machine": report.machine_facts("jax", "jaxlib", "numpy"),
        "parameters": models.num_parameters(models.INFERENCE),
        "lines": found,
        "product_milliseconds": {name: 1e3 * statistics.median(seconds) for name, seconds in products.items()},
        "passed": all(line["passed"] for line in found),
    }
    return report.finish("quant", figures, *tables(figures))


if __name__ == "__main__":
    sys.exit(main())
