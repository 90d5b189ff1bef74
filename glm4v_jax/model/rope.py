"""Rotary position embeddings: 2-D for the ViT; multimodal (M-RoPE), partial and interleaved for the decoder.

Angles, cosines and sines are float32 whatever the compute dtype is. Frequencies are computed on the host in NumPy
float32, in the reference's order of operations (`modeling_rope_utils`).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glm4v_jax.config.model import Glm4vTextConfig


def apply_interleaved(
    x: Float[Array, "B T *heads H"], cos: Float[Array, "B T F"], sin: Float[Array, "B T F"]
) -> Float[Array, "B T *heads H"]:
    """Rotate the pairs (2i, 2i+1) of the first 2F of H dimensions (`apply_multimodal_rotary_pos_emb`; trap T11)."""
    rotary = 2 * cos.shape[-1]
    head_axes = tuple(range(2, x.ndim - 1))
    cos, sin = (jnp.expand_dims(jnp.repeat(y, 2, axis=-1), head_axes) for y in (cos, sin))
    turned = x[..., :rotary].astype(jnp.float32)
    # Neighbours are swapped by shifts: the other way, an axis of length 2, makes a TPU change the layout.
    is_even = jnp.arange(rotary) % 2 == 0
    partner = jnp.where(is_even, -jnp.roll(turned, -1, axis=-1), jnp.roll(turned, 1, axis=-1))
    rotated = (turned * cos + partner * sin).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., rotary:]], axis=-1)


def apply_half(
    x: Float[Array, "R L N H"], cos: Float[Array, "R L F"], sin: Float[Array, "R L F"]
) -> Float[Array, "R L N H"]:
    """Rotate the pairs (i, i + H/2), F = H/2 (`apply_rotary_pos_emb_vision`)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def vision_cos_sin(
    coords: Int[Array, "R L 2"], head_dim: int, theta: float = 10000.0
) -> tuple[Float[Array, "R L F"], Float[Array, "R L F"]]:
    """Cosines and sines of patch coordinates (row, column), which have half of the F = head_dim / 2 angles each."""
    dim = head_dim // 2
    angles = coords.astype(jnp.float32)[..., None] * _powers(theta, dim)
    angles = angles.reshape(*coords.shape[:-1], dim)
    return jnp.cos(angles), jnp.sin(angles)


def mrope_cos_sin(
    position_ids: Int[Array, "3 B T"], config: Glm4vTextConfig
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """Cosines and sines of M-RoPE positions, F = rotary_dim / 2: each frequency follows one of the three positions."""
    axis_of_frequency = np.repeat(np.arange(3), config.mrope_section)
    positions = jnp.moveaxis(position_ids[axis_of_frequency], 0, -1).astype(jnp.float32)
    frequencies, scale = _text_frequencies(config, jnp.max(position_ids) + 1)
    angles = positions * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _periods(base: float, dim: int) -> np.ndarray:
    """Position steps per radian, base ** (2i / dim): float32 [dim / 2].

    Float32 exponents, but the power is rounded only once, as torch's is: NumPy's float32 power is a unit in the last
    place off, which positions of tens of thousands turn into angles off by 5e-4.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(np.float64(base), exponents.astype(np.float64)).astype(np.float32)


def _powers(base: float, dim: int) -> np.ndarray:
    return np.float32(1) / _periods(base, dim)


def _text_frequencies(config: Glm4vTextConfig, seq_len: Int[Array, ""]) -> tuple[Array | np.ndarray, float]:
    """Inverse frequencies [F] and the factor on cosines and sines (`modeling_rope_utils`, one branch a rope type).

    `dynamic` and `longrope` depend on the largest position of this call, as in the reference. There a longer earlier
    call lingers in the module's buffers; here the result is a function of the arguments alone.
    """
    rope, base, dim = config.rope, config.rope_theta, config.rotary_dim
    default = _powers(base, dim)
    match rope.rope_type:
        case "linear":
            return default / np.float32(rope.factor), 1.0
        case "dynamic":
            return _dynamic_ntk(config, seq_len), 1.0
        case "yarn":
            return _yarn(config), _yarn_attention_factor(config)
        case "longrope":
            return _longrope(config, seq_len)
        case "llama3":
            return _llama3(config, default), 1.0
        case _:
            return default, 1.0


def _dynamic_ntk(config: Glm4vTextConfig, seq_len: Int[Array, ""]) -> Array:
    limit, factor, dim = config.max_position_embeddings, config.rope.factor, config.rotary_dim
    assert factor is not None
    length = jnp.maximum(seq_len, limit).astype(jnp.float32)
    base = config.rope_theta * (factor * length / limit - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / base ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


def _yarn_attention_factor(config: Glm4vTextConfig) -> float:
    rope, factor = config.rope, config.rope.factor
    assert factor is not None
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _yarn(config: Glm4vTextConfig) -> np.ndarray:
    rope, base, dim = config.rope, config.rope_theta, config.rotary_dim
    limit = rope.original_max_position_embeddings or config.max_position_embeddings

    def correction(rotations: float) -> float:
        return dim * math.log(limit / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction(rope.beta_fast or 32), correction(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    periods = _periods(base, dim)
    extrapolated, interpolated = 1 / periods, 1 / (np.float32(rope.factor) * periods)
    return (interpolated * ramp + extrapolated * (1 - ramp)).astype(np.float32)


def _longrope(config: Glm4vTextConfig, seq_len: Int[Array, ""]) -> tuple[Array, float]:
    rope, factor = config.rope, config.rope.factor
    limit = config.original_max_position_embeddings
    if limit:
        factor = config.max_position_embeddings / limit
    else:
        limit = config.max_position_embeddings
    scale = rope.attention_factor
    if scale is None:
        scale = 1.0 if factor is None or factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(limit))
    periods = _periods(config.rope_theta, config.rotary_dim)
    short, long = (1 / (np.asarray(f, np.float32) * periods) for f in (rope.short_factor, rope.long_factor))
    return jnp.where(seq_len > limit, long, short), scale


def _llama3(config: Glm4vTextConfig, frequencies: np.ndarray) -> np.ndarray:
    rope = config.rope
    factor, low, high = rope.factor, rope.low_freq_factor, rope.high_freq_factor
    context = rope.original_max_position_embeddings
    assert factor is not None and low is not None and high is not None and context is not None
    wavelength = 2 * math.pi / frequencies
    smooth = (context / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelength > context / low, frequencies / factor, smoothed)
    return np.where(wavelength < context / high, frequencies, scaled).astype(np.float32)
