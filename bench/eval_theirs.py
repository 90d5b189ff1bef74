"""The reference's side of `bench.eval`: transformers' processor and `generate`, in batches of items as they come."""

import time
from typing import Any

from bench import reference, report, turns
from bench.eval_ours import items_of


class Theirs:
    """The tasks; each is called by name, see `turns.serve`."""

    def facts(self) -> dict[str, Any]:
        """Versions of what runs here."""
        return report.machine_facts("torch", "transformers", "numpy", "pillow")

    def load(self, directory: str, batch: int) -> None:
        """Load the checkpoint with fused attention, for inference only."""
        import torch

        transformers = reference.import_transformers()
        self.batch = batch
        self.processor = transformers.AutoProcessor.from_pretrained(directory)
        self.processor.tokenizer.padding_side = "left"
        self.model = transformers.Glm4vForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def answer(self, of: str, count: int, new_tokens: int) -> dict[str, Any]:
        """The answers to a task's items, and the seconds from its messages to the last of them."""
        import torch

        messages = [item.messages for item in items_of(of, count)]
        texts: list[str] = []
        tokens = 0
        start = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, count, self.batch):
                inputs = self.processor.apply_chat_template(
                    messages[first : first + self.batch], add_generation_prompt=True, tokenize=True, padding=True,
                    return_dict=True, return_tensors="pt",
                )  # fmt: skip
                inputs.pop("token_type_ids", None)
                found = self.model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
                new = found[:, inputs["input_ids"].shape[1] :]
                tokens += new.numel()
                texts += self.processor.batch_decode(new, skip_special_tokens=False)
        return {"seconds": time.perf_counter() - start, "texts": texts, "tokens": tokens}


if __name__ == "__main__":
    turns.main(Theirs, with_torch=True)
