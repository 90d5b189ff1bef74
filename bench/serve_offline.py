"""A process that does a server's work through `generate_many`: `python -m bench.serve_offline MODEL SLOTS CONTEXT`."""

import sys
import time
from collections.abc import Sequence

from bench import turns
from bench.serve_client import Body
from glm4v_jax.generate.engine import Engine, Request


class Offline:
    """A model and its slots."""

    def __init__(self, directory: str, slots: int, capacity: int):
        self._engine = Engine.from_pretrained(directory, num_slots=slots)
        self._engine.reserve(capacity)

    def work(self, bodies: Sequence[Body]) -> dict[str, float]:
        """Answer requests, in batches; how many tokens that made, and the seconds that it took."""
        requests = [Request(body["messages"], {"max_new_tokens": body["max_tokens"]}) for body in bodies]
        begun = time.perf_counter()
        tokens = sum(len(completion.tokens) for completion in self._engine.generate_many(requests))
        return {"tokens": tokens, "seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    turns.serve({"work": Offline(sys.argv[1], *map(int, sys.argv[2:])).work})
