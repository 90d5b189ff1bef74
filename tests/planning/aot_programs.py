"""Compiles programs of a narrow model of the 9B's shape for a TPU slice, and prints what came of them as JSON.

Run in an environment with libtpu, which has none of the test extra's packages; see `test_compile_for_topology.py`.
"""

import dataclasses
import json
from typing import Any

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.planning import compile_for_topology
from train.compile_for_topology import Shapes, step_program
from train.rl.compile_for_topology import RewardJob, handover_program

LAYERS = 2


def narrow(hidden: int, vocabulary: int) -> Glm4vConfig:
    """The 9B with few and narrow layers: heads of 128, two key heads."""
    config = Glm4vConfig.glm4_1v_9b()
    text = dataclasses.replace(
        config.text_config, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 128, vocab_size=vocabulary,
    )  # fmt: skip
    vision = dataclasses.replace(config.vision_config, out_hidden_size=hidden)
    ids = {field.name: 1 for field in dataclasses.fields(config) if field.name.endswith("_token_id")}
    return dataclasses.replace(config, text_config=text, vision_config=vision, **ids)


def main() -> None:
    """Compile decode and prefill on the mesh of latency and on others, quantised, a training step, and a handover."""
    # What samples compiles in less than half the time where it sorts 256 numbers.
    wide, small = narrow(2048, 256), narrow(1024, 1024)
    decode, prefill = (
        compile_for_topology.decode_program(wide, 8, 4096),
        compile_for_topology.prefill_program(wide, 1, 1024, 8192),
    )
    join, short = (
        compile_for_topology.prefill_program(wide, 1, 96, 4096, state_rows=8),
        compile_for_topology.prefill_program(small, 8, 16, 1024),
    )
    one = compile_for_topology.decode_program(wide, 1, 4096)
    step = step_program(small, Shapes(4, 128), freeze=("vision", "merger"))
    handover = handover_program(RewardJob(small, dict(fsdp=2, kv=2), dict(kv=2, q=2)))
    single: dict[str, Any] = dict(topology="v5e:1x1", quantize="int8")
    for program, config, options in (
        (decode, wide, dict(kv=2, q=2)), (prefill, wide, dict(kv=2, q=2)), (decode, wide, dict(kv=2, seq=2)),
        (step, small, dict(fsdp=2, kv=2)), (join, wide, dict(kv=2, q=2)), (short, small, dict(kv=2, q=2)),
        (one, wide, single), (compile_for_topology.copy_program(wide, 4096, 8), wide, dict(kv=2, q=2)),
        (handover, small, dict(fsdp=2, kv=2)),
    ):  # fmt: skip
        compiled = compile_for_topology.compile_for(program, config, **dict(topology="v5e:2x2") | options, large=2**18)
        print(json.dumps(dataclasses.asdict(compiled)))  # noqa: T201


if __name__ == "__main__":
    main()
