"""Compile the model's programs for a TPU slice on a machine without one, and report what they need there.

The compiler is the slice's (libtpu, for a topology by name); the model is abstract. The compiled program is read for
memory, collectives and copies, and compared with the least that the chip has to do: read weights and cache once, and
multiply.

libtpu must not be in an environment in which other JAX programs run on a CPU; `make aot` keeps one of its own.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from glm4v_jax.batch import VisionRows
from glm4v_jax.checkpoints.hf_mapping import DECODER_LAYERS
from glm4v_jax.config.checks import CacheDtype
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.hardware import CHIPS, GIB, Chip
from glm4v_jax.devices.mesh import AXES
from glm4v_jax.errors import ConfigError, counted
from glm4v_jax.generate import device_steps
from glm4v_jax.generate.encode_media import encode_wave
from glm4v_jax.generate.feature_pool import pool_capacity
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import outputs_first
from glm4v_jax.model.quantize import for_inference, quantize_model
from glm4v_jax.model.runtime import Flat
from glm4v_jax.planning import hlo
from glm4v_jax.planning.parameter_layout import parameter_layout

NUM_EOS, STEPS = 8, 32
LARGE = 2**20
"""Copies of fewer bytes are not of a weight or cache of the 9B."""


SLICES = {chip.generation: chip for chip in CHIPS if chip.links}
"""Generation of a TPU slice -> its chip."""

PARTS = ("visual", "language_model", "lm_head")
_LAYOUT = re.compile(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}")


def topology_devices(topology: str) -> list[jax.Device]:
    """The chips of a slice such as "v5e:2x4", on a machine without them; ConfigError if the slice is unknown."""
    from jax.experimental import topologies

    generation, _, layout = topology.partition(":")
    if generation not in SLICES or not _LAYOUT.fullmatch(layout):
        raise ConfigError(f"topology: found {topology!r}; expected one of {', '.join(SLICES)}, as in 'v5e:2x4'")
    options: dict[str, Any] = {}
    if math.prod(int(side) for side in layout.split("x")) == 1:
        options = dict(chips_per_host_bounds=(1, 1, 1), num_slices=1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"topology: found {topology!r}, which the compiler refuses ({error})") from error


def topology_mesh(topology: str, *, data: int = 1, fsdp: int = 1, kv: int = 1, q: int = 1, seq: int = 1) -> Mesh:
    """Make a mesh of the chips of a slice such as "v5e:2x4", on a machine without them.

    Raises:
      ConfigError: the slice is unknown, or has another number of chips.
    """
    found, sizes = topology_devices(topology), (data, fsdp, kv, q, seq)
    if len(found) != math.prod(sizes):
        needed = " ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"topology: {topology} has {counted(len(found), 'chip')}; expected as many as a mesh of {needed} needs"
        )
    return Mesh(np.array(found).reshape(sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def abstract_model(config: Glm4vConfig, mesh: Mesh, quantize: str | None = None) -> Glm4v:
    """Make the abstract model in bfloat16 or quantised, sharded, layers stacked; to be called within `mesh`."""
    scheme = for_inference(quantize)

    def make() -> Glm4v:
        model = Glm4v.init(config, dtype=jnp.bfloat16)
        return model if scheme is None else quantize_model(model, scheme)

    return placed(jax.eval_shape(make), mesh)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
      name: for the reader.
      trace: (model, mesh) -> the traced program; called within the mesh.
      read: bytes that a run has to read at least, on all chips together, besides the weights of `parts`.
      flops: floating point operations of a run, on all chips together.
      kernel_flops: those of them in attention kernels, whose cycles the compiler does not estimate.
      parts: names of the model's parts whose weights it reads.
      loop: number of nested loops around an instruction that runs once per layer.
      beside: (model, mesh) -> what else is on the chips while it runs, besides the weights of other parts.
    """

    name: str
    trace: Callable[[Glm4v, Mesh], jax.stages.Traced]
    read: int
    flops: float
    parts: tuple[str, ...]
    loop: int
    beside: Callable[[Glm4v, Mesh], Any] = lambda model, mesh: ()
    kernel_flops: float = 0.0


