"""A training job from its file to its result: it can be stopped at any point, and goes on from where it was."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm4v_jax.config import Glm4vConfig
from glm4v_jax.errors import Glm4vError
from glm4v_jax.export import save_pretrained
from glm4v_jax.files import copy_assets
from glm4v_jax.generate.config import GenerationConfig
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.loading import default_dtype, load_model
from glm4v_jax.lora import add_lora, is_lora
from glm4v_jax.mesh import use_mesh
from glm4v_jax.mesh_presets import mesh_for
from glm4v_jax.model import Glm4v
from glm4v_jax.peft import save_adapter
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.log import Log
from train.optimizers import group_of, make_optimizer
from train.packing import padding_share
from train.records import read_records
from train.state import Layout, init_state, split
from train.step import make_step
from train.stream import Stream

METRICS, MODEL, ADAPTER = "metrics.jsonl", "model", "adapter"
"""What a job writes into its directory, besides its checkpoints."""


class TrainError(Glm4vError):
    """A job cannot go on: its gradients are no numbers, or too large, step after step."""


class Result(NamedTuple):
    """How a job ended.

    step: the last one.
    is_done: whether that was the last of all; otherwise it was asked to stop.
    """

    step: int
    is_done: bool


def train(config: TrainConfig, *, tell: Callable[[str], None] | None = None) -> Result:
    """Run a job, from its latest checkpoint if there is one.

    SIGTERM makes it save and return. What every step came to is a line of `metrics.jsonl` in `config.out`; the result
    is beside it, a checkpoint `model` or an `adapter`.

    Args:
      config: of the job.
      tell: called with lines for a person: what is skipped, and where it goes on from.

    Raises:
      Glm4vError: what is wrong with the job, its model or its data.
      TrainError: too many steps one after another had to be left out.
    """
    tell = tell or _ignore
    model_config = Glm4vConfig.from_pretrained(config.model)
    records = read_records(list(config.data.files), format=config.data.format, media_dir=config.data.media_dir)
    processor = Glm4vProcessor.from_pretrained(config.model)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    stream = Stream(records, processor, model_config, config.data, config.batch, seed=config.seed, tell=tell)
    with (
        use_mesh(mesh_for(config.mesh, model_config)),
        contextlib.closing(Checkpoints(out / "checkpoints", config.checkpoint)) as checkpoints,
        _stopping() as is_stopped,
    ):
        model = load_model(Path(config.model), model_config, dtype="auto", stacked=True)
        if config.lora is not None:
            model = add_lora(model, config.lora, config.seed)
        layout = Layout.of(model)
        dtypes = dict(zip(layout.paths, (leaf.dtype for leaf in jax.tree.leaves(model)), strict=True))
        params, frozen = split(model, lambda path: _is_trained(path, config))
        optimizer = make_optimizer(config.optimizer, config.steps, model)
        state = init_state(params, optimizer)
        del model, params
        if checkpoints.latest is not None:
            state, where = checkpoints.restore(state)
            stream.set_state(where)
            tell(f"going on after step {int(state.step)}, from {out / 'checkpoints'}")
        dtype = default_dtype() if config.dtype is None else jnp.dtype(config.dtype)
        step = make_step(layout, optimizer, dtype=dtype, remat=config.remat, max_grad_norm=config.max_grad_norm)
        number, saved = int(state.step), int(state.step)
        log = Log(out / METRICS, config, number, tell)
        while number < config.steps and not is_stopped():
            batch = next(stream)
            padding = padding_share(batch)
            state, metrics = step(state, frozen, batch)
            number += 1
            log.add(number, metrics, {"padding": padding.tokens, "vision_padding": padding.patches})
            if int(state.streak) >= config.max_skipped:
                raise TrainError(
                    f"step {number}: found gradients of norm {float(metrics.grad_norm)}, and {config.max_skipped} "
                    f"steps like that one after another; expected norms up to max_grad_norm, {config.max_grad_norm}"
                )
            if number % config.checkpoint.every == 0:
                checkpoints.save(state, stream.get_state())
                saved = number
        if number > saved:
            checkpoints.save(state, stream.get_state())
        if number >= config.steps:
            _export(layout.exported(state.params, frozen, dtypes), config, out)
    return Result(number, number >= config.steps)


def _is_trained(path: str, config: TrainConfig) -> bool:
    return is_lora(path) if config.lora is not None else group_of(path) not in config.freeze


def _export(model: Glm4v, config: TrainConfig, out: Path) -> None:
    """Write the result: an adapter for PEFT, or a checkpoint in Hugging Face layout with all that the first one had."""
    if config.lora is not None:
        save_adapter(model, out / ADAPTER, config.model)
        return
    generation = GenerationConfig.from_pretrained(config.model)
    save_pretrained(model, generation, out / MODEL)
    copy_assets(config.model, out / MODEL)
    model.config.save_pretrained(out / MODEL)


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, with which a machine that is taken away announces it."""
    asked: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        del frame
        asked.append(number)

    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def _ignore(line: str) -> None:
    del line
