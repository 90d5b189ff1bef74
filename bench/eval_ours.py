"""Our side of `bench.eval`."""

import time
from typing import Any

from bench import report, turns
from eval.data.items import Item
from eval.read_items import read_items
from eval.tasks import TASKS


def items_of(task: str, count: int) -> list[Item]:
    """The first items of a task whose data come with the package."""
    return read_items(TASKS[task], limit=count)


class Ours:
    """The tasks; each is called by name, see `turns.serve`."""

    def facts(self) -> dict[str, Any]:
        """Versions of what runs here."""
        return report.machine_facts("jax", "jaxlib", "flax", "numpy", "pillow")

    def load(self, directory: str, batch: int) -> None:
        """Load the checkpoint, as `glm4v eval` does."""
        from glm4v_jax import Engine

        self.engine = Engine.from_pretrained(directory, num_slots=batch)

    def answer(self, of: str, count: int, new_tokens: int) -> dict[str, Any]:
        """The answers to a task's items, and the seconds from its messages to the last of them."""
        prompts = [item.messages for item in items_of(of, count)]
        self.engine.release()  # pictures that it remembers would not be encoded again
        start = time.perf_counter()
        found = {
            completion.index: completion
            for completion in self.engine.generate_many(prompts, do_sample=False, max_new_tokens=new_tokens)
        }
        seconds = time.perf_counter() - start
        ordered = [found[number] for number in range(count)]
        tokens = sum(len(completion.tokens) for completion in ordered)
        return {"seconds": seconds, "texts": [completion.text for completion in ordered], "tokens": tokens}


if __name__ == "__main__":
    turns.main(Ours)
