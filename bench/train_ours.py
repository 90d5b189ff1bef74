"""Our side of `bench.train`: the step of a training job."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench import report, train_data, turns
from train.data.packing import TrainBatch, pack
from train.data.samples import Sample


class Ours:
    """The tasks; each is called by name, see `turns.serve`."""

    def facts(self) -> dict[str, Any]:
        """Versions of what runs here."""
        return report.machine_facts("jax", "jaxlib", "flax", "optax", "numpy")

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
        rows, length, vision = shape
        ways = train_data.read_batches(batches)
        self.batches = {
            way: [
                self._batch(batch, config, *((len(batch), max(map(len, batch))) if way == "padded" else (rows, length)),
                            vision=tuple(vision), per_row=1 if way == "padded" else None)
                for batch in ways[way]
            ]
            for way in ("packed", "padded")
        }  # fmt: skip
        model = load_model(directory, config, dtype="float32", stacked=True)
        optimizer = make_optimizer(
            OptimizerConfig(learning_rate=learning_rate, schedule="constant", warmup=0), 1000, model
        )
        self.step = make_step(Layout.of(model), optimizer, dtype=jnp.float32, remat="none")

        def start() -> Any:
            params, self.frozen = split(model, lambda path: True)
            return init_state(jax.tree.map(jnp.copy, params), optimizer)

        self.start = start
        self.state = start()

    def losses(self, way: str) -> list[float]:
        """The losses of the first pass over the batches, from the checkpoint's weights."""
        self.state = self.start()
        found = []
        for batch in self.batches[way]:
            self.state, metrics = self.step(self.state, self.frozen, batch)
            found.append(float(metrics.loss))
        return found

    def train(self, way: str) -> float:
        """Seconds of a pass over the batches."""
        start = time.perf_counter()
        for batch in self.batches[way]:
            self.state, metrics = self.step(self.state, self.frozen, batch)
            float(metrics.loss)
        return time.perf_counter() - start

    def profile(self, way: str) -> list[dict[str, Any]]:
        """What takes the most time in a pass."""
        return turns.slowest(turns.xla_operations(lambda: self.train(way)))

    def _batch(self, samples: Sequence[Sample], config: Any, rows: int, length: int, **options: Any) -> TrainBatch:
        """One micro-batch a step."""
        import jax

        batch = pack(
            samples, rows=rows, length=length, vision_shape=options["vision"], config=config, per_row=options["per_row"]
        )
        return jax.tree.map(lambda x: np.asarray(x)[None], batch)


if __name__ == "__main__":
    turns.main(Ours)
