"""The reference's side of `bench.cpu_vs_torch`: transformers 4.57.1 in its fastest setting on a CPU."""

import functools
from collections.abc import Callable
from typing import Any

from bench import cpu_model, reference, report, turns


class Theirs:
    """The tasks; each is called by name, see `turns.serve`."""

    def facts(self) -> dict[str, Any]:
        """Versions of what runs here."""
        return report.machine_facts("torch", "torchvision", "transformers", "numpy", "pillow")

    def load(self, directory: str) -> None:
        """Load the checkpoint with fused attention, for inference only."""
        import torch

        transformers = reference.import_transformers()
        from transformers.models.glm4v.image_processing_glm4v_fast import Glm4vImageProcessorFast

        self.model = transformers.Glm4vForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        self.vocab_size = self.model.config.text_config.vocab_size
        self.processors = {"slow": transformers.Glm4vImageProcessor(), "fast": Glm4vImageProcessorFast()}
        self.pictures = list(cpu_model.photographs())

    def bandwidth(self, megabytes: int, threads: int) -> dict[str, float]:
        """Bytes read a second by a sum over a buffer, on all threads."""
        import torch

        assert torch.get_num_threads() == threads
        buffer = torch.ones(megabytes * 250_000)
        return {
            "torch sum": buffer.nbytes / turns.seconds(buffer.sum, 5),
            "torch max": buffer.nbytes / turns.seconds(buffer.max, 5),
        }

    def vision(self, rows: int, columns: int) -> dict[str, float]:
        """Seconds of one picture through the ViT and merger."""
        import torch

        values, grid = (torch.from_numpy(x) for x in cpu_model.patches(rows, columns))
        with torch.inference_mode():
            return {"encode": turns.seconds(lambda: self.model.visual(values, grid), 3)}

    def prefill(self, tokens: int) -> dict[str, float]:
        """Seconds from a prompt to its first new token, by `generate` and by a bare forward pass."""
        import torch

        ids = self._prompt(tokens)

        def forward() -> None:
            self.model(ids, use_cache=True, logits_to_keep=1).logits.argmax()

        with torch.inference_mode():
            return {
                "generate": turns.seconds(lambda: self._generate(ids, 1), 3), "forward": turns.seconds(forward, 3)
            }  # fmt: skip

    def decode(self, context: int, short: int, long: int) -> dict[str, float]:
        """Seconds for each further token: of a long `generate` less a short one, and of a bare loop."""
        import torch

        ids = self._prompt(context)

        def loop(tokens: int) -> None:
            out = self.model(ids, use_cache=True, logits_to_keep=1)
            for i in range(tokens - 1):
                out = self.model(
                    out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=out.past_key_values, use_cache=True,
                    cache_position=torch.tensor([context + i]),
                )  # fmt: skip
            out.logits.argmax()

        with torch.inference_mode():
            times = {
                name: [turns.seconds(functools.partial(function, n)) for n in (short, long)]
                for name, function in (("generate", functools.partial(self._generate, ids)), ("loop", loop))
            }
        return {name: (last - first) / (long - short) for name, (first, last) in times.items()}

    def answer(self, context: int, tokens: int) -> list[int]:
        """The greedy answer to a prompt."""
        import torch

        with torch.inference_mode():
            return self._generate(self._prompt(context), tokens)[0, context:].tolist()

    def preprocess(self, together: bool) -> dict[str, float]:
        """Seconds a picture, given all photographs in one call or each in a call of its own."""
        batches = [self.pictures] if together else [[picture] for picture in self.pictures]

        def process(processor: Callable[..., Any]) -> None:
            for batch in batches:
                processor(batch, return_tensors="pt")

        return {
            name: turns.seconds(functools.partial(process, processor), 3) / len(self.pictures)
            for name, processor in self.processors.items()
        }

    def profile(self, work: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """The operations that take the most time by themselves while a task is done."""
        return turns.torch_profile(lambda: getattr(self, work)(**arguments))

    def _prompt(self, tokens: int) -> Any:
        import torch

        return torch.from_numpy(cpu_model.prompt(tokens, self.vocab_size))

    def _generate(self, ids: Any, tokens: int) -> Any:
        return self.model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


if __name__ == "__main__":
    turns.main(Theirs, with_torch=True)
