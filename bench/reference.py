"""transformers 4.57.1, live: models in float32 with eager attention, and processors."""

import json
import pathlib
import shutil
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.tiny import TINY_CHECKPOINT
from tests.reference import CONFIGS, random_tensors

VERSION = "4.57.1"
PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja",
)  # fmt: skip

_LIBRARIES: list[Any] = []


def import_transformers() -> ModuleType:
    """The reference, importable beside a torchvision without compiled operators.

    Raises:
      SystemExit: it is not installed, or is another version.
    """
    try:
        import torch
    except ImportError:
        raise SystemExit("this measurement needs the reference: pip install '.[test]'") from None
    # A torchvision wheel beside a CPU build of torch lacks two operators and wants them at import; the library that
    # declares them must stay alive.
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _LIBRARIES.append(library)
    import transformers

    if transformers.__version__ != VERSION:
        raise SystemExit(f"transformers: found {transformers.__version__}, expected {VERSION}")
    transformers.logging.set_verbosity_error()
    return transformers


def write_checkpoint(name: str, directory: pathlib.Path) -> pathlib.Path:
    """Write a checkpoint whose random weights let every part show in the logits.

    Args:
      name: of `tests.reference.CONFIGS`; or "packaged", the packaged configuration with its processors.
      directory: where to, made if need be.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if name == "packaged":
        data = json.loads((TINY_CHECKPOINT / "config.json").read_text(encoding="utf-8"))
        for file in PROCESSOR_FILES:
            shutil.copyfile(TINY_CHECKPOINT / file, directory / file)
    else:
        data = CONFIGS[name]
    (directory / "config.json").write_text(json.dumps(data), encoding="utf-8")
    tensors = random_tensors(Glm4vConfig.from_dict(data))
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    return directory


def load_model(directory: pathlib.Path) -> Any:
    """The reference's model."""
    import torch

    classes = import_transformers()
    model = classes.Glm4vForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    # Greedy whatever a checkpoint's generation_config.json says, and never at an end.
    model.generation_config = classes.GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()


def load_processor(directory: pathlib.Path) -> Any:
    """The reference's processor, its slow picture processor, and decord, which it knows, to read video files."""
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


def to_torch(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """NumPy arrays to torch tensors of their own."""
    import torch

    return {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}


def to_numpy(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Torch tensors, or lists, to NumPy arrays."""
    return {name: np.asarray(value) for name, value in inputs.items()}