def abstract_vision_rows(config: Glm4vConfig, *shape: int) -> VisionRows:
    """Make abstract vision rows, of leading dimensions that end in [R, L]."""
    vision = config.vision_config

    def of(dtype: Any, *rest: int) -> Any:
        return jax.ShapeDtypeStruct((*shape, *rest), dtype)

    grid = of(jnp.float32, vision.position_grid)
    return VisionRows(of(jnp.float32, vision.patch_dim), of(jnp.int32), of(jnp.int32, 2), grid, grid)


def decode_program(
    config: Glm4vConfig,
    batch: int,
    slots: int,
    cache_dtype: CacheDtype = "auto",
    variant: device_steps.Variant | None = None,
) -> Program:
    """The decode program: a step of `batch` rows, each with a cache of `slots`."""

    def trace(model: Glm4v, mesh: Mesh) -> jax.stages.Traced:
        text, head = _text_and_head(_served(model, mesh))
        state = _state(text, mesh, batch, slots, cache_dtype)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        options = {"num_steps": STEPS, "variant": variant or device_steps.Variant()}
        return device_steps.decode.trace(text, head, state, number, number, **options)

    text = config.text_config
    decoder, head = _kernels(config, DECODER_LAYERS), text.hidden_size * text.vocab_size
    name = f"decode B={batch} S={slots:,}" + (f", cache {cache_dtype}" if cache_dtype != "auto" else "")
    return Program(
        name, trace, batch * slots * _cache_bytes(config, cache_dtype),
        batch * (2 * (decoder + head) + _attention_flops(config, slots)), ("language_model", "lm_head"), 2,
    )  # fmt: skip


def prefill_program(
    config: Glm4vConfig, batch: int, tokens: int, slots: int, vision_tokens: int = 0, state_rows: int = 0
) -> Program:
    """The prefill program: the last chunk, of `tokens` tokens, of `batch` prompts that fill caches of `slots`.

    The prompts are the whole batch, or one row of each shard of a state of `state_rows` rows.
    """

    def trace(model: Glm4v, mesh: Mesh) -> jax.stages.Traced:
        text, _ = _text_and_head(_served(model, mesh))
        state = _state(text, mesh, state_rows or batch, slots)
        seen = jax.ShapeDtypeStruct((batch, state.seen.shape[1]), jnp.bool_)
        rows = jax.ShapeDtypeStruct((batch,), jnp.int32) if state_rows else None
        ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
        positions = jax.ShapeDtypeStruct((3, batch, tokens), jnp.int32)
        chunk = device_steps.PrefillChunk(ids, positions, ids, ids, jax.ShapeDtypeStruct((batch,), jnp.int32))
        shape = (pool_capacity(vision_tokens), config.text_config.hidden_size)
        pool = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, jax.P(None, None)))
        return device_steps.prefill.trace(text, state, rows, chunk, seen, pool)

    before = slots - tokens
    attention = batch * tokens * _attention_flops(config, before + tokens / 2)
    flops = batch * tokens * 2 * _kernels(config, DECODER_LAYERS) + attention
    name = f"prefill {batch} x {tokens:,} of {slots:,}" + (f", beside {state_rows}" if state_rows else "")
    read = batch * slots * _cache_bytes(config)
    return Program(name, trace, read, flops, ("language_model",), 1, kernel_flops=attention)


def copy_program(config: Glm4vConfig, slots: int, state_rows: int) -> Program:
    """The program that gives a row of `state_rows`, each with a cache of `slots`, what another holds."""

    def trace(model: Glm4v, mesh: Mesh) -> jax.stages.Traced:
        state = _state(_text_and_head(_served(model, mesh))[0], mesh, state_rows, slots)
        row = jax.ShapeDtypeStruct((1,), jnp.int32)
        seen = jax.ShapeDtypeStruct((1, state.seen.shape[1]), jnp.bool_)
        return device_steps.copy_rows.trace(state, row, row, row, seen)

    return Program(f"copy 1 of {state_rows} x {slots:,}", trace, slots * _cache_bytes(config), 0, (), 0)


