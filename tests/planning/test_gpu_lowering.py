"""The programs as XLA gets them for an NVIDIA GPU: lowering needs neither a GPU nor its driver.

JAX traces with the platform of a mesh, chooses kernels by it, and emits StableHLO. That shows errors in tracing and
lowering, and which kernels are called; not what XLA's compiler and cuDNN make of it.
"""

import collections
import dataclasses
import math
import re
import types
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import AXES
from glm4v_jax.model.lora import LoraConfig
from glm4v_jax.planning import compile_for_topology as topology
from train.compile_for_topology import Shapes, step_program
from train.rl.compile_for_topology import (
    RewardJob,
    handover_program,
    policy_program,
    rollout_program,
    update_program,
)

pytestmark = pytest.mark.slow

CONFIG = Glm4vConfig.tiny()
SHAPES = Shapes(2, 32, 2, 64)
REWARD = RewardJob(CONFIG, dict(fsdp=2, kv=2), dict(kv=2, q=2), LoraConfig(rank=4))
CUDNN = 91002
"""Version of cuDNN that JAX's check is told of; it would ask the library."""
CUDNN_CALLS = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


class Gpu:
    """What JAX asks a device for before it compiles; an abstract mesh would do, but for cuDNN's calls."""

    platform, device_kind, process_index = "gpu", "NVIDIA H200", 0

    def __init__(self, number):
        self.id = number
        self.client = jax.devices()[0].client

    def default_memory(self):
        return types.SimpleNamespace(kind="device")

    def addressable_memories(self):
        return []


@dataclasses.dataclass(frozen=True)
class Lowered:
    """StableHLO; functions that its custom calls name; arrays donated, and reused for results; dtypes of arrays."""

    text: str
    calls: collections.Counter[str]
    donated: int
    reused: int
    dtypes: set[str]


def lower(program, *, quantize=None, **sizes):
    """Lower a program for a mesh of H200s."""
    counts = [sizes.get(axis, 1) for axis in AXES]
    devices = np.array([Gpu(i) for i in range(math.prod(counts))]).reshape(counts)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    cudnn = mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: CUDNN)
    with jax.set_mesh(mesh), cudnn:
        traced = program.trace(topology.abstract_model(CONFIG, mesh, quantize), mesh)
        found = traced.lower(lowering_platforms=("cuda",))
    text, donated = found.as_text(), sum(argument.donated for argument in jax.tree.leaves(found.args_info))
    calls = collections.Counter(re.findall(r"stablehlo\.custom_call @([\w$.]+)", text))
    reused = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
    return Lowered(text, calls, donated, reused, set(re.findall(r"tensor<(?:\d+x)*(\w+)>", text)))


PROGRAMS = {
    "decode": (topology.decode_program(CONFIG, 8, 64), {}),
    "decode, cache in int8": (topology.decode_program(CONFIG, 8, 64, "int8"), {}),
    "decode, int8": (topology.decode_program(CONFIG, 8, 64), dict(quantize="int8")),
    "decode, int4": (topology.decode_program(CONFIG, 8, 64), dict(quantize="int4")),
    "decode on a mesh": (topology.decode_program(CONFIG, 8, 64), dict(data=2, kv=2, q=2)),
    "prefill": (topology.prefill_program(CONFIG, 1, 32, 64, 16, 4), {}),
    "prefill, int4": (topology.prefill_program(CONFIG, 1, 32, 64, 16, 4), dict(quantize="int4")),
    "copy": (topology.copy_program(CONFIG, 64, 4), {}),
    "encode": (topology.encode_program(CONFIG, 2, 64, 64), {}),
    "training step on a mesh": (step_program(CONFIG, SHAPES), dict(fsdp=2, kv=2)),
    "LoRA step": (step_program(CONFIG, SHAPES, lora=LoraConfig(rank=4)), {}),
    "rollout": (rollout_program(REWARD, 8, 64), REWARD.engine),
    "policy step": (policy_program(REWARD, SHAPES), REWARD.training),
    "policy update": (update_program(REWARD), REWARD.training),
    "handover": (handover_program(dataclasses.replace(REWARD, lora=None)), REWARD.training),
}
NO_PRODUCTS = ("copy", "policy update", "handover")


@pytest.fixture(scope="module")
def lowered():
    """Every program of `PROGRAMS`."""
    return {name: lower(program, **options) for name, (program, options) in PROGRAMS.items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_have_neither_float64_nor_callbacks(lowered, name):
    found = lowered[name]
    assert "f32" in found.dtypes and not any("f64" in dtype for dtype in found.dtypes)
    assert set(found.calls) <= CUDNN_CALLS


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in NO_PRODUCTS])
def test_products_are_of_bfloat16(lowered, name):
    """Of integers too once they are dequantised; the ViT's position table alone is float32."""
    operands = re.findall(r"dot_general.* : \(tensor<([^>]*)>, tensor<([^>]*)>\)", lowered[name].text)
    cells = f"x{CONFIG.vision_config.position_grid**2}x"
    others = [pair for pair in operands if not all(shape.endswith("bf16") for shape in pair)]
    assert operands and all(any(cells in f"x{shape}" for shape in pair) for pair in others)


def test_attention_is_by_cudnn_where_rows_may_be_plain(lowered):
    """In the ViT and in training, recomputed and backward as well; decoding and chunks after a cache it cannot do."""
    calls = {name: found.calls for name, found in lowered.items()}
    assert calls["encode"] == {"__cudnn$fmhaSoftmax": 1}
    trained, adapted = calls["training step on a mesh"], calls["LoRA step"]
    assert trained == {"__cudnn$fmhaSoftmax": 4, "__cudnn$fmhaSoftmaxBackward": 2}
    assert adapted == {"__cudnn$fmhaSoftmax": 3, "__cudnn$fmhaSoftmaxBackward": 1}
    assert calls["policy step"] == adapted
    assert not any(calls[name] for name in calls if name.startswith(("decode", "prefill", "rollout", *NO_PRODUCTS)))
    masks = re.findall(r"mask_type\\22: \\22(\w+)\\22", lowered["LoRA step"].text)
    assert set(masks) == {"PADDING", "PADDING_CAUSAL"}


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in ("encode", "handover")])
def test_what_is_donated_is_reused(lowered, name):
    """State of slots and of a training step: a result takes the memory of each array."""
    found = lowered[name]
    assert found.reused == found.donated > 10


def test_a_handover_reuses_nothing(lowered):
    """The engine's weights share no memory with the trained ones, which the next step donates."""
    assert lowered["handover"].donated == 0
