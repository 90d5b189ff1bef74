"""What `bench.device` measures, on paper: each workload's size, the least that it reads and computes, and its aim.

>>> from bench.device.table import Rates, floor
>>> decode = workloads(tiny=False)["decode, B = 1"]
>>> f"{decode.read / 1e9:.1f} GB, {floor(decode, Rates(4.8e12, 989e12)) * 1e3:.2f} ms"
'17.7 GB, 3.69 ms'
"""

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from bench.device.table import Aim, Workload
from glm4v_jax.config.members import DEFAULT, MEMBERS
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.lora import LoraConfig, add_lora, is_lora
from glm4v_jax.planning import compile_for_topology
from glm4v_jax.planning.parameter_layout import parameter_layout
from train.compile_for_topology import Shapes
from train.flops import step_flops
from train.state import Leaves, split


class Sizes(NamedTuple):
    """Sizes of all workloads.

    copied: bytes of the array that is copied.
    matrix: rows and columns of the matrices that are multiplied.
    batches, slots: of decoding: rows, and cache slots of each.
    steps: decode steps of a dispatch.
    prompts: tokens of the prompts that are prefilled.
    chunked: tokens of a prompt, and of the longer chunks in which it is prefilled as well.
    images: name -> (how many, height and width in patches).
    attention: tokens of a prompt, and patches of an image; 0 for none.
    rank, rows, length, vision_rows, vision_length: of training steps; see `train.compile_for_topology.Shapes`.
    layers: of the decoder that is trained whole.
    requests, text, side, new: how many; tokens of text, patches along a side of their image, and new tokens of each.
    num_slots: requests that run at a time.
    """

    copied: int = 8 * 2**30
    matrix: int = 8192
    batches: tuple[int, ...] = (1, 8, 32, 64)
    slots: int = 4096
    steps: int = 32
    prompts: tuple[int, ...] = (1024, 8192, 32768)
    chunked: tuple[int, int] = (8192, 2048)
    images: Mapping[str, tuple[int, int, int]] = {
        "672 x 672": (1, 48, 48), "4K": (1, 128, 192), "64 of 224 x 224": (64, 16, 16),
    }  # fmt: skip
    attention: tuple[int, int] = (8192, 2304)
    rank: int = 8
    rows: int = 4
    length: int = 2048
    vision_rows: int = 4
    vision_length: int = 2048
    layers: int = 4
    requests: int = 1000
    text: int = 1088
    side: int = 32
    new: int = 500
    num_slots: int = 128

    @property
    def prompt(self) -> int:
        """Tokens of a request's prompt: the merged ones of its image are a quarter of the patches."""
        return self.text + self.side**2 // 4


FULL = Sizes()
# Few programs: one prompt fills what is decoded, requests are as long, and their images are those of the ViT.
TINY = Sizes(
    copied=2**16, matrix=64, batches=(1,), slots=512, prompts=(512,), chunked=(512, 512),
    images={"112 x 112": (1, 8, 8)}, attention=(64, 0), rank=2, rows=1, length=32, vision_rows=1, vision_length=16,
    layers=1, requests=3, text=464, side=8, new=4, num_slots=1,
)  # fmt: skip


def config_of(tiny: bool) -> Glm4vConfig:
    """Return the 9B's configuration, or a tiny one; with the packaged tokenizer's ids, so that its processor serves."""
    small = MEMBERS[DEFAULT].config(tiny=True)
    if tiny:
        return shortened(small, 2)
    ids = {name: value for name, value in small.to_dict().items() if name.endswith("token_id")}
    return Glm4vConfig.from_dict(MEMBERS[DEFAULT].config().to_dict() | ids)


@functools.cache
def workloads(tiny: bool) -> dict[str, Workload]:
    """Return all workloads by name, in the order of the report."""
    sizes, config = TINY if tiny else FULL, config_of(tiny)
    return dict(
        [*_ceilings(sizes), *_generation(sizes, config), *_vision(sizes, config), *_training(sizes, config),
         *_requests(sizes, config)]
    )  # fmt: skip


def decoder_bytes(config: Glm4vConfig, scheme: str = "none") -> float:
    """Return the bytes of weights that a decode step reads: all of decoder and head, of the embedding a row alone."""
    leaves = (
        leaf for leaf in parameter_layout(config, scheme)
        if leaf.path.startswith(("language_model.", "lm_head.")) and ".embed_tokens." not in leaf.path
    )  # fmt: skip
    return sum(leaf.parameters * (leaf.bits or 16) / 8 for leaf in leaves)


_Named = Iterator[tuple[str, Workload]]


