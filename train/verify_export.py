"""An exported model, loaded again: are its logits for a fixed prompt those of the trained model?"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from glm4v_jax.batch import Batch
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.distributed import to_host
from glm4v_jax.devices.mesh import data_shards, reshard
from glm4v_jax.errors import CheckpointError
from glm4v_jax.inputs.make_batch import make_batch
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.model.glm4v import Glm4v

FLOAT32 = 1e-5
"""Relative difference of two float32 programs of a layer that add in different orders."""

# In sequence in a layer: matrices, and all operations that round their results.
_MATRICES, _ROUNDINGS = 4, 12
_GROWTH = 2.0  # of an error in later layers
_SIDE = 112
_QUESTION = "What is in this picture? Name what you see, from left to right, and say what it is for."


class Verified(NamedTuple):
    """How a result compares with the trained model: root mean squares over logits, relative to that model's.

    difference: of its logits and the trained model's.
    tolerance: the most that rounding explains.
    effect: the difference that training has made; None if it was not measured.
    """

    difference: float
    tolerance: float
    effect: float | None = None

    def __str__(self) -> str:
        """Return a log line."""
        text = f"relative difference of the logits {self.difference:.2g} (rounding: up to {self.tolerance:.2g})"
        if self.effect is None:
            return text
        text = f"{text}; training changed them by {self.effect:.2g}"
        if self.effect <= 2 * self.tolerance:
            return f"{text}, which rounding alone could explain"
        return text


def prompt(directory: str | Path, config: Glm4vConfig) -> Batch:
    """Return a question about an image, always the same; CheckpointError if tokenizer or processor are missing."""
    row, column = np.mgrid[:_SIDE, :_SIDE]
    image = np.stack([row + column, 2 * row, (row - column) % 97 + 100 * (row > column)], axis=-1).astype(np.uint8)
    content = [{"type": "image", "image": image}, {"type": "text", "text": _QUESTION}]
    processor = Glm4vProcessor.from_pretrained(directory)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    given: dict[str, Any] = {name: np.asarray(inputs[name]) for name in names}
    return make_batch(config=config, batch_multiple=data_shards(), **given)[0]


def logits_of(model: Glm4v, batch: Batch) -> np.ndarray:
    """Return logits [T, V] of the prompt's tokens, float32, in all processes; all of them call this."""
    return to_host(_logits(model, batch))[0][np.asarray(batch.segment_ids)[0] > 0]


@jax.jit
def _logits(model: Glm4v, batch: Batch) -> Float[Array, "B T V"]:
    return reshard(model.logits(model(batch)).astype(jnp.float32), None, None, None)


def tolerance_of(config: Glm4vConfig, written: DTypeLike, computed: DTypeLike) -> float:
    """Return by how much two models may differ if one has weights rounded once more, or adds in another order.

    A rounding is off by at most half the dtype's epsilon, errors in sequence add up as the square root of their number,
    and later layers may double that. For weights, `written`, the number is that of matrices in sequence in the decoder;
    for computations, `computed`, it is that of operations that round their results, in both models. Two float32 models
    differ by `FLOAT32` per layer.
    """
    layers = config.text_config.num_hidden_layers
    weights = _GROWTH * _rounding(written) * math.sqrt(_MATRICES * layers)
    steps = 0.0 if jnp.dtype(computed) == jnp.float32 else _rounding(computed) * math.sqrt(2 * _ROUNDINGS * layers)
    return math.hypot(FLOAT32 * math.sqrt(layers), weights, steps)


def _relative(values: np.ndarray, trained: np.ndarray) -> float:
    values, trained = values.astype(np.float64), trained.astype(np.float64)
    return float(np.sqrt(np.mean(np.square(values - trained)) / np.mean(np.square(trained))))


def _rounding(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def compare(
    found: np.ndarray, trained: np.ndarray, *, tolerance: float, where: str | Path, before: np.ndarray | None = None
) -> Verified:
    """Compare logits [T, V] of a result that was loaded again with those of the trained model, and of it `before`.

    CheckpointError, which names `where`, if they differ by more than rounding, or are not finite.
    """
    effect = None if before is None else _relative(before, trained)
    verified = Verified(_relative(found, trained), tolerance, effect)
    if not verified.difference <= tolerance:  # also if it is NaN
        raise CheckpointError(
            f"{where}: found logits that differ from the trained model's by {verified.difference:.3g} of their size "
            f"once the result is loaded again; expected at most {tolerance:.3g}; the result was removed"
        )
    return verified
