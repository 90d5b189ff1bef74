"""The family: models of GLM-4.1V's architecture, and what each of them does differently, as tables.

>>> architecture_of("glm_ocr").model_class
'GlmOcrForConditionalGeneration'
>>> architecture_of("glm4v_moe")
Traceback (most recent call last):
  ...
glm4v_jax.errors.ConfigError: model_type: found 'glm4v_moe' (GLM-4.5V or GLM-4.6V, a mixture of experts); expected one of 'glm4v', 'glm46v', 'glmga', 'glm_ocr' (the dense models of GLM-4.1V's family)

A difference that a file's own fields do not say is a field of a row here; no code asks which member it has.
The structure is that of transformers 5.24 (`models/{glm4v,glm46v,glmga,glm_ocr}`).
"""  # noqa: E501

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from glm4v_jax.config.checks import fault, one_of
from glm4v_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextStructure:
    """What a decoder is, beyond the fields of its `text_config`.

    >>> TEXT["glm4v_text"].attention_bias, TEXT["glm_ocr_text"].attention_bias
    (True, False)

    Attributes:
      defaults: of fields that a file may leave out, where they are not those of `Glm4vTextConfig`.
      attention_bias: q, k and v have biases. Files have a field of this name too, which the reference does not read.
      mrope_section, partial_rotary_factor: of the released checkpoint, for a configuration without any.
      extra_layers: layers after the last that a checkpoint may have: they predict further tokens (MTP); the reference
        skips their tensors.
      rope_parameters: the rope is written in the spelling of 5.x, as 4.57 cannot read such a model anyway.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention_bias: bool = True
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    partial_rotary_factor: float = 0.5
    extra_layers: int = 0
    rope_parameters: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionStructure:
    """What a ViT and its merger are, beyond the fields of their `vision_config`.

    >>> VISION["glm4v"].position_table, VISION["glm_ocr_vision"].position_table
    (True, False)

    Attributes:
      defaults: of fields that a file may leave out, where they are not those of `Glm4vVisionConfig`.
      mlp_bias: `attention_bias` also means the attention's output projection and the blocks' MLP.
      qk_norm: queries and keys of every head are RMS-normed before they rotate.
      position_table: learned positions are added to the patches.
      post_conv_norm: patches are RMS-normed first.
      mlp_width, merger_width: fields whose product is the width of the blocks' MLP, and of the merger's.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mlp_bias: bool = False
    qk_norm: bool = False
    position_table: bool = True
    post_conv_norm: bool = True
    mlp_width: tuple[str, ...] = ("out_hidden_size",)
    merger_width: tuple[str, ...] = ("intermediate_size",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A `model_type` of config.json.

    Attributes:
      model_class: name in `architectures`.
      text, vision: `model_type` of the parts, keys of `TEXT` and `VISION`.
      written_vision: what config.json says of the ViT. Where 5.x chooses a class by it, "glm4v" would mean a whole
        GLM-4.1V of the default size.
      defaults: of token ids that a file may leave out, where they are not those of `Glm4vConfig`.
      tied_at_top: a tied head may be said at the top of the file as well as in its text part.
    """

    model_class: str
    text: str = "glm4v_text"
    vision: str = "glm4v"
    written_vision: str = "glm4v"
    defaults: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tied_at_top: bool = False


TEXT: Mapping[str, TextStructure] = {
    "glm4v_text": TextStructure(),
    "glm_ocr_text": TextStructure(
        defaults={
            "vocab_size": 59392, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        },
        attention_bias=False, mrope_section=(16, 24, 24), partial_rotary_factor=1.0, extra_layers=1,
        rope_parameters=True,
    ),
}  # fmt: skip
"""Decoders, by the `model_type` of `text_config`."""

VISION: Mapping[str, VisionStructure] = {
    "glm4v": VisionStructure(),
    "glm_ocr_vision": VisionStructure(
        defaults={
            "hidden_size": 1024, "attention_bias": True, "num_heads": 16, "out_hidden_size": 1536,
            "intermediate_size": 4096,
        },
        mlp_bias=True, qk_norm=True, position_table=False, post_conv_norm=False,
        mlp_width=("intermediate_size",), merger_width=("out_hidden_size", "in_channels"),
    ),
}  # fmt: skip
"""ViTs, by the `model_type` of `vision_config` (in 4.57's spelling: 5.x calls the first "glm4v_vision")."""

_GLM46V = Architecture(
    model_class="Glm46VForConditionalGeneration",
    written_vision="glm4v_vision",
    defaults={"video_start_token_id": 151361, "video_end_token_id": 151362},
    tied_at_top=True,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "glm4v": Architecture(model_class="Glm4vForConditionalGeneration"),
    "glm46v": _GLM46V,
    "glmga": _GLM46V,
    "glm_ocr": Architecture(
        model_class="GlmOcrForConditionalGeneration", text="glm_ocr_text", vision="glm_ocr_vision",
        written_vision="glm_ocr_vision",
        defaults={
            "image_token_id": 59280, "video_token_id": 59281, "image_start_token_id": 59256,
            "image_end_token_id": 59257, "video_start_token_id": 59258, "video_end_token_id": 59259,
        },
        tied_at_top=True,
    ),
}  # fmt: skip
"""The models that run here, by the `model_type` of config.json."""

REFUSED: Mapping[str, str] = {
    "chatglm": "glm-4v-9b, ChatGLM or CogVLM, of an older architecture",
    "cogvlm": "CogVLM, of an older architecture",
    "glm": "GLM-4, a text model",
    "glm4": "GLM-4-0414, a text model",
    "glm4_moe": "GLM-4.5 or GLM-4.6, a mixture of experts",
    "glm4_moe_lite": "GLM-4.7-Flash, a mixture of experts",
    "glm4v_moe": "GLM-4.5V or GLM-4.6V, a mixture of experts",
    "glm5_next": "GLM-5, of a later architecture",
    "glm_image": "GLM-Image, an image generator",
    "glm_moe_dsa": "GLM-5, a mixture of experts",
    "gemma3": "Gemma 3",
    "internvl": "InternVL",
    "llava": "LLaVA",
    "mllama": "Llama 3.2 Vision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL, a mixture of experts",
}
"""Models that are taken for members of the family, by `model_type`: what they are."""


def architecture_of(model_type: Any) -> Architecture:
    """Return the row of a `model_type`.

    Raises:
      ConfigError: it is another model's; the message says which that is, where it is known.
    """
    refuse_part("model_type", model_type)
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ConfigError(fault("model_type", model_type, _EXPECTED))
    return ARCHITECTURES[model_type]


def refuse_part(field: str, model_type: Any) -> None:
    """Refuse a `model_type`, of a file or of a part in it, that is known to be another model's.

    Raises:
      ConfigError: it is.
    """
    whole = str(model_type).removesuffix("_text").removesuffix("_vision")
    if whole in REFUSED:
        raise ConfigError(f"{field}: found {model_type!r} ({REFUSED[whole]}); expected {_EXPECTED}")


_EXPECTED = f"one of {', '.join(map(repr, ARCHITECTURES))} (the dense models of GLM-4.1V's family)"


ProcessorField = Literal["processor_class", "image_processor_type", "video_processor_type"]
"""What a checkpoint's files call the class of its processor, and of the parts for images and videos."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processors:
    """What a processor and its parts do differently, and what a checkpoint's files call their classes.

    >>> PROCESSORS["glm46v"].time_text.format(seconds=1.25, whole=1)
    '1.2 seconds'
    >>> PROCESSORS["glm4v"].classes("video_processor_type")
    ('Glm4vVideoProcessor',)

    Attributes:
      processor: name of the processor's class.
      pillow, torchvision: names of the classes for images: those that resize and round as Pillow does, and those that
        do as torchvision. The first of each is the one to write.
      video: name of the class for videos.
      sampler: which frames of a video are taken, a key of `inputs.vision.frame_sampling.SAMPLERS`.
      time_text: what stands after each frame in a prompt; `{seconds}` is its time, and `{whole}` that without fraction.
      image_settings, video_settings: settings that GLM-4.1V's have not, and other defaults.
    """

    processor: str
    pillow: tuple[str, ...]
    torchvision: tuple[str, ...]
    video: str
    sampler: Literal["rate", "length", "capped_rate"]
    time_text: str
    image_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    video_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def classes(self, field: ProcessorField) -> tuple[str, ...]:
        """The names that a field of a checkpoint's files may have."""
        if field == "image_processor_type":
            return self.pillow + self.torchvision
        return (self.video,) if field == "video_processor_type" else (self.processor,)

    def settings(self, field: ProcessorField) -> Mapping[str, Any]:
        """The settings of a part that are not those of GLM-4.1V."""
        return self.image_settings if field == "image_processor_type" else self.video_settings


PROCESSORS: Mapping[str, Processors] = {
    "glm4v": Processors(
        processor="Glm4vProcessor",
        # The last is what 5.x calls the class that Pillow does; its numbers are those of 4.57.1's default.
        pillow=("Glm4vImageProcessor", "Glm4vImageProcessorPil"),
        torchvision=("Glm4vImageProcessorFast",),
        video="Glm4vVideoProcessor",
        sampler="rate",
        time_text="{whole}",
    ),
    "glm46v": Processors(
        processor="Glm46VProcessor",
        pillow=("Glm46VImageProcessorPil",),
        torchvision=("Glm46VImageProcessor", "Glm46VImageProcessorFast"),
        video="Glm46VVideoProcessor",
        sampler="length",
        time_text="{seconds:.1f} seconds",
    ),
    "glmga": Processors(
        processor="Glm46VProcessor",
        pillow=("GlmgaImageProcessorPil",),
        torchvision=("GlmgaImageProcessor", "GlmgaImageProcessorFast"),
        video="GlmgaVideoProcessor",
        sampler="capped_rate",
        time_text="{seconds:.1f} seconds",
        image_settings={"patch_expand_factor": 1},
        video_settings={
            "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 55790},
            "patch_expand_factor": 1,
            "max_frames": 640,
        },
    ),
}
"""What prepares images, videos and prompts, chosen by the class names in a checkpoint's files. Source: transformers
5.24, `models/{glm4v,glm46v,glmga}/*process*.py`."""


def processors_of(field: ProcessorField, name: Any) -> Processors:
    """Return the row of a class name in a checkpoint's files.

    >>> processors_of("video_processor_type", "GlmgaVideoProcessor").sampler
    'capped_rate'
    >>> processors_of("processor_class", "Qwen2_5_VLProcessor")
    Traceback (most recent call last):
      ...
    glm4v_jax.errors.ConfigError: processor_class: found 'Qwen2_5_VLProcessor'; expected one of Glm4vProcessor, Glm46VProcessor

    Raises:
      ConfigError: it is another family's.
    """  # noqa: E501
    for row in PROCESSORS.values():
        if isinstance(name, str) and name in row.classes(field):
            return row
    known = dict.fromkeys(name for row in PROCESSORS.values() for name in row.classes(field))
    raise ConfigError(fault(field, name, one_of(known, name)))
