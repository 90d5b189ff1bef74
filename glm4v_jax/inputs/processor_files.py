"""Which classes a checkpoint's files name for its processor and the parts of it, and what settings these have."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from glm4v_jax.config.family import architecture_of, processors_of
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, ConfigError, naming
from glm4v_jax.files import read_json_object
from glm4v_jax.inputs.vision.image import Glm4vImageProcessor, Glm4vImageProcessorFast
from glm4v_jax.inputs.vision.settings import PROCESSOR_FILE, MediaProcessor

ImageProcessor = Glm4vImageProcessor | Glm4vImageProcessorFast
Part = TypeVar("Part", bound=MediaProcessor)

# Where a processor's class may be named, in the order in which the reference looks for it.
_PROCESSOR_FILES = (
    PROCESSOR_FILE, "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json",
)  # fmt: skip


@contextlib.contextmanager
def other_models_named(directory: pathlib.Path) -> Iterator[None]:
    """Name the model where files are not those of one of the family: that says more than the file that does not fit.

    Raises:
      ConfigError: of a model that does not run here.
    """
    try:
        yield
    except CheckpointError:
        if (path := directory / "config.json").is_file():
            with naming(path, ConfigError):
                architecture_of(read_json_object(path).get("model_type", Glm4vConfig.model_type))
        raise


def image_class(directory: pathlib.Path, use_fast: bool | None) -> type[ImageProcessor]:
    """Return the class for images that a checkpoint names, or `use_fast` asks for."""
    if use_fast is None:
        file, settings = Glm4vImageProcessor.settings_of(directory)
        with naming(file, CheckpointError):
            row = Glm4vImageProcessor.row_in(settings)
        use_fast = settings.get("image_processor_type") in row.torchvision
    return Glm4vImageProcessorFast if use_fast else Glm4vImageProcessor


def read_part(cls: type[Part], directory: pathlib.Path, overrides: Mapping[str, Any]) -> Part:
    """Make the part of a checkpoint's processor, with those of the overrides that it knows."""
    file, settings = cls.settings_of(directory)
    with naming(file, CheckpointError):
        known = cls.defaults_of(cls.row_in(settings))
        return cls.from_dict(settings, **{name: value for name, value in overrides.items() if name in known})


def processor_class_in(directory: pathlib.Path) -> str | None:
    """Return the class of its processor that a checkpoint names; CheckpointError if it is another family's."""
    for path in (directory / name for name in _PROCESSOR_FILES):
        found = read_json_object(path).get("processor_class") if path.is_file() else None
        if found is not None:
            with naming(path, CheckpointError):
                return processors_of("processor_class", found).processor
    return None