def encode_program(
    config: Glm4vConfig, rows: int, length: int, frame: int, state_rows: int = 0, slots: int = 0
) -> Program:
    """The ViT's program: `rows` rows of `length` patches, of images of `frame` patches.

    Beside it is a state of `state_rows` rows, each with a cache of `slots`.
    """
    vision = config.vision_config

    def trace(model: Glm4v, mesh: Mesh) -> jax.stages.Traced:
        order = jax.ShapeDtypeStruct((rows, length // vision.spatial_merge_size**2), jnp.int32)
        visual = Flat.of(_served(model, mesh).visual)
        return encode_wave.trace(visual, abstract_vision_rows(config, rows, length), order)

    blocks, merged = _kernels(config, "visual.blocks."), _kernels(config, "visual.downsample.", "visual.merger.")
    attention = rows * length * 4 * vision.depth * frame * vision.hidden_size
    flops = attention + rows * length * 2 * (blocks + merged / vision.spatial_merge_size**2)

    def beside(model: Glm4v, mesh: Mesh) -> Any:
        return _state(_text_and_head(model)[0], mesh, state_rows, slots) if state_rows else ()

    name = f"encode {rows} x {length:,}" + (f", beside {state_rows} of {slots:,}" if state_rows else "")
    return Program(name, trace, 0, flops, ("visual",), 1, beside, attention)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for a slice; GiB and bytes are those of one chip.

    Attributes:
      program, topology, mesh: what was compiled, and for what.
      seconds: time to compile.
      arguments, temporaries, outputs: GiB; outputs that alias donated arguments are not counted again.
      hbm: GiB of the chip that programs may use.
      collectives: kind -> (in the layer loop, elsewhere).
      copies: weights or caches that are copied: (shape, whether in the layer loop).
      held: bytes that a chip holds of weights and caches, over its part of them if nothing were replicated.
      floor_ms: the least time of a run (decoding: of a step), by bandwidth and by FLOP/s.
      received: GB that the chip receives from others in a run; in a step, of a program that ends when its tokens do.
      peak: the most GiB in use at a time, arguments included, as the compiler has laid them out; less than the sum
        where temporaries reuse the memory of donated arguments.
      beside: GiB of what else is on the chip, such as the weights of other parts of the model.
      megacycles: of a run or step, by the compiler's own estimate; see `Traffic`.
      estimated_ms: see `estimated_ms`.
    """

    program: str
    topology: str
    mesh: dict[str, int]
    seconds: float
    arguments: float
    temporaries: float
    outputs: float
    hbm: float
    collectives: dict[str, tuple[int, int]]
    copies: list[tuple[str, bool]]
    held: float
    floor_ms: tuple[float, float]
    received: float
    peak: float
    beside: float
    megacycles: float
    estimated_ms: float

    @property
    def fits(self) -> bool:
        """Whether the chip has room for it, and for what else is there."""
        return self.peak + self.beside <= self.hbm


class Traffic(NamedTuple):
    """What a compiled program moves and computes; fields as in `Compiled`.

    megacycles: as the compiler estimates them for each instruction but collectives, kernels, and copies that run beside
      others; branches that may not be taken do not count.
    """

    collectives: dict[str, tuple[int, int]]
    copies: list[tuple[str, bool]]
    received: float
    megacycles: float


def traffic(text: str, *, loop: int, large: int = LARGE) -> Traffic:
    """Read what a program moves from the text of its optimised HLO; copies of fewer than `large` bytes do not count.

    `loop`: number of nested loops around an instruction that runs once per layer.
    """
    collectives: dict[str, tuple[int, int]] = {}
    copies, received, cycles = [], 0.0, 0
    for found in hlo.instructions(text):
        inside = found.loops >= loop
        cycles += 0 if found.is_conditional else found.cycles * found.runs
        if found.opcode in hlo.COLLECTIVES:
            a, b = collectives.get(found.opcode, (0, 0))
            collectives[found.opcode] = (a + inside, b + (not inside))
            received += found.received * found.runs / 1e9
        elif found.opcode in hlo.MOVES and found.in_hbm and found.nbytes >= large and not found.is_conditional:
            copies.append((found.shape, inside))
    return Traffic(collectives, copies, received, cycles / 1e6)


def compile_for(
    program: Program,
    config: Glm4vConfig,
    topology: str,
    *,
    quantize: str | None = None,
    large: int = LARGE,
    **sizes: int,
) -> Compiled:
    """Compile a program for a slice and a mesh of these sizes; copies of fewer than `large` bytes do not count.

    `quantize`: "int8" for weights as `load_runtime` quantises them. ConfigError if the slice is unknown, or a dimension
    of the model does not divide by the mesh.
    """
    mesh = topology_mesh(topology, **sizes)
    chip = SLICES[topology.partition(":")[0]]
    with jax.set_mesh(mesh):
        model = abstract_model(config, mesh, quantize)
        others = [getattr(model, part) for part in PARTS if part not in program.parts]
        beside = chip_bytes((others, program.beside(model, mesh)))
        lowered = program.trace(model, mesh).lower()
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    weights = sum(_bytes(getattr(model, part)) for part in program.parts)
    moved = traffic(compiled.as_text(), loop=program.loop, large=large)
    chips, name = mesh.size, program.name + (f", {quantize}" if quantize else "")
    return Compiled(
        name, topology, {k: v for k, v in mesh.shape.items() if v > 1}, seconds,
        memory.argument_size_in_bytes / GIB, memory.temp_size_in_bytes / GIB,
        (memory.output_size_in_bytes - memory.alias_size_in_bytes) / GIB,
        chip.available / GIB, moved.collectives, moved.copies,
        memory.argument_size_in_bytes * chips / (weights + program.read),
        (
            1e3 * (weights + program.read) / chips / chip.bandwidth,
            1e3 * program.flops / chips / chip.flops,
        ),
        moved.received, memory.peak_memory_in_bytes / GIB, beside / GIB, moved.megacycles,
        estimated_ms(chip, moved.megacycles, moved.received, program.kernel_flops / chips),
    )  # fmt: skip


def estimated_ms(chip: Chip, megacycles: float, received: float, kernel_flops: float = 0.0) -> float:
    """Estimate the time of a run, one part after the other: a model to compare programs with, not a measurement.

    >>> round(estimated_ms(SLICES["v5e"], megacycles=15, received=0.2, kernel_flops=197e9), 1)
    12.0

    Args:
      chip: with its clock.
      megacycles: see `Traffic`; each instruction has the compiler's overhead of about 2,000 cycles in them.
      received: GB, over all links of the chip at their full rate: no latency, and no overlap with the rest.
      kernel_flops: on this chip, at its full rate.
    """
    return 1e3 * (megacycles * 1e6 / chip.clock + received * 1e9 / chip.links + kernel_flops / chip.flops)


def _served(model: Glm4v, mesh: Mesh) -> Glm4v:
    """The model as `load_runtime` reads it on a TPU."""
    return placed(jax.eval_shape(outputs_first, model), mesh)


def _text_and_head(model: Glm4v) -> tuple[Flat, Flat | None]:
    return Flat.of(model.language_model), None if model.lm_head is None else Flat.of(model.lm_head)


def _state(text: Flat, mesh: Mesh, rows: int, slots: int, cache_dtype: CacheDtype = "auto") -> device_steps.SlotsState:
    def make(text: Flat) -> device_steps.SlotsState:
        return device_steps.init_state(text, rows, slots, NUM_EOS, stacked=True, cache_dtype=cache_dtype)

    return placed(jax.eval_shape(make, text), mesh)


def placed(tree: Any, mesh: Mesh) -> Any:
    """Put abstract arrays on the devices of `mesh`; those without a partition are replicated."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        spec = jax.P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def chip_bytes(tree: Any) -> int:
    """Bytes that a chip holds of placed arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _cache_bytes(config: Glm4vConfig, dtype: CacheDtype = "auto") -> int:
    """Bytes of a token in the caches of all layers, bfloat16 or integers with a float32 scale for each head."""
    text = config.text_config
    assert text.num_key_value_heads is not None
    head = text.head_dim + 4 if dtype == "int8" else 2 * text.head_dim
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head


def _kernels(config: Glm4vConfig, *prefixes: str) -> int:
    """Number of weights in the kernels under some paths, all of which a token is multiplied with."""
    leaves = (leaf for leaf in parameter_layout(config) if leaf.path.startswith(prefixes))
    return sum(leaf.parameters for leaf in leaves if leaf.path.endswith(".kernel"))


def _attention_flops(config: Glm4vConfig, keys: float) -> float:
    """Operations of a query of every head in every layer."""
    text = config.text_config
    return 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * keys
