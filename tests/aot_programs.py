"""Compiles programs of a narrow model of the 9B's shape for a TPU slice, and prints what came of them as JSON.

Run in an environment with libtpu, which has none of the test extra's packages; see `test_aot.py`.
"""

import dataclasses
import json

from glm4v_jax import aot
from glm4v_jax.config import Glm4vConfig

LAYERS = 3


def narrow() -> Glm4vConfig:
    """The 9B with few and narrow layers: heads of 128, two key heads with eight query heads each."""
    config = Glm4vConfig.glm4_1v_9b()
    text = dataclasses.replace(
        config.text_config, hidden_size=2048, intermediate_size=4096, num_hidden_layers=LAYERS, num_attention_heads=16,
    )  # fmt: skip
    vision = dataclasses.replace(config.vision_config, out_hidden_size=text.hidden_size)
    return dataclasses.replace(config, text_config=text, vision_config=vision)


def main() -> None:
    """Decoding and a piece of a prompt on the mesh of latency, and decoding on that of long contexts."""
    config = narrow()
    decode, prefill = aot.decode_program(config, 8, 4096), aot.prefill_program(config, 1, 1024, 8192)
    for program, sizes in ((decode, dict(kv=2, q=2)), (prefill, dict(kv=2, q=2)), (decode, dict(kv=2, seq=2))):
        compiled = aot.compile_for(program, config, "v5e:2x2", large=2**18, **sizes)
        print(json.dumps(dataclasses.asdict(compiled)))  # noqa: T201


if __name__ == "__main__":
    main()
