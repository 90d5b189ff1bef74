"""The vLLM plug-in's programs compiled for TPU slices that are not here, with tpu-inference's attention kernel.

Run by `make aot-vllm`, in the environment of `make serve-vllm`. Steps and logits are the programs that tpu-inference
jits, with its options of the compiler. The model is abstract, the engine's configuration is a stub, and the kernel gets
the generation of the chip from this program, as it would read it from the devices of the process.

A line fails if it does not fit its chips beside the rest of the model and the pages; if a step has collectives other
than two all-reduces a layer and one of the embedding; and if a step or logits copy weights or pages.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

from bench import report
from bench.aot import compile_all

Kind = Literal["step", "logits", "vision"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Attributes:
      topology: the slice; an engine takes its first chips.
      tensor: chips of the engine, `--tensor-parallel-size`.
      kind: a step, the logits after one, or the ViT.
      size: tokens of the step, padded; sequences that get a token; patches of an image.
      layers: of the decoder.
      quantize: "int8" for integers.
      rows: of the patches.
    """

    topology: str
    tensor: int
    kind: Kind
    size: int
    layers: int = 40
    quantize: str | None = None
    rows: int = 1

    @property
    def title(self) -> str:
        """What the table calls it."""
        what = {
            "step": f"step of {self.size:,} tokens, {self.layers} layers",
            "logits": f"logits of {self.size} tokens",
            "vision": f"{'image' if self.rows == 1 else 'video'} of {self.size:,} patches",
        }[self.kind]
        return what + (f", {self.quantize}" if self.quantize else "")


MODEL_LENGTH, PAGE, SEQUENCES, LARGEST = 16_384, 16, 16, 8192
"""`--max-model-len`, the tokens of a page that vLLM chooses for it, `--max-num-seqs`, `--max-num-batched-tokens`."""
IMAGE, VIDEO = (24_576, 1), (49_152, 8)
"""Patches and rows of the largest image and video that the released processor makes of `MODEL_LENGTH`, padded."""
UTILIZATION = 0.9
"""`--gpu-memory-utilization`: pages fill what weights leave of this fraction; the rest is for temporaries."""
ENGINES: tuple[tuple[str, int, str | None], ...] = (("v6e:1x1", 1, None), ("v5e:2x2", 2, None), ("v5e:1x1", 1, "int8"))
"""Slices, chips of an engine and weights that the guide names."""
PROGRAMS: tuple[tuple[Kind, int, int], ...] = (
    ("step", 128, 1), ("step", LARGEST, 1), ("logits", SEQUENCES, 1), ("vision", *IMAGE), ("vision", *VIDEO),
)  # fmt: skip
"""Kinds, sizes and rows of an engine's programs."""
CASES = (
    *(Case(slice_, 1, "step", 128, 2) for slice_ in ("v5e:1x1", "v6e:1x1")),
    *(Case(slice_, 2, "step", 128, 2) for slice_ in ("v5e:2x2", "v6e:2x2")),
    *(Case(slice_, 2, "step", 2048, 2) for slice_ in ("v5e:2x2", "v6e:2x2")),
    *(
        Case(slice_, tensor, kind, size, quantize=quantize, rows=rows)
        for slice_, tensor, quantize in ENGINES
        for kind, size, rows in PROGRAMS
    ),
)

COLUMNS = (
    "program", "slice", "chips of it", "compile s", "weights", "pages", "tokens in pages", "temporaries", "in all",
    "of HBM", "attention kernels", "all-reduces", "other collectives", "copies", "",
)  # fmt: skip


def compile_case(case: Case) -> dict[str, Any]:
    """Compile a program in this process."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from glm4v_jax.devices.hardware import GIB
    from glm4v_jax.devices.mesh import explicit
    from glm4v_jax.planning.compile_for_topology import SLICES, chip_bytes, placed, topology_devices, traffic

    chips = np.array(topology_devices(case.topology)[: case.tensor]).reshape(1, case.tensor)
    generation = case.topology.partition(":")[0]
    hbm = SLICES[generation].available
    mesh = Mesh(chips, ("data", "model"))  # of automatic axes, as the engine has it
    model = _abstract_model(case, explicit(mesh))
    weights = chip_bytes(model)
    with jax.set_mesh(mesh), _kernel_for(generation):
        pages = _pages(case, mesh, hbm, weights)
        if case.kind == "vision":
            lowered = _vision_program(case, model, explicit(mesh))
        elif case.kind == "logits":
            lowered = _logits_program(case, placed(model, mesh), mesh)
        else:
            lowered = _step_program(case, placed(model, mesh), mesh, pages)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    moved = traffic(text, loop=1)
    others = weights + chip_bytes(pages) - memory.argument_size_in_bytes
    return dataclasses.asdict(case) | {
        "program": case.title,
        "seconds": seconds,
        "weights": weights / GIB,
        "pages": chip_bytes(pages) / GIB,
        "paged_tokens": pages[0].shape[0] * PAGE,
        "arguments": memory.argument_size_in_bytes / GIB,
        "temporaries": memory.temp_size_in_bytes / GIB,
        "in_all": (memory.peak_memory_in_bytes + max(others, 0)) / GIB,
        "hbm": hbm / GIB,
        "kernels": text.count('custom_call_target="tpu_custom_call"') if case.kind == "step" else 0,
        "collectives": {kind: sum(counts) for kind, counts in moved.collectives.items()},
        "copies": [shape for shape, _ in moved.copies if not _is_of_tokens(shape, case.size)],
        "megacycles": moved.megacycles,
    }


def _is_of_tokens(shape: str, tokens: int) -> bool:
    """Whether one of the first two dimensions is the step's: queries that the kernel wants in another order."""
    return str(tokens) in shape.partition("[")[2].rstrip("]").split(",")[:2]


