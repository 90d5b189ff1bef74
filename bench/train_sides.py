"""Both sides of `bench.train`: the step of a training job here, and torch's AdamW over transformers 4.57.1."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench import reference, train_data, turns
from train.data.packing import TrainBatch, pack
from train.data.samples import IGNORED, Sample

CLIP_NORM = 1.0


class Passes:
    """Passes over the batches of a way to train."""

    batches: dict[str, list[Any]]

    def losses(self, way: str) -> list[float]:
        """The losses of the first pass over the batches, from the checkpoint's weights."""
        self._start()
        return [self._step(batch) for batch in self.batches[way]]

    def train(self, way: str) -> float:
        """Seconds of a pass over the batches."""
        start = time.perf_counter()
        for batch in self.batches[way]:
            self._step(batch)
        return time.perf_counter() - start

    def _start(self) -> None:
        raise NotImplementedError

    def _step(self, batch: Any) -> float:
        raise NotImplementedError


class Ours(Passes, turns.JaxSide):
    """The step of a training job."""

    packages = ("jax", "jaxlib", "flax", "optax", "numpy")

    def load(self, directory: str, batches: str, shape: Sequence[Any], learning_rate: float) -> None:
        """Load the checkpoint as a job does, and make the batches ready."""
        import jax
        import jax.numpy as jnp

        from glm4v_jax.checkpoints.load import load_model
        from glm4v_jax.config.model import Glm4vConfig
        from glm4v_jax.devices.mesh import make_mesh
        from train.optimizers import OptimizerConfig, make_optimizer
        from train.state import Layout, init_state, split
        from train.step import make_step

        jax.set_mesh(make_mesh())
        config = Glm4vConfig.from_pretrained(directory)
        packed = train_data.Shape(*shape)
        ways = train_data.read_batches(batches)
        self.batches = {
            "packed": [_batch(batch, config, packed.rows, packed.length, packed.vision) for batch in ways["packed"]],
            "padded": [
                _batch(batch, config, len(batch), max(map(len, batch)), packed.vision, per_row=1)
                for batch in ways["padded"]
            ],
        }
        model = load_model(directory, config, dtype="float32", stacked=True)
        settings = OptimizerConfig(learning_rate=learning_rate, schedule="constant", warmup=0)
        optimizer = make_optimizer(settings, 1000, model)
        step = make_step(Layout.of(model), optimizer, dtype=jnp.float32, remat="none")

        def start() -> None:
            params, self._frozen = split(model, lambda path: True)
            self._state = init_state(jax.tree.map(jnp.copy, params), optimizer)

        self._make_step, self._start = step, start  # type: ignore[method-assign]
        start()

    def _step(self, batch: TrainBatch) -> float:
        self._state, metrics = self._make_step(self._state, self._frozen, batch)
        return float(metrics.loss)


def _batch(
    samples: Sequence[Sample], config: Any, rows: int, length: int, vision_shape: Any, per_row: int | None = None
) -> TrainBatch:
    """A step's only micro-batch."""
    import jax

    batch = pack(samples, rows=rows, length=length, vision_shape=tuple(vision_shape), config=config, per_row=per_row)
    return jax.tree.map(lambda x: np.asarray(x)[None], batch)


class Theirs(Passes, turns.TorchSide):
    """The reference in its fastest setting on a CPU: fused attention, fused AdamW."""

    def load(self, directory: str, batches: str, learning_rate: float) -> None:
        """Load the checkpoint, and make the batches ready."""
        self._directory, self._learning_rate = directory, learning_rate
        ways = train_data.read_batches(batches)
        self.batches = {way: [_padded(batch) for batch in ways[way]] for way in ("padded", "grouped")}
        self._start()

    def _start(self) -> None:
        import torch

        self._model = reference.load_model(self._directory, attention="sdpa").train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=self._learning_rate, weight_decay=0.0, fused=True
        )

    def _step(self, batch: dict[str, Any]) -> float:
        import torch

        inputs = {name: value for name, value in batch.items() if name != "targets"}
        logits = self._model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
        self._optimizer.step()
        return float(loss.detach())


def _padded(samples: Sequence[Sample]) -> dict[str, Any]:
    """One batch, padded on the right to its longest sample.

    A video's frames go in as images, which is what the model makes of them: the reference takes no batch of both.
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
    turns.main(Ours, Theirs)
