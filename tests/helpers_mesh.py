"""What the tests of meshes share: a process with simulated devices, and the comparison of a model on them with one.

JAX is imported in the functions: the devices of a process are fixed when JAX starts.
"""

import gc
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from helpers_orbax import environment
from reference import CONFIGS, Prompts, export, random_tensors

from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.config.model import Glm4vConfig

DEVICES = 16
"""Of the process that tests share; a mesh takes the first of them."""

ROWS = [[9], [2, ("image", (4, 6)), 3], [4, ("image", (2, 8)), 2, ("video", (2, 2, 4)), 1], [30]]
"""Prompts with images and a video, for `Prompts`."""

GROUPED = CONFIGS["base"] | {
    # Four query heads to a key head, so that kv=2 leaves something for four devices along q or seq.
    "text_config": CONFIGS["base"]["text_config"] | dict(num_attention_heads=8, partial_rotary_factor=1.0)
}


class DeviceProcess:
    """A process with `DEVICES` simulated devices, which starts at first use and again after a crash.

    One for all tests: a start takes 2 s, and what two of them trace and compile alike is there for the second.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a test file returns there, in the current directory; its exception is raised here."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, _prepare, (environment(DEVICES),))
        try:
            return self._pool.submit(_call, os.getcwd(), function, arguments).result(600)
        except TimeoutError:  # also one that is raised there, after which a new process does no harm
            for process in self._pool._processes.values():
                process.kill()
            self.close()
            raise
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _prepare(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    gc.set_threshold(100_000, 20, 20)  # as in `conftest.py`
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    # A killed parent closes no pool.
    threading.Thread(target=follow, daemon=True).start()


def _call(directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    from glm4v_jax.devices.program_limit import drop_programs

    drop_programs(0.5)
    os.chdir(directory)
    return function(*arguments)


def write_grouped(directory: Path) -> None:
    """Write a checkpoint of `GROUPED`."""
    (directory / "config.json").write_text(json.dumps(GROUPED), encoding="utf-8")
    tensors = random_tensors(Glm4vConfig.from_dict(GROUPED), seed=0)
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})


class Computed(NamedTuple):
    """Of `compute`: logits [tokens, V], loss, share of parameters split, generated tokens, gradients by tensor."""

    logits: np.ndarray
    loss: float
    split: float
    tokens: np.ndarray | None
    gradients: dict[str, np.ndarray] | None


def compute(directory: Path, mesh: Any, *, generates: bool = True, learns: bool = True) -> Computed:
    """Load a checkpoint onto a mesh, and take a loss; on request generate greedily, and take gradients."""
    import jax

    from glm4v_jax import Glm4vForConditionalGeneration, make_batch
    from glm4v_jax.devices.mesh import data_shards
    from glm4v_jax.hf.forward import causal_lm_loss

    config = Glm4vConfig.from_pretrained(directory)
    prompts = Prompts(config, ROWS, padding="right", seed=1)
    with jax.set_mesh(mesh) as _:
        model = Glm4vForConditionalGeneration.from_pretrained(directory, stacked=True)
        tokens, gradients = None, None
        if generates:
            tokens = np.asarray(model.generate(**prompts.inputs, max_new_tokens=12, eos_token_id=-1, pad_token_id=0))
        batch, _ = make_batch(config=config, **prompts.inputs, batch_multiple=math.lcm(4, data_shards()))
        labels = np.where(batch.segment_ids * (batch.input_ids < 300) > 0, batch.input_ids, -100)

        def loss(module: Any) -> Any:
            logits = module.logits(module(batch))
            return causal_lm_loss(logits, labels), logits

        if learns:
            (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.module)
            gradients = export(gradient, config)
        else:
            value, logits = jax.jit(loss)(model.module)
        leaves = jax.tree.leaves(model.module)
        whole = sum(leaf.size for leaf in leaves)
        split = sum(leaf.size for leaf in leaves if leaf.addressable_shards[0].data.size < leaf.size) / whole
        real = np.asarray(logits)[batch.segment_ids > 0]
        return Computed(real, float(value), split, tokens, gradients)


def compare(found: Computed, one: Computed) -> dict[str, Any]:
    """How a mesh differs from one device: shares of the largest magnitude, for gradients tensor by tensor."""
    case: dict[str, Any] = {
        "logits": float(np.abs(found.logits - one.logits).max() / np.abs(one.logits).max()),
        "loss": abs(found.loss - one.loss) / one.loss,
        "split": found.split,
    }
    if found.tokens is not None:
        case["tokens_equal"] = bool(np.array_equal(found.tokens, one.tokens))
    if found.gradients is not None:
        assert one.gradients is not None
        worst = {k: float(np.abs(found.gradients[k] - g).max() / np.abs(g).max()) for k, g in one.gradients.items()}
        case["gradients"] = float(np.max(list(worst.values())))  # which keeps NaN
        case["worst_gradient"] = max(worst, key=worst.__getitem__)
    return case