@contextlib.contextmanager
def _kernel_for(generation: str) -> Iterator[None]:
    """Give tpu-inference's kernel the chip that it is compiled for; it would ask the devices of this process."""
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel, tuned_block_sizes

    with contextlib.ExitStack() as patches:
        for module in (kernel, tuned_block_sizes):
            patches.enter_context(mock.patch.object(module, "get_tpu_version", lambda: int(generation[1])))
        name = mock.patch.object(tuned_block_sizes, "get_device_name", lambda count=None: f"TPU {generation}")
        patches.enter_context(name)
        yield


def _abstract_model(case: Case, twin: Any) -> Any:
    """The model as the plug-in loads it: the decoder layer by layer, weights sharded over the engine's chips."""
    import jax
    import jax.numpy as jnp

    from glm4v_jax.config.model import Glm4vConfig
    from glm4v_jax.devices.mesh import use_mesh
    from glm4v_jax.model.glm4v import Glm4v
    from glm4v_jax.model.kernel_order import outputs_first
    from glm4v_jax.model.layers import unstack
    from glm4v_jax.model.quantize import for_inference, quantize_model
    from glm4v_jax.model.rules import rules_for
    from glm4v_jax.planning.compile_for_topology import placed

    config, scheme = Glm4vConfig.glm4_1v_9b(), for_inference(case.quantize)
    text = dataclasses.replace(config.text_config, num_hidden_layers=case.layers)

    def make() -> Glm4v:
        model = Glm4v.init(dataclasses.replace(config, text_config=text), dtype=jnp.bfloat16)
        model = outputs_first(model if scheme is None else quantize_model(model, scheme))
        model.language_model.layers = unstack(model.language_model.layers)
        return model

    with use_mesh(twin, rules_for(config, twin)):
        return placed(jax.eval_shape(make), twin)


def _adapter(model: Any, mesh: Any) -> tuple[Any, Any]:
    """The plug-in's class as `load_weights` leaves it: its leaves, and (method, leaves, arguments) -> result."""
    import jax
    from flax import nnx

    from glm4v_jax.serve.vllm_plugin.model import Glm4vForVllm

    settings = SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=None, runner_type="generate"),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
        lora_config=None, speculative_config=None, additional_config={},
    )  # fmt: skip
    adapter = Glm4vForVllm(settings, None, mesh)
    adapter.text, adapter.head = nnx.data(model.language_model), nnx.data(model.lm_head)
    graph, state = nnx.split(adapter)
    leaves, tree = jax.tree.flatten(state)
    return leaves, lambda name, leaves, *rest: getattr(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), name)(*rest)


def _sharding(mesh: Any, *spec: str | None) -> Any:
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(*spec))


def _array(mesh: Any, *shape: int, dtype: Any = "int32", spec: tuple[str | None, ...] = ()) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding(mesh, *spec))


