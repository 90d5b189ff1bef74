"""What the image and the video processors share: their settings, and reading them from a checkpoint."""

import copy
import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import PIL.Image
from msgspec import Meta

from glm4v_jax.config.checks import Positive, PositiveNumber, checked, fault
from glm4v_jax.config.family import PROCESSORS, ProcessorField, Processors, processors_of
from glm4v_jax.errors import CheckpointError, ConfigError, MediaError, counted, naming
from glm4v_jax.files import assets_directory, read_json_object, refuse_adapter, write_json
from glm4v_jax.inputs.batch_feature import BatchFeature, check_device, check_return_tensors
from glm4v_jax.inputs.media.array_layout import FIRST, channel_format
from glm4v_jax.inputs.media.decode import MAX_DECODED_BYTES, MAX_PIXELS
from glm4v_jax.inputs.vision.smart_resize import smart_resize

logger = logging.getLogger(__name__)

# The mean and standard deviation of CLIP's training images, red, green, blue, of values in [0, 1].
OPENAI_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

# What the reference's fast image processor and its video processor take besides.
GENERAL_DEFAULTS: Mapping[str, Any] = {
    "do_center_crop": None,
    "crop_size": None,
    "default_to_square": True,
    "data_format": FIRST,
    "input_data_format": None,
}

PROCESSOR_FILE = "processor_config.json"
"""Where 5.x writes the settings of both, each under a key of its own."""

AREA_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
"""Options of a call, or of one image or video, in Qwen's style: height times width of an image or a frame, and the
sides to resize to, before they are rounded to merged patches. They win over `size`; see `area_of`."""

# Of a resized frame: three channels of float32.
_PIXEL_BYTES = 12

Side = Annotated[int, Meta(ge=1, le=4096)]
"""Of a patch, in pixels; and the numbers of frames and of patches that are merged. Arrays of larger patches would
not fit any machine."""
ChannelValues = float | Annotated[tuple[float, ...], Meta(min_length=1, description="a list of one a channel")]


@dataclasses.dataclass(frozen=True, eq=False)
class MediaWithOptions:
    """An image or video with options of its own, which win over those of the call: `AREA_OPTIONS`, and of a video
    `fps` and `do_sample_frames`.
    """

    source: Any
    options: Mapping[str, Any]

    @staticmethod
    def split(media: Any) -> tuple[Any, Mapping[str, Any]]:
        """The source and the options of an image or video, which may have none."""
        return (media.source, media.options) if isinstance(media, MediaWithOptions) else (media, {})


