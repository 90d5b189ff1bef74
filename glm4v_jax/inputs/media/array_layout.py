"""Where the channels of an array are."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from glm4v_jax.errors import ConfigError, MediaError

FIRST = "channels_first"


LAST = "channels_last"


NONE = "none"


def channel_format(value: Any, name: str) -> str | None:
    """The channel order as one of `FIRST`, `LAST`, `NONE`, or None if unset; takes the reference's enumeration too.

    Raises:
        ConfigError: an unknown order.
    """
    value = getattr(value, "value", value)
    if value not in (None, FIRST, LAST, NONE):
        raise ConfigError(f"{name}={value!r}: expected {FIRST!r}, {LAST!r}, {NONE!r} or None")
    return value


def infer_channel_format(shape: Sequence[int], num_channels: tuple[int, ...] = (1, 3)) -> str:
    """Where the channels are, as the reference guesses: the first axis of an image that can be one, then the last.

    The shape may have a frame axis before these. MediaError if neither can be the channels.
    """
    if len(shape) not in (3, 4):
        raise MediaError(f"Unsupported number of image dimensions: {len(shape)}")
    if shape[-3] in num_channels:
        return FIRST
    if shape[-1] in num_channels:
        return LAST
    raise MediaError(
        f"Unable to infer channel dimension format of shape {tuple(shape)}: expected {num_channels} channels, first or "
        "last; say which with `input_data_format`"
    )


def to_channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """View an image or video [..., C, H, W], [..., H, W, C] or [H, W], which has one channel, as [..., H, W, C].

    None guesses the order. MediaError if the array has no pixels, or the order cannot be guessed.
    """
    if array.size == 0:
        raise MediaError(f"array of shape {array.shape} has no pixels")
    if array.ndim == 2:
        return array[..., None]
    if input_data_format == NONE:
        raise MediaError(f"array of shape {array.shape}: expected [H, W] with input_data_format='none'")
    if input_data_format is None:
        input_data_format = infer_channel_format(array.shape)
    return np.moveaxis(array, -3, -1) if input_data_format == FIRST else array