def _pages(case: Case, mesh: Any, hbm: int, weights: int) -> list[Any]:
    """The pages of every layer as tpu-inference lays them out; of the whole model, as many as it would take."""
    import jax.numpy as jnp
    from tpu_inference.runner.kv_cache import get_kv_cache_shape_with_mesh

    from glm4v_jax.config.model import Glm4vConfig
    from glm4v_jax.planning.compile_for_topology import chip_bytes

    text = Glm4vConfig.glm4_1v_9b().text_config

    def of(count: int) -> list[Any]:
        shape = get_kv_cache_shape_with_mesh(mesh, count, PAGE, text.num_key_value_heads, text.head_dim, jnp.bfloat16)
        return [_array(mesh, *shape, dtype=jnp.bfloat16, spec=("data", None, "model"))] * case.layers

    whole = case.layers == text.num_hidden_layers
    return of(int(UTILIZATION * hbm - weights) // chip_bytes(of(1)) if whole else MODEL_LENGTH // PAGE * 8)


def _step_program(case: Case, model: Any, mesh: Any, pages: list[Any]) -> Any:
    """A step, as `get_flax_model` of tpu_inference/models/common/model_loader.py jits it."""
    import jax
    from tpu_inference.layers.common.attention_metadata import AttentionMetadata
    from tpu_inference.models.common.compiler_options import get_step_fn_compiler_options

    leaves, call = _adapter(model, mesh)
    by_token = _sharding(mesh, "data", None)
    program = jax.jit(
        lambda leaves, *arguments: call("__call__", leaves, *arguments),
        out_shardings=([page.sharding for page in pages], by_token, by_token, None),
        donate_argnums=1, static_argnums=(6, 9, 10), compiler_options=get_step_fn_compiler_options(),
    )  # fmt: skip
    metadata = AttentionMetadata(
        input_positions=_array(mesh, 3, case.size),
        block_tables=_array(mesh, SEQUENCES * MODEL_LENGTH // PAGE),
        seq_lens=_array(mesh, SEQUENCES),
        query_start_loc=_array(mesh, SEQUENCES + 1),
        request_distribution=_array(mesh, 3),
        padded_num_reqs=SEQUENCES,
    )
    names = tuple((f"layer.{i}", i) for i in range(case.layers))
    return program.lower(leaves, pages, _array(mesh, case.size), metadata, None, None, names, None, None, True, True)


def _logits_program(case: Case, model: Any, mesh: Any) -> Any:
    """The logits of the tokens that end a step, as jitted there."""
    import jax

    leaves, call = _adapter(model, mesh)
    out = _sharding(mesh, "data", "model")
    program = jax.jit(lambda leaves, hidden: call("compute_logits", leaves, hidden), out_shardings=out)
    size = model.config.text_config.hidden_size
    return program.lower(leaves, _array(mesh, case.size, size, dtype="bfloat16", spec=("data", None)))


def _vision_program(case: Case, model: Any, twin: Any) -> Any:
    """The ViT, for images or frames of one shape."""
    import jax

    from glm4v_jax.devices.mesh import use_mesh
    from glm4v_jax.generate.encode_media import encode_wave
    from glm4v_jax.model.rules import rules_for
    from glm4v_jax.model.runtime import Flat
    from glm4v_jax.planning.compile_for_topology import abstract_vision_rows

    merged = case.size // model.config.vision_config.spatial_merge_size**2
    with use_mesh(twin, rules_for(model.config, twin)):
        rows = abstract_vision_rows(model.config, case.rows, case.size // case.rows)
        order = jax.ShapeDtypeStruct((1, merged), "int32")
        return encode_wave.lower(Flat.of(model.visual), rows, order)


def passes(line: dict[str, Any]) -> bool:
    """Whether a line fits; and of the decoder, whether it copies nothing large and has only the collectives it must."""
    fits, is_step = line["in_all"] <= line["hbm"], line["kind"] == "step"
    if line["kind"] == "vision":
        return fits
    found = {kind: count for kind, count in line["collectives"].items() if count}
    all_reduces = 2 * line["layers"] + 1 if is_step and line["tensor"] > 1 else 0
    return (
        fits
        and found == ({"all-reduce": all_reduces} if all_reduces else {})
        and line["kernels"] == (2 * line["layers"] if is_step else 0)
        and not line["copies"]
    )


def main() -> int:
    """Compile every case in a process of its own, print, write; 1 if one misses its targets."""
    parser = report.parser("bench.aot_vllm", __doc__)
    parser.add_argument("--case", type=int, help="compile this one alone and print it as JSON")
    parser.add_argument("--busy", action="store_true", help="record no times, as the machine also does other things")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(compile_case(CASES[arguments.case])))
        return 0
    titles = {number: f"{case.title} on {case.tensor} of {case.topology}" for number, case in enumerate(CASES)}
    lines, broken = compile_all("bench.aot_vllm", titles, lambda _, found: passes(found), arguments.busy)
    passed = not broken and all(line["passed"] for line in lines)
    facts = report.machine_facts("jax", "libtpu", "tpu-inference", "vllm-tpu")
    figures = {"machine": facts, "programs": lines, "not_compiled": broken, "passed": passed}
    return report.finish("aot_vllm", figures, *tables(figures))


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """The record as people read it."""
    return [report.Table("GiB a chip", COLUMNS, [_row(line) for line in figures["programs"]])]


def _row(line: dict[str, Any]) -> tuple[str, ...]:
    others = (f"{count} {kind}" for kind, count in line["collectives"].items() if kind != "all-reduce" and count)
    seconds = "" if line["seconds"] is None else f"{line['seconds']:.0f}"
    return (
        line["program"], line["topology"], str(line["tensor"]), seconds,
        f"{line['weights']:.2f}", f"{line['pages']:.2f}", f"{line['paged_tokens']:,}", f"{line['temporaries']:.3f}",
        f"{line['in_all']:.2f}", f"{line['hbm']:g}", str(line["kernels"] or ""),
        str(line["collectives"].get("all-reduce", "")), ", ".join(others), ", ".join(line["copies"]),
        report.verdict(line["passed"]),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