class MediaProcessor:
    """Settings as attributes, each overridable in a call, and `from_pretrained`.

    Which member's processor it is, it takes from the class name among the settings, such as `image_processor_type`;
    without one it is GLM-4.1V's.

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
        patch_expand_factor: of GLM-GA: sides are multiples of this many merged patches.
        row: what this member's processor does differently.
        class_name: what a checkpoint's files call the class.
        defaults: the settings of this member, and their defaults; of the class, those of GLM-4.1V.
    """

    defaults: Mapping[str, Any] = {
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
    constraints: ClassVar[Mapping[str, Any]] = {
        "patch_size": Side,
        "temporal_patch_size": Side,
        "merge_size": Side,
        "patch_expand_factor": Side,
        "rescale_factor": float,
        "image_mean": ChannelValues,
        "image_std": ChannelValues,
    }
    # Whether it is torchvision's class in the reference: settings include `GENERAL_DEFAULTS`; calls take any settings,
    # log unknown ones and refuse torch's; and `patch_expand_factor` counts, which Pillow's classes have and ignore.
    is_general: ClassVar[bool] = False
    # Where a checkpoint keeps the settings, if not in `PROCESSOR_FILE`; the first file there is wins.
    config_files: ClassVar[tuple[str, ...]] = ()
    # The key of the settings inside a processor_config.json, and the key of the class name.
    nested_key: ClassVar[str] = ""
    type_key: ClassVar[ProcessorField]

    preprocess: Callable[..., BatchFeature]
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
    row: Processors
    class_name: str

    def __init__(self, **settings: Any) -> None:
        """Take the given settings, and the class's defaults for the others and for None; warn of unknown ones.

        Raises:
            ConfigError: a setting has an impossible value, the class name is another family's, or `device` or
                `return_tensors` is one of torch's.
        """
        refuse_area_options(settings)
        self.row = self.row_in(settings)
        names, named = self._class_names(self.row), settings.get(self.type_key)
        self.class_name = named if named in names else names[0]
        self.processor_class = settings.get("processor_class") or self.row.processor
        self.defaults = self.defaults_of(self.row)
        unknown = sorted(set(settings) - {*self.defaults, "device", "return_tensors", self.type_key, "processor_class"})
        if unknown:
            warnings.warn(f"{type(self).__name__}: unknown settings are ignored: {', '.join(unknown)}", stacklevel=2)
        if self.is_general:
            check_device(settings.get("device"))
            check_return_tensors(settings.get("return_tensors"))
        for name, default in self.defaults.items():
            value = settings.get(name)
            setattr(self, name, copy.deepcopy(default if value is None else value))
        self.resolve({})

    @classmethod
    def row_in(cls, settings: Mapping[str, Any]) -> Processors:
        """The row that settings, or a checkpoint's file, name by a class; GLM-4.1V's where they name none.

        A file for images and videos names the class of the first alone; the processor's is the last resort.

        Raises:
            ConfigError: the class is another family's.
        """
        fields: tuple[ProcessorField, ...] = (cls.type_key, "image_processor_type", "processor_class")
        field = next((field for field in fields if settings.get(field) is not None), None)
        return PROCESSORS["glm4v"] if field is None else processors_of(field, settings[field])

    @classmethod
    def _class_names(cls, row: Processors) -> tuple[str, ...]:
        """What a member's files may call a processor of this class, the name to write first."""
        return row.classes(cls.type_key)

    @classmethod
    def defaults_of(cls, row: Processors) -> dict[str, Any]:
        """The settings of a member, and their defaults."""
        return {**cls.defaults, **row.settings(cls.type_key)}

    def resolve(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of one call: those of the instance, with those of the call that are not None on top.

        `resize_factor` is among them, in pixels: what sides are multiples of after resizing.

        Raises:
            ConfigError: a setting has an impossible value; the message names it.
        """
        settings = {name: getattr(self, name) for name in self.defaults}
        settings.update({name: value for name, value in overrides.items() if value is not None})
        for name, hint in self.constraints.items():
            if name in settings:
                settings[name] = checked(name, settings[name], hint)
        expansion = settings.get("patch_expand_factor", 1) if self.is_general else 1
        settings["resize_factor"] = settings["patch_size"] * settings["merge_size"] * expansion
        settings["size"] = _area_bounds(settings["size"])
        checked_area(settings)
        for name, is_used in (("image_std", settings["do_normalize"]), ("rescale_factor", settings["do_rescale"])):
            if is_used and not np.all(settings[name]):
                raise ConfigError(fault(name, settings[name], "a number other than zero"))
        try:
            settings["resample"] = PIL.Image.Resampling(settings["resample"])
        except ValueError as error:
            names = ", ".join(f"{int(item)} ({item.name})" for item in PIL.Image.Resampling)
            raise ConfigError(fault("resample", settings["resample"], f"one of {names}")) from error
        if self.is_general:
            _check_general(settings)
        return settings

    def known(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Take the settings from the options of a call of a general processor; unknown ones are logged.

        Raises:
            ConfigError: `device` or `return_tensors` is one of torch's.
        """
        check_return_tensors(options.get("return_tensors"))
        check_device(options.get("device"))
        known = {*self.defaults, *AREA_OPTIONS}
        unknown = sorted(set(options) - known - {"return_tensors", "device"})
        if unknown:
            logger.warning("Unused or unrecognized kwargs: %s.", ", ".join(unknown))
        return {name: value for name, value in options.items() if name in known}

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Short for `preprocess`."""
        return self.preprocess(*args, **kwargs)

    def _num_patches(self, num_frames: int | None, height: int, width: int, options: Mapping[str, Any] | None) -> int:
        """Patches of a clip of this size, before merging; without `num_frames` those of an image."""
        known = {*self.defaults, *AREA_OPTIONS}
        settings = self.resolve({k: v for k, v in (options or {}).items() if k in known})
        patch_size, temporal = settings["patch_size"], settings["temporal_patch_size"]
        num_frames = temporal if num_frames is None else num_frames
        height, width = area_of(settings, num_frames, height, width)
        return -(-num_frames // temporal) * (height // patch_size) * (width // patch_size)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **overrides: Any) -> Self:
        """Make a processor from a checkpoint's settings, which may be others' too; keyword arguments win over them."""
        row = cls.row_in(settings)
        known = {*cls.defaults_of(row), "processor_class"}
        named = {cls.type_key: settings.get(cls.type_key) or cls._class_names(row)[0]}
        return cls(**named | {name: value for name, value in settings.items() if name in known} | overrides)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """Read the settings of a checkpoint; they win over the class's defaults, and keyword arguments over both.

        Args:
            path: the checkpoint's directory, or the file itself.
            **overrides: settings.

        Raises:
            CheckpointError: there is no such file, or it holds no settings; the message names it.
            ConfigError: an override is one of `AREA_OPTIONS`.
        """
        refuse_area_options(overrides)
        file, settings = cls.settings_of(assets_directory(Path(os.fspath(path))))
        with naming(file, CheckpointError):
            return cls.from_dict(settings, **overrides)

    @classmethod
    def settings_of(cls, path: Path) -> tuple[Path, Mapping[str, Any]]:
        """The file of a checkpoint that has the settings, and what it has.

        Those in a processor_config.json, as 5.x writes it, win over files of their own, as they do there.

        Args:
            path: the checkpoint's directory, or the file itself.

        Raises:
            CheckpointError: there is no such file, or it holds no settings; the message names it.
        """
        files = [path] if path.is_file() else [path / name for name in (PROCESSOR_FILE, *cls.config_files)]
        for file in files:
            content = read_json_object(file) if file.is_file() else {}
            settings = content.get(cls.nested_key)
            if isinstance(settings, Mapping):
                return file, {"processor_class": content.get("processor_class"), **settings}
            if settings is not None:
                raise CheckpointError(f"{file}: " + fault(cls.nested_key, settings, "an object of settings"))
            if file.is_file() and (file == path or file.name != PROCESSOR_FILE):
                return file, content
        refuse_adapter(path)
        expected = f"{', '.join(cls.config_files)} or {PROCESSOR_FILE} with {cls.nested_key!r}"
        raise CheckpointError(f"{path}: found no settings of the processor; expected {expected}")

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the settings as a file that `from_pretrained` here and in transformers loads.

        Args:
            save_directory: made if need be; gets `preprocessor_config.json` or `video_preprocessor_config.json`, except
                that a `processor_config.json` of 5.x in it, whose settings would be read, gets them instead.
        """
        directory = Path(os.fspath(save_directory))
        directory.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in self.to_dict().items() if value is not None}
        shared = directory / PROCESSOR_FILE
        content = read_json_object(shared) if shared.is_file() else {}
        if self.nested_key in content:
            write_json(shared, content | {self.nested_key: settings, "processor_class": self.processor_class})
        else:
            write_json(directory / self.config_files[0], settings | {"processor_class": self.processor_class})

    def to_dict(self) -> dict[str, Any]:
        """The settings and the class name, as `preprocessor_config.json` holds them."""
        settings = {name: copy.deepcopy(getattr(self, name)) for name in self.defaults}
        settings["resample"] = int(settings["resample"])
        return {**settings, self.type_key: self.class_name}

    def __repr__(self) -> str:
        """The class name and its settings."""
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.defaults)
        return f"{type(self).__name__}({settings})"


