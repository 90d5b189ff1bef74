"""What the picture and the video processors share: their settings, and reading them from a checkpoint."""

import copy
import logging
import math
import numbers
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import PIL.Image

from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.files import assets_directory, read_json_object
from glm4v_jax.inputs.vision.patches import Normalization

logger = logging.getLogger(__name__)

# The mean and standard deviation of CLIP's training pictures, red, green, blue, of values in [0, 1].
OPENAI_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


LARGEST_PATCH = 4096
"""Of the sides of a patch, in pixels, and of the numbers of frames and patches that are merged: arrays of more patches
of that size than one would not fit any machine."""


class MediaProcessor:
    """Settings as attributes, each overridable in a call, and `from_pretrained`.

    Attributes:
        do_resize: whether to resize; if not, sides must be multiples of `patch_size * merge_size`.
        size: {"shortest_edge": smallest, "longest_edge": largest} volume in pixels; see `smart_resize`.
        resample: one of `PIL.Image.Resampling`.
        do_rescale: whether to multiply by `rescale_factor`.
        rescale_factor: the factor.
        do_normalize: whether to subtract `image_mean` and divide by `image_std`.
        image_mean: one value, or one a channel.
        image_std: one value, or one a channel.
        do_convert_rgb: whether to convert to RGB.
        patch_size: rows and columns of a patch, in pixels.
        temporal_patch_size: frames of a patch.
        merge_size: patches a side that the model merges into one token.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000},
        "resample": PIL.Image.Resampling.BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
        "do_convert_rgb": True,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    # Where a checkpoint keeps the settings; the first file there is wins.
    config_files: ClassVar[tuple[str, ...]] = ()
    # The key of the settings inside a processor_config.json, and the key of the class name.
    nested_key: ClassVar[str] = ""
    type_key: ClassVar[str] = ""

    do_resize: bool
    size: dict[str, float]
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float]
    image_std: float | list[float]
    do_convert_rgb: bool
    patch_size: int
    temporal_patch_size: int
    merge_size: int

    def __init__(self, **settings: Any) -> None:
        """Take the given settings, and the class's defaults for the others and for None; unknown ones are ignored.

        Raises:
            ConfigError: a setting has an impossible value.
        """
        for name, default in self.defaults.items():
            value = settings.get(name)
            setattr(self, name, copy.deepcopy(default if value is None else value))
        self.resolve({})

    def resolve(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of one call: those of the instance, with those of the call that are not None on top.

        Raises:
            ConfigError: a setting has an impossible value; the message names it.
        """
        settings = {name: getattr(self, name) for name in self.defaults}
        settings.update({name: value for name, value in overrides.items() if value is not None})
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            settings[name] = _positive_integer(name, settings[name])
        settings["size"] = _area_bounds(settings["size"])
        settings["image_mean"] = _channel_values("image_mean", settings["image_mean"])
        settings["image_std"] = _channel_values("image_std", settings["image_std"])
        if settings["do_normalize"] and 0 in _as_tuple(settings["image_std"]):
            raise ConfigError(f"image_std={settings['image_std']}: expected no zeros")
        if settings["do_rescale"] and not is_number(settings["rescale_factor"], nonzero=True):
            raise ConfigError(f"rescale_factor={settings['rescale_factor']!r}: expected a number other than zero")
        try:
            settings["resample"] = PIL.Image.Resampling(settings["resample"])
        except ValueError as error:
            names = ", ".join(f"{int(item)} ({item.name})" for item in PIL.Image.Resampling)
            raise ConfigError(f"resample={settings['resample']!r}: expected one of {names}") from error
        return settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **overrides: Any) -> Self:
        """Make a processor from a checkpoint's settings; keyword arguments win over them."""
        return cls(**{**settings, **overrides})

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """Read the settings of a checkpoint; they win over the class's defaults, and keyword arguments over both.

        Args:
            path: the checkpoint's directory, or the file itself.
            **overrides: settings.

        Raises:
            CheckpointError: there is no such file, or it holds no settings; the message names it.
        """
        path = assets_directory(Path(os.fspath(path)))
        candidates = [path] if path.is_file() else [path / name for name in cls.config_files]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise CheckpointError(f"{path}: has no {' or '.join(cls.config_files)}")
        content = settings_in(read_json_object(file), file, cls.nested_key)
        try:
            return cls.from_dict(content, **overrides)
        except ConfigError as error:
            raise CheckpointError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings and the class name, as `preprocessor_config.json` holds them."""
        settings = {name: copy.deepcopy(getattr(self, name)) for name in self.defaults}
        settings["resample"] = int(settings["resample"])
        return {**settings, self.type_key: type(self).__name__}

    def __repr__(self) -> str:
        """The class name and its settings."""
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.defaults)
        return f"{type(self).__name__}({settings})"


def settings_in(content: Mapping[str, Any], file: Path, nested_key: str) -> Mapping[str, Any]:
    """The settings in a file: under a key of their own, or all of it.

    Raises:
        CheckpointError: what stands under the key are no settings.
    """
    settings = content.get(nested_key, content)
    if not isinstance(settings, Mapping):
        raise CheckpointError(
            f"{file}: field {nested_key!r} is a {type(settings).__name__}; expected an object of settings"
        )
    return settings


def normalization_of(settings: Mapping[str, Any], *, fused: bool) -> Normalization:
    """The arithmetic that resolved settings ask for."""
    normalize = settings["do_normalize"]
    return Normalization(
        scale=settings["rescale_factor"] if settings["do_rescale"] else None,
        mean=settings["image_mean"] if normalize else None,
        std=settings["image_std"] if normalize else None,
        fused=fused,
    )


def check_unused_geometry(settings: Mapping[str, Any]) -> None:
    """Check crop and padding, which the reference's general classes validate and GLM-4.1V's do not use.

    Raises:
        ConfigError: `do_center_crop` without `crop_size`.
    """
    if settings["do_center_crop"] and settings["crop_size"] is None:
        raise ConfigError("`crop_size` must be specified if `do_center_crop` is `True`.")
    for name in ("do_center_crop", "do_pad"):
        if settings.get(name):
            logger.warning("`%s` has no effect on GLM-4.1V, in the reference as here: sizes come from `size`.", name)


def _positive_integer(name: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if not 1 <= number <= LARGEST_PATCH:
        raise ConfigError(f"{name}={value!r}: expected a positive integer up to {LARGEST_PATCH}")
    return number


def is_number(value: Any, *, nonzero: bool = False) -> bool:
    """Whether this is a number that a float can hold: text that reads as one is none, and neither is a bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and not (nonzero and value == 0)
    except OverflowError:
        return False


def _area_bounds(size: Any) -> dict[str, float]:
    if not isinstance(size, Mapping) or size.get("shortest_edge") is None or size.get("longest_edge") is None:
        raise ConfigError(f"size must contain 'shortest_edge' and 'longest_edge' keys. Found size={size!r}")
    shortest, longest = size["shortest_edge"], size["longest_edge"]
    if not (is_number(shortest) and is_number(longest) and 0 < shortest <= longest):
        raise ConfigError(f"size={dict(size)}: expected pixels, 0 < shortest_edge <= longest_edge")
    return {"shortest_edge": shortest, "longest_edge": longest}


def _as_tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _channel_values(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    values = value if isinstance(value, (list, tuple)) else (value,)
    if not values or not all(is_number(item) for item in values):
        raise ConfigError(f"{name}={value!r}: expected a number, or a list of one a channel")
    return tuple(float(item) for item in values) if isinstance(value, (list, tuple)) else float(value)
