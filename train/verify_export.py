"""A result, loaded again and asked something fixed: does it say what the model said that was trained?"""

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
"""What two float32 programs of a layer that add in different orders may differ by."""

# One behind the other in a layer: matrices, and all steps that round what they hand on.
_MATRICES, _STEPS = 4, 12
_GROWTH = 2.0  # of an error on its way through later layers
_SIDE = 112
_QUESTION = "What is in this picture? Name what you see, from left to right, and say what it is for."


class Verified(NamedTuple):
    """How a result compares with the model that was trained: root mean squares over logits, as shares of that model's.

    difference: of its logits and the trained model's.
    tolerance: what rounding may come to.
    effect: the difference that training has made; None if it was not looked at.
    """

    difference: float
    tolerance: float
    effect: float | None = None

    def __str__(self) -> str:
        """In a line for a person."""
        text = f"logits differ by {self.difference:.2g} of their size (rounding: up to {self.tolerance:.2g})"
        if self.effect is None:
            return text
        text = f"{text}; training changed them by {self.effect:.2g}"
        if self.effect <= 2 * self.tolerance:
            return f"{text}, too little to be told from rounding"
        return text


def prompt(directory: str | Path, config: Glm4vConfig) -> Batch:
    """A question about a picture, always the same.

    Args:
      directory: of a checkpoint with tokenizer and processor.
      config: of the model.

    Raises:
      CheckpointError: the tokenizer or the processor is missing or damaged.
    """
    row, column = np.mgrid[:_SIDE, :_SIDE]
    picture = np.stack([row + column, 2 * row, (row - column) % 97 + 100 * (row > column)], axis=-1).astype(np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": _QUESTION}]
    processor = Glm4vProcessor.from_pretrained(directory)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    given: dict[str, Any] = {name: np.asarray(inputs[name]) for name in names}
    return make_batch(config=config, batch_multiple=data_shards(), **given)[0]


def logits_of(model: Glm4v, batch: Batch) -> np.ndarray:
    """Logits [T, V] of the prompt's tokens, float32, in all processes; all of them call this."""
    return to_host(_logits(model, batch))[0][np.asarray(batch.segment_ids)[0] > 0]


@jax.jit
def _logits(model: Glm4v, batch: Batch) -> Float[Array, "B T V"]:
    return reshard(model.logits(model(batch)).astype(jnp.float32), None, None, None)


def tolerance_of(config: Glm4vConfig, written: DTypeLike, computed: DTypeLike) -> float:
    """What two models may differ by, of which one has weights that were rounded once more, or adds in another order.

    A rounding is off by half of the dtype's epsilon at most, errors that follow one another add up as the root of their
    number, and layers behind them may double that. The number is that of the matrices that a token's way through the
    decoder leads over, for weights; and that of the steps that hand on what they have rounded, in both models, for what
    is computed. Two float32 models differ by `FLOAT32` a layer.

    Args:
      config: of the model.
      written: dtype of the weights that were written.
      computed: dtype that both models compute in.
    """
    layers = config.text_config.num_hidden_layers
    weights = _GROWTH * _rounding(written) * math.sqrt(_MATRICES * layers)
    steps = 0.0 if jnp.dtype(computed) == jnp.float32 else _rounding(computed) * math.sqrt(2 * _STEPS * layers)
    return math.hypot(FLOAT32 * math.sqrt(layers), weights, steps)


def _share(values: np.ndarray, trained: np.ndarray) -> float:
    values, trained = values.astype(np.float64), trained.astype(np.float64)
    return float(np.sqrt(np.mean(np.square(values - trained)) / np.mean(np.square(trained))))


def _rounding(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def compare(
    found: np.ndarray, trained: np.ndarray, *, tolerance: float, where: str | Path, before: np.ndarray | None = None
) -> Verified:
    """Compare logits [T, V] of a result that was loaded again with those of the model that was trained.

    Args:
      found: of the result.
      trained: of the model.
      tolerance: see `tolerance_of`.
      where: names the result in the error.
      before: of the model before it was trained.

    Raises:
      CheckpointError: they differ by more than rounding, or are no numbers.
    """
    effect = None if before is None else _share(before, trained)
    verified = Verified(_share(found, trained), tolerance, effect)
    if not verified.difference <= tolerance:  # nor if it is no number
        raise CheckpointError(
            f"{where}: loaded again, its logits differ from the trained model's by {verified.difference:.3g} of "
            f"their size; expected {tolerance:.3g} at most: it is not what was trained, and was not kept"
        )
    return verified