def _check_general(settings: Mapping[str, Any]) -> None:
    """Check crop, padding and layout, which the reference's general classes validate and GLM-4.1V's do not use."""
    if settings["do_center_crop"] and settings["crop_size"] is None:
        raise ConfigError("`crop_size` must be specified if `do_center_crop` is `True`.")
    for name in ("do_center_crop", "do_pad"):
        if settings.get(name):
            logger.warning("`%s` has no effect on GLM-4.1V, in the reference as here: sizes come from `size`.", name)
    if channel_format(settings["data_format"], "data_format") != FIRST:
        raise ConfigError("Only channel first data format is currently supported.")


def _area_bounds(size: Any) -> dict[str, float]:
    if not isinstance(size, Mapping) or size.get("shortest_edge") is None or size.get("longest_edge") is None:
        # In the words of the reference.
        raise ConfigError(f"size must contain 'shortest_edge' and 'longest_edge' keys. Found size={size!r}")
    bounds = {name: size[name] for name in ("shortest_edge", "longest_edge")}
    for name, bound in bounds.items():
        checked(f"size.{name}", bound, PositiveNumber)
    if bounds["shortest_edge"] > bounds["longest_edge"]:
        raise ConfigError(fault("size", dict(size), "shortest_edge of at most longest_edge, in pixels"))
    return bounds


