"""The engine on eight simulated devices: slots split over the data axes give what one device gives.

Run as a program, this file does the work; the devices of a process are fixed when JAX starts.
"""

import json
import sys

from helpers_generation import GREEDY, random_requests
from helpers_orbax import run_program

MESH = dict(fsdp=2, kv=2, q=2)


def answers(engine):
    """Tokens of prompts of all modalities through slots, and of a conversation's second turn."""
    from glm4v_jax.generate.engine import Request

    prompts = [inputs for inputs in random_requests(engine.model, 20, 3) if 64 < inputs["input_ids"].size <= 96]
    requests = [Request(inputs, dict(max_new_tokens=3 + 2 * i)) for i, inputs in enumerate(prompts)]
    assert len(requests) >= 8 and {"pixel_values", "pixel_values_videos"} <= {name for one in prompts for name in one}
    found = {one.index: list(one.tokens) for one in engine.generate_many(requests, **GREEDY)}
    talk = engine.conversation(max_new_tokens=5, **GREEDY)
    talk.send("Hello")
    return [*(found[i] for i in range(len(requests))), list(talk.send("Again").tokens)]


def test_a_mesh_gives_the_same_tokens(engine):
    assert json.loads(run_program(__file__, devices=8).splitlines()[-1]) == answers(engine)


def main():
    """Print the answers on a mesh."""
    from helpers_checkpoints import RANDOM_CHECKPOINT

    from glm4v_jax.devices.mesh import make_mesh
    from glm4v_jax.generate.engine import Engine

    one = Engine.from_pretrained(RANDOM_CHECKPOINT, mesh=make_mesh(**MESH))
    engine = Engine(one.model, one.processor, num_slots=4, capacity=256)
    sys.stdout.write(json.dumps(answers(engine)))


if __name__ == "__main__":
    main()
