"""The released checkpoints of the family, by name: what each is, at full and at tiny size.

>>> config = MEMBERS["GLM-OCR"].config()
>>> config.model_type, config.text_config.num_hidden_layers
('glm_ocr', 16)
>>> MEMBERS["GLM-4.6V-Flash"].config(tiny=True).text_config.rope_theta
500000.0

A checkpoint is never recognised by these: its own files say what it has (`family`). They are for what has no files:
random checkpoints (`glm4v convert synth`), memory tables (`glm4v mesh`), compiling ahead of time.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from glm4v_jax.config.family import ARCHITECTURES, TEXT
from glm4v_jax.config.model import Glm4vConfig

DEFAULT = "GLM-4.1V-9B-Thinking"
"""The model of this package."""

_PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 2, "top_p": 0.6}
_FIRST, _OCR_FIRST = 151329, 59246
"""Ids of `<|endoftext|>`, the first of the special tokens: in the vocabulary of GLM-4, and of GLM-OCR."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A released checkpoint, as its files say, or as those of its base where they were not at hand.

    Attributes:
      repository: on https://huggingface.co.
      model_type: key of `family.ARCHITECTURES`.
      rope_theta: of the decoder.
      text: further fields of `text_config` that are neither the default nor GLM-4.1V's.
      ends: tokens that end an answer; the first also pads.
      image_token_id: of images; that of videos is the next one.
      processors: key of `family.PROCESSORS`.
      processor_files: names of the files that say so.
      template: "glm4v" is GLM-4.1V's; "family" also has tools, and a switch for thoughts.
      thinking: how an answer is laid out, in words.
      tools: how tools are called, in words.
      sampling: of generation_config.json.
      shards: number of files of weights.
      is_base: whether its files were not at hand, and those of GLM-4.1V are here instead.
    """

    repository: str
    model_type: str = "glm4v"
    rope_theta: float = 10000.0
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ends: tuple[int, ...] = (_FIRST, 151336, 151338, 151348)
    image_token_id: int = 151343
    processors: str = "glm4v"
    processor_files: tuple[str, ...] = _PROCESSOR_FILES
    template: Literal["glm4v", "family"] = "glm4v"
    thinking: str = "a thought, then an answer in tags"
    tools: str = "none"
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(_SAMPLING))
    shards: int = 4
    is_base: bool = False

    def config(self, tiny: bool = False) -> Glm4vConfig:
        """Return the configuration.

        Args:
          tiny: sizes and vocabulary are those of the packaged tiny model; all else stays, also what heads and widths
            have to do with each other.
        """
        first = self.ends[0]
        starts = {name: first + offset for offset, name in enumerate(_STARTS, 10)}
        tokens = {**starts, "image_token_id": self.image_token_id, "video_token_id": self.image_token_id + 1}
        structure = TEXT[ARCHITECTURES[self.model_type].text]
        rope = {name: getattr(structure, name) for name in ("mrope_section", "partial_rotary_factor")}
        text = {
            "pad_token_id": first, "eos_token_id": list(self.ends), "max_position_embeddings": 65536,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta}, **self.text,
        }  # fmt: skip
        content = {"model_type": self.model_type, **tokens, "text_config": text, "vision_config": {}}
        config = Glm4vConfig.from_dict(content)
        return _tiny(config, self.ends) if tiny else config


_STARTS = ("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id")
_TINY_FIRST, _TINY_IMAGE = 896, 910
"""Ids of `<|endoftext|>` and `<|image|>` in the packaged tokenizer, whose special tokens are in the same order."""


def _tiny(config: Glm4vConfig, ends: Sequence[int]) -> Glm4vConfig:
    data, text = config.to_dict(), config.text_config
    factor = text.partial_rotary_factor
    section = [4, 6, 6] if factor == 1 else [2, 3, 3]
    rope = {"rope_theta": text.rope_theta, "partial_rotary_factor": factor, "mrope_section": section}
    is_square = text.head_dim * text.num_attention_heads == text.hidden_size
    data["text_config"] |= {
        "vocab_size": 960, "hidden_size": 128 if is_square else 96, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.06,
        "rope_parameters": rope, "rope_scaling": None, "pad_token_id": _TINY_FIRST,
        "eos_token_id": [_TINY_FIRST + end - ends[0] for end in ends],
    }  # fmt: skip
    data["vision_config"] |= {
        "depth": 3, "hidden_size": 96, "num_heads": 4, "image_size": 112, "intermediate_size": 256,
        "out_hidden_size": data["text_config"]["hidden_size"], "initializer_range": 0.06,
    }  # fmt: skip
    data |= {name: _TINY_FIRST + offset for offset, name in enumerate(_STARTS, 10)}
    return Glm4vConfig.from_dict(data | {"image_token_id": _TINY_IMAGE, "video_token_id": _TINY_IMAGE + 1})


_FLASH: dict[str, Any] = dict(
    rope_theta=500000.0,
    text={"max_position_embeddings": 131072},
    ends=(_FIRST, 151336, 151338),
    image_token_id=151363,
    template="family",
    thinking="a thought, then text; none with /nothink",
    tools="<tool_call> with arguments in tags",
)

MEMBERS: Mapping[str, Member] = {
    DEFAULT: Member(repository="zai-org/GLM-4.1V-9B-Thinking"),
    "GLM-4.1V-9B-Base": Member(repository="zai-org/GLM-4.1V-9B-Base", thinking="none: not trained to answer"),
    "GLM-4.6V-Flash": Member(repository="zai-org/GLM-4.6V-Flash", processors="glm46v", **_FLASH),
    "GLM-GA": Member(
        repository="zai-org/GLM-GA", model_type="glmga", processors="glmga",
        processor_files=("processor_config.json",), is_base=True, **_FLASH,
    ),
    "AutoGLM-Phone-9B": Member(
        repository="zai-org/AutoGLM-Phone-9B", thinking="a thought, then an action", tools="do(...), finish(...)",
        is_base=True,
    ),
    "Glyph": Member(
        repository="zai-org/Glyph", text={"max_position_embeddings": 131072}, thinking="a thought, then text",
        is_base=True,
    ),
    "UI2Code_N": Member(repository="zai-org/UI2Code_N", thinking="a thought, then HTML", is_base=True),
    "WebVIA": Member(repository="zai-org/WebVIA-Agent", is_base=True),
    "GLM-OCR": Member(
        repository="zai-org/GLM-OCR", model_type="glm_ocr",
        text={
            "hidden_size": 1536, "intermediate_size": 4608, "head_dim": 128, "num_nextn_predict_layers": 1,
            "max_position_embeddings": 131072,
        },
        ends=(_OCR_FIRST, 59253), image_token_id=59280, processors="glm46v",
        processor_files=("preprocessor_config.json",), template="family", thinking="none: text, HTML or LaTeX",
        tools="in its template", sampling={"do_sample": False}, shards=1,
    ),
}  # fmt: skip
"""Released checkpoints by name, without the owner's. Sources: their config.json and generation_config.json."""


def find_member(name: str) -> Member | None:
    """Return the member of a name, whatever the case; None where it is no member's.

    >>> find_member("glm-ocr").repository
    'zai-org/GLM-OCR'
    """
    return next((member for known, member in MEMBERS.items() if known.casefold() == name.casefold()), None)
