"""Programs of devices for `bench.growth`: their time on this CPU, and the memory that the compiler gives them.

Narrow configurations, so that what grows with the square of a length would be most of the memory.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench import engine, memory, report
from bench.growth_host import Work
from bench.turns import printed_by
from glm4v_jax import Glm4vForConditionalGeneration, Glm4vVisionModel
from glm4v_jax.config.model import Glm4vConfig, Glm4vTextConfig, Glm4vVisionConfig
from glm4v_jax.devices.mesh import make_mesh
from glm4v_jax.generate.engine import Engine
from glm4v_jax.planning import compile_for_topology
from glm4v_jax.planning.compile_for_topology import decode_program, encode_program, prefill_program
from glm4v_jax.tiny import TINY_CHECKPOINT
from train.compile_for_topology import Shapes, step_program

CHUNK, SLOTS = 512, 2048
DEVICES = 8
"""Simulated on this CPU."""


def vision_config() -> Glm4vVisionConfig:
    """Two layers of four heads of 64."""
    return Glm4vVisionConfig(
        depth=2, hidden_size=256, num_heads=4, out_hidden_size=128, intermediate_size=512, spatial_merge_size=2
    )


def text_config(**changes: Any) -> Glm4vTextConfig:
    """Two layers of four heads of 64."""
    fields: dict[str, Any] = dict(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=65536, partial_rotary_factor=0.5,
        rope_scaling={"mrope_section": (4, 6, 6)},
    )  # fmt: skip
    return Glm4vTextConfig(**(fields | changes))


def model_config(text: Glm4vTextConfig, vision: Glm4vVisionConfig) -> Glm4vConfig:
    """A model of both."""
    names = ("image", "video", "image_start", "image_end", "video_start", "video_end")
    ids: dict[str, Any] = {f"{name}_token_id": 511 - number for number, name in enumerate(names)}
    return Glm4vConfig(text_config=text, vision_config=vision, **ids)


def narrow() -> Glm4vConfig:
    """The configurations of `bench.memory`."""
    text = memory.text_config()
    vision = memory.vision_config()
    return model_config(text, type(vision)(**{**vars(vision), "out_hidden_size": text.hidden_size}))


def encode_image(patches: int) -> Work:
    """An image through the ViT."""
    grid = (32, patches // 32)
    values = np.random.default_rng(0).standard_normal((patches, vision_config().patch_dim), np.float32)
    model = Glm4vVisionModel(vision_config())
    return lambda: model(values, np.array([[1, *grid]])).block_until_ready()


@functools.cache
def _decoder() -> Glm4vForConditionalGeneration:
    vision = Glm4vVisionConfig(depth=1, hidden_size=16, num_heads=1, out_hidden_size=256, intermediate_size=16)
    return Glm4vForConditionalGeneration(model_config(text_config(), vision))


def prefill_prompt(tokens: int) -> Work:
    """A prompt through prefill, and its first new token."""
    prompt = np.random.default_rng(0).integers(0, 500, (1, tokens))
    return lambda: _decoder().generate(prompt, max_new_tokens=1, eos_token_id=-1)


def decode_rows(rows: int) -> Work:
    """Decode steps of the engine with `rows` requests to the packaged model."""
    loaded = Engine.from_pretrained(TINY_CHECKPOINT)
    one = Engine(loaded.runtime, loaded.processor, num_slots=rows, capacity=engine.CAPACITY)
    prompts = [one.prompt("Hi")] * rows
    return lambda: list(one.generate_many(prompts, max_new_tokens=65, **engine.GREEDY))


def _memory(program: compile_for_topology.Program, config: Glm4vConfig, fsdp: int = 1) -> Any:
    devices = make_mesh(fsdp=fsdp)
    with jax.set_mesh(devices):
        model = compile_for_topology.abstract_model(config, devices)
        return program.trace(model, devices).lower().compile().memory_analysis()


def _temporaries(make: Callable[[int], compile_for_topology.Program], size: int) -> Work:
    return lambda: _memory(make(size), narrow()).temp_size_in_bytes


def encode_memory(patches: int) -> Work:
    """Temporaries of the ViT for an image."""
    return _temporaries(lambda n: encode_program(narrow(), 1, n, n), patches)


def prefill_memory(tokens: int) -> Work:
    """Temporaries of prefill of all tokens at once."""
    return _temporaries(lambda n: prefill_program(narrow(), 1, n, n), tokens)


def chunk_memory(tokens: int) -> Work:
    """Temporaries of the last prefill chunk of a prompt."""
    return _temporaries(lambda n: prefill_program(narrow(), 1, CHUNK, n), tokens)


def train_memory(tokens: int) -> Work:
    """Temporaries of a training step on a row of `tokens` tokens and an image of as many patches."""
    return _temporaries(lambda n: step_program(narrow(), Shapes(1, n, 1, n)), tokens)


def cache_memory(slots: int) -> Work:
    """Arguments and temporaries of decoding eight rows with `slots` cache slots, beyond those of 256."""

    def work() -> int:
        least, found = (_memory(decode_program(narrow(), 8, n), narrow()) for n in (256, slots))
        sizes = [one.argument_size_in_bytes + one.temp_size_in_bytes for one in (least, found)]
        return sizes[1] - sizes[0]

    return work


def device_memory(devices: int) -> Work:
    """Bytes of a device that trains eight rows: its shards of weights, moments and batch, and temporaries."""
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    return lambda: int(printed_by("bench.growth_programs", devices, JAX_PLATFORMS="cpu", XLA_FLAGS=flags))


def _train_on(devices: int) -> int:
    text = text_config(hidden_size=512, intermediate_size=1024, num_attention_heads=8)
    config = model_config(text, Glm4vVisionConfig(
        depth=1, hidden_size=64, num_heads=1, out_hidden_size=512, intermediate_size=64,
    ))  # fmt: skip
    found = _memory(step_program(config, Shapes(DEVICES, 256)), config, fsdp=devices)
    return int(found.argument_size_in_bytes + found.temp_size_in_bytes)


@functools.cache
def _aot() -> dict[tuple[str, str], Any]:
    return {(line["program"], line["topology"]): line for line in report.read("aot")["programs"]}


SLICES = {4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4"}


def _of_slice(devices: int) -> Any:
    return _aot()["decode B=8 S=4,096", SLICES[devices]]


def slice_memory(devices: int) -> Work:
    """Bytes of a chip while the 9B decodes eight rows."""
    return lambda: _of_slice(devices)["peak"] * 2**30


def slice_seconds(devices: int) -> Work:
    """Seconds of its decode step, as estimated from what is compiled."""
    return lambda: _of_slice(devices)["estimated_ms"] / 1e3


if __name__ == "__main__":
    print(_train_on(json.loads(sys.argv[1])))
