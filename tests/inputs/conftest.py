"""The processor of a small checkpoint, ours and that of the reference."""

import functools

import pytest

from glm4v_jax.inputs.processor import Glm4vProcessor
from tests.helpers_tokenizer import write_small_processor


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_small_processor(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def processor(directory):
    return Glm4vProcessor.from_pretrained(directory)


@functools.cache
def _declare_torchvision_operators():
    """A torchvision wheel beside a torch of another build has no compiled operators, and wants two at import."""
    torch = pytest.importorskip("torch")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError as error:
            if "already" not in str(error) and "multiple times" not in str(error):
                raise
    return library


@pytest.fixture(scope="module")
def reference(directory):
    pytest.importorskip("transformers")
    _declare_torchvision_operators()
    pytest.importorskip("torchvision")
    from transformers.models.glm4v.image_processing_glm4v import Glm4vImageProcessor as ReferenceImageProcessor
    from transformers.models.glm4v.processing_glm4v import Glm4vProcessor as ReferenceProcessor
    from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor as ReferenceVideoProcessor
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

    return ReferenceProcessor(
        ReferenceImageProcessor.from_pretrained(directory),
        PreTrainedTokenizerFast.from_pretrained(directory),
        ReferenceVideoProcessor.from_pretrained(directory),
        chat_template=(directory / "chat_template.jinja").read_text(),
    )