def _ceilings(sizes: Sizes) -> _Named:
    yield "copy", Workload("ceilings", 2 * sizes.copied, 0)
    yield "read", Workload("ceilings", sizes.copied, 0)
    for name in ("bfloat16", "int8"):
        yield f"matrix product, {name}", Workload("ceilings", 0, 2 * sizes.matrix**3)


def _generation(sizes: Sizes, config: Glm4vConfig) -> _Named:
    for scheme, suffix in (("none", ""), ("int8", ", int8")):
        part, weights = "int8" if suffix else "decode", decoder_bytes(config, scheme)
        for batch in sizes.batches:
            program = compile_for_topology.decode_program(config, batch, sizes.slots)
            aim = Aim("bandwidth", 0.83) if batch == 1 and not suffix else None
            work = Workload(part, weights + program.read, program.flops, batch, "tokens", aim)
            yield f"decode, B = {batch}{suffix}", work
        for tokens in sizes.prompts:
            flops = compile_for_topology.prefill_program(config, 1, tokens, tokens).flops
            aim = None if suffix else Aim("matmul", 0.45)
            part = "int8" if suffix else "prefill"
            yield f"prefill, {tokens:,} tokens{suffix}", Workload(part, weights, flops, tokens, "tokens", aim)
    program = compile_for_topology.decode_program(config, 1, sizes.slots)
    work = Workload("unstacked", decoder_bytes(config) + program.read, program.flops, 1, "tokens")
    yield "decode, B = 1, layers one by one", work
    tokens, chunk = sizes.chunked
    flops = compile_for_topology.prefill_program(config, 1, tokens, tokens).flops
    work = Workload("prefill", decoder_bytes(config), flops, tokens, "tokens")
    yield f"prefill, {tokens:,} tokens, chunks of {chunk:,}", work


def _vision(sizes: Sizes, config: Glm4vConfig) -> _Named:
    for name, (count, height, width) in sizes.images.items():
        program = compile_for_topology.encode_program(config, count, height * width, height * width)
        yield f"ViT, {name}", Workload("vision", 0, program.flops, count, "images")
    text, vision = config.text_config, config.vision_config
    tokens, patches = sizes.attention
    for kernel in KERNELS:
        flops = 4 * text.num_attention_heads * text.head_dim * tokens**2 / 2
        yield f"attention, {tokens:,} tokens, {kernel}", Workload("attention", 0, flops)
        if patches:
            flops = 4 * vision.hidden_size * patches**2
            yield f"attention, {patches:,} patches, {kernel}", Workload("attention", 0, flops)


KERNELS = ("the device's kernel", "blocks")
"""Attention: by cuDNN on a GPU, by the splash kernel on a TPU; and in blocks of matrix products, on any platform."""


def _training(sizes: Sizes, config: Glm4vConfig) -> _Named:
    tokens, aim, lora = sizes.rows * sizes.length, Aim("FLOP/s", 0.45), LoraConfig(rank=sizes.rank)
    flops = _step_flops(sizes, config, lora)
    yield f"training, LoRA of rank {sizes.rank}", Workload("lora", 0, flops, tokens, "tokens", aim)
    flops = _step_flops(sizes, shortened(config, sizes.layers))
    yield f"training, all weights, {sizes.layers} layers", Workload("full", 0, flops, tokens, "tokens", aim)


def _step_flops(sizes: Sizes, config: Glm4vConfig, lora: LoraConfig | None = None) -> float:
    """Operations of a step that trains an adapter, or all weights without one."""

    def made() -> tuple[Leaves, Leaves]:
        model = Glm4v.init(config)
        return split(model, lambda path: True) if lora is None else split(add_lora(model, lora), is_lora)

    with use_mesh():
        params, frozen = jax.eval_shape(made)
    work = Shapes(sizes.rows, sizes.length, sizes.vision_rows, sizes.vision_length).work
    return step_flops(config, params, frozen, work)


def shortened(config: Glm4vConfig, layers: int) -> Glm4vConfig:
    """Return the configuration with a decoder of this many layers."""
    data = config.to_dict()
    return Glm4vConfig.from_dict(data | {"text_config": data["text_config"] | {"num_hidden_layers": layers}})


def _requests(sizes: Sizes, config: Glm4vConfig) -> _Named:
    patches, held = sizes.side**2, sizes.prompt + sizes.new // 2
    flops = compile_for_topology.prefill_program(config, 1, sizes.prompt, sizes.prompt).flops
    flops += compile_for_topology.encode_program(config, 1, patches, patches).flops
    cache = compile_for_topology.decode_program(config, 1, held).read
    read = sizes.new * (decoder_bytes(config) / sizes.num_slots + cache)
    aim = Aim("per second", 12, "NVIDIA H200")
    yield "requests", Workload("requests", read, flops, 1, "requests", aim, is_serial=True)
