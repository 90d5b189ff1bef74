"""The reference's side of `bench.train`: transformers 4.57.1 and torch's AdamW, in their fastest setting on a CPU."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench import reference, report, train_data, turns
from train.data.samples import IGNORED, Sample

CLIP_NORM = 1.0


class Theirs:
    """The tasks; each is called by name, see `turns.serve`."""

    def facts(self) -> dict[str, Any]:
        """Versions of what runs here."""
        return report.machine_facts("torch", "transformers", "numpy")

    def load(self, directory: str, batches: str, learning_rate: float) -> None:
        """Load the checkpoint with fused attention, and make the batches ready."""
        self.directory, self.learning_rate = directory, learning_rate
        ways = train_data.read_batches(batches)
        self.batches = {way: [_padded(batch) for batch in ways[way]] for way in ("padded", "grouped")}
        self._start()

    def losses(self, way: str) -> list[float]:
        """The losses of the first pass over the batches, from the checkpoint's weights."""
        self._start()
        return [self._step(**batch) for batch in self.batches[way]]

    def train(self, way: str) -> float:
        """Seconds of a pass over the batches."""
        start = time.perf_counter()
        for batch in self.batches[way]:
            self._step(**batch)
        return time.perf_counter() - start

    def profile(self, way: str) -> list[dict[str, Any]]:
        """What takes the most time in a pass."""
        return turns.torch_profile(lambda: self.train(way))

    def _start(self) -> None:
        import torch

        transformers = reference.import_transformers()
        self.model = transformers.Glm4vForConditionalGeneration.from_pretrained(
            self.directory, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.0, fused=True)

    def _step(self, targets: Any, **inputs: Any) -> float:
        import torch

        logits = self.model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        return float(loss.detach())


def _padded(samples: Sequence[Sample]) -> dict[str, Any]:
    """One batch, padded on the right to its longest sample.

    A video's frames go in as pictures, which is what the model makes of them: the reference takes no batch of both.
    Positions are given, so that its host does not have to find them.
    """
    import torch

    shape = len(samples), max(map(len, samples))
    input_ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets, positions = np.full(shape, IGNORED, np.int64), np.ones((3, *shape), np.int64)
    for row, sample in enumerate(samples):
        here = np.s_[row, : len(sample)]
        input_ids[here], mask[here], targets[here] = sample.input_ids, 1, sample.targets
        positions[:, row, : len(sample)] = sample.position_ids
    arrays = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, "targets": targets}
    frames = np.concatenate([sample.frames for sample in samples])
    if len(frames):
        arrays["pixel_values"] = np.concatenate(
            [medium.patches for sample in samples for medium in sample.prompt.media]
        )
        arrays["image_grid_thw"] = np.concatenate([np.ones((len(frames), 1), np.int64), frames], axis=1)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


if __name__ == "__main__":
    turns.main(Theirs, with_torch=True)