def refuse_area_options(settings: Mapping[str, Any]) -> None:
    """Refuse `AREA_OPTIONS` as settings of a processor: a file that has them would mean something else elsewhere.

    Raises:
        ConfigError: there is one.
    """
    for name in AREA_OPTIONS:
        if settings.get(name) is not None:
            expected = "it in a call or in an item of a message, or 'size' with shortest_edge and longest_edge"
            raise ConfigError(fault(name, settings[name], expected))


def checked_area(settings: Mapping[str, Any]) -> None:
    """Check `AREA_OPTIONS` among settings.

    Raises:
        ConfigError: one is not a number of pixels, a side comes without the other, or the smallest area is the larger.
    """
    found = {name: settings[name] for name in AREA_OPTIONS if settings.get(name) is not None}
    for name, value in found.items():
        checked(name, value, Positive)
    for name, other in (("resized_height", "resized_width"), ("resized_width", "resized_height")):
        if name in found and other not in found:
            raise ConfigError(fault(other, None, f"a number of pixels beside {name}"))
    if "min_pixels" in found and found["min_pixels"] > found.get("max_pixels", math.inf):
        raise ConfigError(fault("min_pixels", found["min_pixels"], f"at most max_pixels, {found['max_pixels']}"))


def area_of(settings: Mapping[str, Any], num_frames: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) that resolved settings resize a clip to; an image counts as one temporal patch of frames.

    `min_pixels` and `max_pixels` count one image or frame, and `size` counts all frames, each of which an image has
    `temporal_patch_size` of: `max_pixels` may exceed `size` for an image, but not for all frames of a video.

    Raises:
        MediaError: the size is impossible, or so large that the frames would not fit into memory.
    """
    smallest, largest = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
    if (asked := settings.get("max_pixels")) is not None:
        largest = min(asked * num_frames, max(largest, asked * settings["temporal_patch_size"]))
        smallest = min(smallest, largest)
    if (asked := settings.get("min_pixels")) is not None:
        smallest = asked * num_frames
        largest = max(smallest, largest)
    if settings.get("resized_height") is not None:
        height, width = settings["resized_height"], settings["resized_width"]
    height, width = smart_resize(
        num_frames=num_frames,
        height=height,
        width=width,
        temporal_factor=settings["temporal_patch_size"],
        factor=settings["resize_factor"],
        min_pixels=smallest,
        max_pixels=largest,
    )
    if height * width > MAX_PIXELS or num_frames * height * width * _PIXEL_BYTES > MAX_DECODED_BYTES:
        raise MediaError(
            f"found {counted(num_frames, 'frame')} to be resized to {height} x {width} pixels; expected at most "
            f"{MAX_PIXELS} pixels, and {MAX_DECODED_BYTES} bytes in all: lower {', '.join(AREA_OPTIONS)} or size"
        )
    return height, width


def check_sides(settings: Mapping[str, Any], height: int, width: int) -> None:
    """Check the size of frames that are not resized.

    Raises:
        MediaError: a side is not a multiple of that of a merged patch.
    """
    factor = settings["patch_size"] * settings["merge_size"]
    if height % factor or width % factor:
        raise MediaError(f"has {height} x {width} pixels; without do_resize, expected multiples of {factor}")
