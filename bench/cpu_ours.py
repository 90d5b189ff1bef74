"""Our side of `bench.cpu_vs_torch`."""

import cProfile
import functools
import operator
import pathlib
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any

import numpy as np

from bench import cpu_model, report, turns


class Ours:
    """The tasks; each is called by name, see `turns.serve`."""

    def facts(self) -> dict[str, Any]:
        """Versions of what runs here."""
        return report.machine_facts("jax", "jaxlib", "flax", "numpy", "pillow")

    def load(self, directory: str) -> None:
        """Load the checkpoint, as a user does."""
        from glm4v_jax import Glm4vForConditionalGeneration, Glm4vImageProcessor, Glm4vImageProcessorFast

        self.model = Glm4vForConditionalGeneration.from_pretrained(directory)
        self.vocab_size = self.model.config.text_config.vocab_size
        self.processors = {"slow": Glm4vImageProcessor(), "fast": Glm4vImageProcessorFast()}
        self.pictures = list(cpu_model.photographs())

    def bandwidth(self, megabytes: int, threads: int) -> dict[str, float]:
        """Bytes read a second by NumPy's maximum of a buffer, in parts, one to a thread."""
        buffer = np.ones(megabytes * 250_000, np.float32)
        parts = np.array_split(buffer, threads)

        def read() -> None:
            readers = [threading.Thread(target=np.max, args=(part,)) for part in parts]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()

        return {"numpy": buffer.nbytes / turns.seconds(read, 5)}

    def vision(self, rows: int, columns: int) -> dict[str, float]:
        """Seconds of one picture through the ViT and merger."""
        values, grid = cpu_model.patches(rows, columns)
        return {"encode": turns.seconds(lambda: self.model.visual(values, grid).block_until_ready(), 3)}

    def prefill(self, tokens: int) -> dict[str, float]:
        """Seconds from a prompt to its first new token."""
        ids = cpu_model.prompt(tokens, self.vocab_size)
        return {"generate": turns.seconds(lambda: self._generate(ids, 1), 3)}

    def decode(self, context: int, short: int, long: int) -> dict[str, float]:
        """Seconds for each further token, from the times of a short and a long answer."""
        ids = cpu_model.prompt(context, self.vocab_size)
        times = [turns.seconds(functools.partial(self._generate, ids, n), 1) for n in (short, long)]
        return {"generate": (times[1] - times[0]) / (long - short)}

    def answer(self, context: int, tokens: int) -> list[int]:
        """The greedy answer to a prompt."""
        return self._generate(cpu_model.prompt(context, self.vocab_size), tokens)[0, context:].tolist()

    def preprocess(self, together: bool) -> dict[str, float]:
        """Seconds a picture, given all photographs in one call or each in a call of its own."""
        batches = [self.pictures] if together else [[picture] for picture in self.pictures]

        def process(processor: Callable[..., Any]) -> None:
            for batch in batches:
                processor(batch)

        return {
            name: turns.seconds(functools.partial(process, processor), 3) / len(self.pictures)
            for name, processor in self.processors.items()
        }

    def profile(self, work: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """What takes the most time while a task is done: functions on the host, or operations on XLA's threads."""
        if work != "preprocess":
            return turns.slowest(turns.xla_operations(lambda: getattr(self, work)(**arguments)))
        with cProfile.Profile() as profiler:  # it sees one thread: one picture a call
            self.preprocess(together=False)
        functions = [
            {"name": _called(entry.code), "calls": entry.callcount, "milliseconds": 1e3 * entry.inlinetime}
            for entry in profiler.getstats()
        ]
        return sorted(functions, key=operator.itemgetter("milliseconds"), reverse=True)[: turns.PROFILE_LENGTH]

    def _generate(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        return self.model.generate(input_ids=ids, max_new_tokens=tokens, **cpu_model.GREEDY)


def _called(code: CodeType | str) -> str:
    """A function as a profile names it; those of C have no code."""
    return code if isinstance(code, str) else f"{pathlib.Path(code.co_filename).name}:{code.co_name}"


if __name__ == "__main__":
    turns.main(Ours)
