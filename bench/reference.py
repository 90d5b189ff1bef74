"""transformers 4.57.1, live: models in float32 with eager attention, and processors."""

import pathlib
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from tests.helpers_transformers import define_torchvision_operators

VERSION = "4.57.1"


def import_transformers() -> ModuleType:
    """The reference, importable beside a torchvision without compiled operators.

    Raises:
      SystemExit: it is not installed, or is another version.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise SystemExit("this measurement needs the reference: pip install '.[test]'") from None
    define_torchvision_operators()
    import transformers

    if transformers.__version__ != VERSION:
        raise SystemExit(f"transformers: found {transformers.__version__}; expected {VERSION}")
    transformers.logging.set_verbosity_error()
    return transformers


def load_model(directory: pathlib.Path | str, attention: str = "eager") -> Any:
    """The reference's model, greedy whatever a checkpoint's generation_config.json says, and never at an end."""
    import torch

    classes = import_transformers()
    model = classes.Glm4vForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )
    model.generation_config = classes.GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()


def load_processor(directory: pathlib.Path) -> Any:
    """The reference's processor, its slow image processor, and decord, which it knows, to read video files."""
    classes = import_transformers()
    from transformers.video_utils import load_video

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = classes.AutoProcessor.from_pretrained(directory)

    def fetch(videos: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(videos, list):
            return list(zip(*[fetch(video, sample_indices_fn) for video in videos], strict=True))
        return load_video(videos, backend="decord", sample_indices_fn=sample_indices_fn)

    processor.video_processor.fetch_videos = fetch
    return processor


def to_numpy(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Torch tensors, or lists, to NumPy arrays."""
    return {name: np.asarray(value) for name, value in inputs.items()}
