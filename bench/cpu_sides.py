"""Both sides of `bench.cpu_vs_torch`: the same prompts, patches and photographs on each."""

import cProfile
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image

from bench import media, models, reference, turns

GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def prompt(tokens: int, vocab_size: int) -> np.ndarray:
    """int64 [1, tokens] of text, the same for the same length."""
    end = min(vocab_size, models.INFERENCE["image_start_token_id"])
    return np.random.default_rng(tokens).integers(0, end, (1, tokens))


def patches(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of noise, ready for the ViT: float32 [rows * columns, P], and its grid int64 [1, 3]."""
    values = np.random.default_rng(rows).standard_normal((rows * columns, 3 * 2 * 14 * 14), np.float32)
    return values, np.array([[1, rows, columns]])


class Photographs:
    """Preprocessing of real photographs, with the processors that `load` makes."""

    processors: dict[str, Callable[..., Any]]
    options: Mapping[str, Any] = types.MappingProxyType({})

    @functools.cached_property
    def _photographs(self) -> list[PIL.Image.Image]:
        return [PIL.Image.open(media.photograph(name)).convert("RGB") for name in media.PHOTOGRAPHS]

    def preprocess(self, together: bool) -> dict[str, float]:
        """Seconds an image, given all photographs in one call or each in a call of its own."""
        batches = [self._photographs] if together else [[photograph] for photograph in self._photographs]

        def process(processor: Callable[..., Any]) -> None:
            for batch in batches:
                processor(batch, **self.options)

        return {
            name: turns.seconds(functools.partial(process, processor), 3) / len(self._photographs)
            for name, processor in self.processors.items()
        }


class Ours(Photographs, turns.JaxSide):
    """The package's own side."""

    packages = (*turns.JaxSide.packages, "pillow")

    def load(self, directory: str) -> None:
        """Load the checkpoint, as a user does."""
        from glm4v_jax import Glm4vForConditionalGeneration, Glm4vImageProcessor, Glm4vImageProcessorFast

        self._model = Glm4vForConditionalGeneration.from_pretrained(directory)
        self._vocab_size = self._model.config.text_config.vocab_size
        self.processors = {"slow": Glm4vImageProcessor(), "fast": Glm4vImageProcessorFast()}

    def bandwidth(self, megabytes: int, threads: int) -> dict[str, float]:
        """See `turns.read_bandwidth`."""
        return {"numpy": turns.read_bandwidth(megabytes, threads)}

    def vision(self, rows: int, columns: int) -> dict[str, float]:
        """Seconds of one image through the ViT and merger."""
        values, grid = patches(rows, columns)
        return {"encode": turns.seconds(lambda: self._model.visual(values, grid).block_until_ready(), 3)}

    def prefill(self, tokens: int) -> dict[str, float]:
        """Seconds from a prompt to its first new token."""
        ids = prompt(tokens, self._vocab_size)
        return {"generate": turns.seconds(lambda: self._generate(ids, 1), 3)}

    def decode(self, context: int, short: int, long: int) -> dict[str, float]:
        """Seconds for each further token, from the times of a short and a long answer."""
        ids = prompt(context, self._vocab_size)
        first, last = (turns.seconds(functools.partial(self._generate, ids, n)) for n in (short, long))
        return {"generate": (last - first) / (long - short)}

    def answer(self, context: int, tokens: int) -> list[int]:
        """The greedy answer to a prompt."""
        return self._generate(prompt(context, self._vocab_size), tokens)[0, context:].tolist()

    def profile(self, work: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """What takes the most time while a task is done: functions on the host, or operations on XLA's threads."""
        if work != "preprocess":
            return super().profile(work, arguments)
        with cProfile.Profile() as profiler:  # it sees one thread: one image a call
            self.preprocess(together=False)
        # Functions of C have a name and no code.
        return turns.slowest(
            (getattr(entry.code, "co_qualname", str(entry.code)), entry.callcount, 1e3 * entry.inlinetime)
            for entry in profiler.getstats()
        )

    def _generate(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        return self._model.generate(input_ids=ids, max_new_tokens=tokens, **GREEDY)


class Theirs(Photographs, turns.TorchSide):
    """transformers 4.57.1 in its fastest setting on a CPU: fused attention, for inference only."""

    packages = ("torch", "torchvision", "transformers", "numpy", "pillow")
    options = types.MappingProxyType({"return_tensors": "pt"})

    def load(self, directory: str) -> None:
        """Load the checkpoint."""
        transformers = reference.import_transformers()
        from transformers.models.glm4v.image_processing_glm4v_fast import Glm4vImageProcessorFast

        self._model = reference.load_model(directory, attention="sdpa")
        self._vocab_size = self._model.config.text_config.vocab_size
        self.processors = {"slow": transformers.Glm4vImageProcessor(), "fast": Glm4vImageProcessorFast()}

    def bandwidth(self, megabytes: int, threads: int) -> dict[str, float]:
        """Bytes read a second by a sum over a buffer, on all threads."""
        import torch

        assert torch.get_num_threads() == threads
        buffer = torch.ones(megabytes * 250_000)
        return {f"torch {name}": buffer.nbytes / turns.seconds(getattr(buffer, name), 5) for name in ("sum", "max")}

    def vision(self, rows: int, columns: int) -> dict[str, float]:
        """Seconds of one image through the ViT and merger."""
        import torch

        values, grid = (torch.from_numpy(x) for x in patches(rows, columns))
        with torch.inference_mode():
            return {"encode": turns.seconds(lambda: self._model.visual(values, grid), 3)}

    def prefill(self, tokens: int) -> dict[str, float]:
        """Seconds from a prompt to its first new token, by `generate` and by a bare forward pass."""
        import torch

        ids = self._prompt(tokens)
        with torch.inference_mode():
            return {
                "generate": turns.seconds(lambda: self._generate(ids, 1), 3),
                "forward": turns.seconds(lambda: self._loop(ids, 1), 3),
            }

    def decode(self, context: int, short: int, long: int) -> dict[str, float]:
        """Seconds for each further token: of a long `generate` less a short one, and of a bare loop."""
        import torch

        ids, found = self._prompt(context), {}
        with torch.inference_mode():
            for name, function in (("generate", self._generate), ("loop", self._loop)):
                first, last = (turns.seconds(functools.partial(function, ids, n)) for n in (short, long))
                found[name] = (last - first) / (long - short)
        return found

    def answer(self, context: int, tokens: int) -> list[int]:
        """The greedy answer to a prompt."""
        import torch

        with torch.inference_mode():
            return self._generate(self._prompt(context), tokens)[0, context:].tolist()

    def _prompt(self, tokens: int) -> Any:
        import torch

        return torch.from_numpy(prompt(tokens, self._vocab_size))

    def _generate(self, ids: Any, tokens: int) -> Any:
        return self._model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    def _loop(self, ids: Any, tokens: int) -> Any:
        """Forward passes with nothing around them."""
        import torch

        out = self._model(ids, use_cache=True, logits_to_keep=1)
        for i in range(tokens - 1):
            out = self._model(
                out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=out.past_key_values, use_cache=True,
                cache_position=torch.tensor([ids.shape[1] + i]),
            )  # fmt: skip
        return out.logits.argmax()


if __name__ == "__main__":
    turns.main(Ours, Theirs)
