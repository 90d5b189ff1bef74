"""Configurations of the model and of its text and vision parts, from and to `config.json`.

The names and defaults are those of `Glm4vConfig`, `Glm4vTextConfig` and `Glm4vVisionConfig` in transformers 4.57.1;
files written by 4.57 (`rope_theta`, `partial_rotary_factor`, `rope_scaling`) and by 5.x (`rope_parameters`) are both
read, and those of the other members of the family, whose structure follows from their `model_type` (`family`). All
three are frozen and hashable: they are static metadata of the modules and part of the key of every compiled program.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from msgspec import Meta

from glm4v_jax.config.checks import (
    Fraction,
    NotNegative,
    PositiveNumber,
    Size,
    fault,
    known_fields,
    object_of,
    validate,
)
from glm4v_jax.config.family import (
    ARCHITECTURES,
    TEXT,
    VISION,
    Architecture,
    TextStructure,
    VisionStructure,
    architecture_of,
    refuse_part,
)
from glm4v_jax.config.quantization import quantization_in
from glm4v_jax.config.rope_scaling import RopeScaling
from glm4v_jax.errors import CheckpointError, ConfigError, not_there
from glm4v_jax.files import assets_directory, check_config, read_json_object, write_json

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "selu", "sigmoid", "silu", "swish", "tanh"]
"""The values of `hidden_act`; `nn.activation` computes them."""


@dataclasses.dataclass(frozen=True)
class Glm4vVisionConfig:
    """The ViT and its merger.

    >>> Glm4vVisionConfig().mlp_width, Glm4vVisionConfig(model_type="glm_ocr_vision").mlp_width
    (4096, 13696)

    In GLM-4.1V `intermediate_size` is the merger's, and the blocks' MLPs are `out_hidden_size` wide (trap T5); read
    `mlp_width` and `merger_width`. `rope_theta` is what 5.x writes into `rope_parameters`.
    """

    depth: Size = 24
    hidden_size: Size = 1536
    hidden_act: Activation = "silu"
    attention_bias: bool = False
    attention_dropout: Fraction = 0.0
    num_heads: Size = 12
    in_channels: Size = 3
    image_size: Size = 336
    patch_size: Size = 14
    rms_norm_eps: PositiveNumber = 1e-5
    spatial_merge_size: Size = 2
    temporal_patch_size: Size = 2
    out_hidden_size: Size = 4096
    intermediate_size: Size = 13696
    initializer_range: NotNegative = 0.02
    rope_theta: PositiveNumber = 10000.0
    model_type: str = "glm4v"

    def __post_init__(self) -> None:
        validate(self, prefix="vision_config.")
        _check_structure("vision_config.model_type", self.model_type, VISION)
        _check_divides(self, "vision_config.", "num_heads", "hidden_size")
        if self.image_size < self.patch_size:
            expected = f"at least patch_size, {self.patch_size}"
            raise ConfigError(fault("vision_config.image_size", self.image_size, expected))
        if self.head_dim % 4:
            expected = "a multiple of 4 (2-D rope pairs)"
            raise ConfigError(fault("vision_config.hidden_size / num_heads", self.head_dim, expected))

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def structure(self) -> VisionStructure:
        """What the ViT is beyond these fields."""
        return VISION[self.model_type]

    @property
    def mlp_bias(self) -> bool:
        """Whether the attention's output projection and the MLP have biases, as q, k and v have by `attention_bias`."""
        return self.attention_bias and self.structure.mlp_bias

    @property
    def mlp_width(self) -> int:
        """Width of the blocks' MLP."""
        return math.prod(getattr(self, name) for name in self.structure.mlp_width)

    @property
    def merger_width(self) -> int:
        """Width of the merger's MLP."""
        return math.prod(getattr(self, name) for name in self.structure.merger_width)

    @property
    def patch_dim(self) -> int:
        """Values in a flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def position_grid(self) -> int:
        """Side of the learned, square position table; 0 without one."""
        return self.image_size // self.patch_size if self.structure.position_table else 0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the `vision_config` object of `config.json`; other keys are ignored."""
        model_type = _known(data.get("model_type"), VISION, cls.model_type)
        rope = {k: v for k, v in object_of(data, "rope_parameters").items() if k == "rope_theta"}
        data = {**VISION[model_type].defaults, **data, **rope, "model_type": model_type}
        return cls(**known_fields(cls, data))

    def to_dict(self) -> dict[str, Any]:
        """Write the `vision_config` object of `config.json`, in the spelling of 4.57 if its rope has the usual base."""
        data = {"model_type": self.model_type, **dataclasses.asdict(self)}
        if data.pop("rope_theta") != type(self).rope_theta:
            data["rope_parameters"] = {"rope_type": "axial", "rope_theta": self.rope_theta}
        return data


@dataclasses.dataclass(frozen=True)
class Glm4vTextConfig:
    """The GLM-4 decoder.

    `rope_scaling` may be given as a dict or a `RopeScaling`. With neither it nor `partial_rotary_factor`, the released
    checkpoint's values hold (4.57.1's own default configuration cannot run forward); with `rope_scaling` alone the
    whole head rotates, as in the reference. Without `head_dim`, heads share `hidden_size`.

    `num_nextn_predict_layers` counts layers after the last that predict further tokens (MTP); they are kept in
    checkpoints, and not run.
    """

    vocab_size: Size = 151552
    hidden_size: Size = 4096
    intermediate_size: Size = 13696
    num_hidden_layers: Size = 40
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = 2
    hidden_act: Activation = "silu"
    max_position_embeddings: Size = 32768
    initializer_range: NotNegative = 0.02
    rms_norm_eps: PositiveNumber = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: PositiveNumber = 10000.0
    attention_dropout: Fraction = 0.0
    rope_scaling: RopeScaling | Mapping[str, Any] | None = None
    partial_rotary_factor: Annotated[float, Meta(gt=0, le=1)] | None = None
    original_max_position_embeddings: Size | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] | int | None = None
    head_dim: Size = None  # type: ignore[assignment]  # an integer once the configuration is made
    num_nextn_predict_layers: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    model_type: str = "glm4v_text"

    def __post_init__(self) -> None:
        _check_structure("text_config.model_type", self.model_type, TEXT)
        freeze = object.__setattr__
        if self.num_key_value_heads is None:
            freeze(self, "num_key_value_heads", self.num_attention_heads)
        if self.partial_rotary_factor is None:
            released = self.rope_scaling is None
            freeze(self, "partial_rotary_factor", self.structure.partial_rotary_factor if released else 1.0)
        scaling = self.rope_scaling if self.rope_scaling is not None else {}
        if not isinstance(scaling, RopeScaling):
            scaling = RopeScaling.from_dict(scaling)
        freeze(self, "rope_scaling", scaling)
        own_head_dim = self.head_dim is not None
        if not own_head_dim:
            freeze(self, "head_dim", 1)  # until hidden_size has been checked
        validate(self, prefix="text_config.")
        if not own_head_dim:
            _check_divides(self, "text_config.", "num_attention_heads", "hidden_size")
            freeze(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_divides(self, "text_config.", "num_key_value_heads", "num_attention_heads")
        for name in ("short_factor", "long_factor"):
            factors = getattr(scaling, name)
            if factors is not None and len(factors) != len(range(0, self.rotary_dim, 2)):
                raise ConfigError(
                    f"text_config.rope_scaling.{name}: found {len(factors)} numbers; expected {self.rotary_dim // 2}: "
                    f"one for each pair of the {self.rotary_dim} rotated dimensions"
                )
        _ = self.mrope_section

    @property
    def structure(self) -> TextStructure:
        """What the decoder is beyond these fields."""
        return TEXT[self.model_type]

    @property
    def extra_layers(self) -> range:
        """Numbers of the layers after the last that a checkpoint may have; their tensors are kept, and not run."""
        count = max(self.num_nextn_predict_layers, self.structure.extra_layers)
        return range(self.num_hidden_layers, self.num_hidden_layers + count)

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share a key and value head."""
        assert self.num_key_value_heads is not None
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def rope(self) -> RopeScaling:
        """`rope_scaling`, never None."""
        assert isinstance(self.rope_scaling, RopeScaling)
        return self.rope_scaling

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotate."""
        assert self.partial_rotary_factor is not None
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """Frequencies that follow the temporal, height and width position; they sum to `rotary_dim / 2`.

        Raises:
          ConfigError: they do not.
        """
        section = self.rope.mrope_section or self.structure.mrope_section
        if 2 * sum(section) != self.rotary_dim:
            field = "rope_parameters" if self.structure.rope_parameters else "rope_scaling"
            raise ConfigError(
                f"text_config.{field}.mrope_section: found {list(section)}, which sums to {sum(section)}; "
                f"expected {self.rotary_dim / 2:g}: half of the {self.rotary_dim} rotated dimensions "
                f"(head_dim {self.head_dim} x partial_rotary_factor {self.partial_rotary_factor})"
            )
        return section

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the `text_config` object of `config.json`, in the spelling of 4.57 or of 5.x."""
        model_type = _known(data.get("model_type"), TEXT, cls.model_type)
        data = {**TEXT[model_type].defaults, **data, "model_type": model_type}
        if data.get("rope_parameters") is not None:
            parameters = dict(object_of(data, "rope_parameters"))
            for name in ("rope_theta", "partial_rotary_factor"):
                if name in parameters:
                    data[name] = parameters.pop(name)
            data["rope_scaling"] = parameters
        return cls(**known_fields(cls, data))

    def to_dict(self) -> dict[str, Any]:
        """Write the `text_config` object of `config.json`, in the spelling of 4.57 where that has the model."""
        data = dataclasses.asdict(self)
        data["rope_scaling"] = {**self.rope.to_dict(), "mrope_section": list(self.mrope_section)}
        if self.structure.rope_parameters:
            names = ("rope_theta", "partial_rotary_factor")
            data["rope_parameters"] = data.pop("rope_scaling") | {name: data.pop(name) for name in names}
            data["attention_bias"] = self.structure.attention_bias
        if isinstance(self.eos_token_id, tuple):
            data["eos_token_id"] = list(self.eos_token_id)
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            del data["head_dim"]
        optional = ("original_max_position_embeddings", "image_token_id", "video_token_id")
        absent = {name for name in optional if data[name] is None}
        absent |= {name for name in ("num_nextn_predict_layers",) if not data[name]}
        return {"model_type": self.model_type, **{k: v for k, v in data.items() if k not in absent}}


@dataclasses.dataclass(frozen=True)
class Glm4vConfig:
    """The whole model: both parts, and the ids of the tokens that stand for images and videos.

    >>> config = Glm4vConfig.glm4_1v_9b()
    >>> config.text_config.num_hidden_layers, config.vision_config.depth
    (40, 24)
    >>> Glm4vConfig.from_dict(config.to_dict()) == config
    True
    """

    text_config: Glm4vTextConfig = dataclasses.field(default_factory=Glm4vTextConfig)
    vision_config: Glm4vVisionConfig = dataclasses.field(default_factory=Glm4vVisionConfig)
    image_token_id: int = 151343
    video_token_id: int = 151344
    image_start_token_id: int = 151339
    image_end_token_id: int = 151340
    video_start_token_id: int = 151341
    video_end_token_id: int = 151342
    model_type: str = "glm4v"

    def __post_init__(self) -> None:
        architecture_of(self.model_type)
        if isinstance(self.text_config, Mapping):
            object.__setattr__(self, "text_config", Glm4vTextConfig.from_dict(self.text_config))
        if isinstance(self.vision_config, Mapping):
            object.__setattr__(self, "vision_config", Glm4vVisionConfig.from_dict(self.vision_config))
        for part, kind in ((self.text_config, Glm4vTextConfig), (self.vision_config, Glm4vVisionConfig)):
            if not isinstance(part, kind):
                raise ConfigError(fault(kind.__name__, part, "an object"))
        validate(self)
        for field in dataclasses.fields(self):
            if field.name.endswith("token_id"):
                value, vocabulary = getattr(self, field.name), self.text_config.vocab_size
                if not 0 <= value < vocabulary:
                    raise ConfigError(fault(field.name, value, f"a token below vocab_size, {vocabulary}"))
        text, vision = self.text_config.hidden_size, self.vision_config.out_hidden_size
        if text != vision:
            raise ConfigError(fault("vision_config.out_hidden_size", vision, f"text_config.hidden_size, {text}"))

    @property
    def architecture(self) -> Architecture:
        """The row of the family's table."""
        return ARCHITECTURES[self.model_type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the object of `config.json`.

        Text fields at the top level (an old flat layout) are read where there is no `text_config`. A tied head is what
        `text_config` says (4.57.1); a top-level `tie_word_embeddings` counts only in that flat layout, and in models
        that only 5.x knows. Ends of a text are read from the top level where `text_config` has none.

        Raises:
          ConfigError: it is the configuration of another architecture, contradicts itself, or is of weights that are
            quantised in a way that is not read here.
        """
        row = architecture_of(data.get("model_type", cls.model_type))
        fields = known_fields(cls, {**row.defaults, **data})
        quantization_in(data)
        if "text_config" not in data and "hidden_size" not in data:
            raise ConfigError("text_config: found nothing; expected an object")
        text = {k: data[k] for k in ("eos_token_id", "pad_token_id") if k in data}
        text |= {k: v for k, v in (object_of(data, "text_config") or data).items() if k not in text or v is not None}
        if row.tied_at_top and data.get("tie_word_embeddings"):
            text["tie_word_embeddings"] = data["tie_word_embeddings"]
        vision = object_of(data, "vision_config")
        for name, part, table in (("text", text, TEXT), ("vision", vision, VISION)):
            refuse_part(f"{name}_config.model_type", found := part.get("model_type"))
            if _known(found, table, expected := getattr(row, name)) != expected:
                whole = f"model_type {data.get('model_type', cls.model_type)!r}"
                raise ConfigError(fault(f"{name}_config.model_type", found, f"{expected!r}, as of {whole}"))
        fields["text_config"] = Glm4vTextConfig.from_dict({**text, "model_type": row.text})
        fields["vision_config"] = Glm4vVisionConfig.from_dict({**vision, "model_type": row.vision})
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Write the object of `config.json`, in the spelling of 4.57 where that has the model; `from_dict` reads it."""
        ids = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.endswith("token_id")}
        return {
            "architectures": [self.architecture.model_class],
            "model_type": self.model_type,
            "tie_word_embeddings": self.text_config.tie_word_embeddings,
            **ids,
            "text_config": self.text_config.to_dict(),
            "vision_config": self.vision_config.to_dict() | {"model_type": self.architecture.written_vision},
        }

    @classmethod
    def from_pretrained(cls, directory: str | pathlib.Path) -> Self:
        """Read `config.json` of a checkpoint directory.

        Raises:
          CheckpointError: there is no such directory or file, or it is not JSON.
          ConfigError: its content is not that of a GLM-4.1V model.
        """
        path = assets_directory(directory) / "config.json"
        if not path.parent.is_dir():
            expected = "the directory of a checkpoint (nothing is downloaded)"
            if path.parent.is_file():
                raise CheckpointError(f"{path.parent}: found a file; expected {expected}")
            raise CheckpointError(not_there(path.parent, expected, kind="directory"))
        check_config(path.parent)
        try:
            return cls.from_dict(read_json_object(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def save_pretrained(self, directory: str | pathlib.Path) -> None:
        """Write `config.json` into a directory, which is created if it does not exist."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", self.to_dict())

    @classmethod
    def glm4_1v_9b(cls) -> Self:
        """The released GLM-4.1V-9B-Thinking: 10,292,777,472 parameters."""
        text = Glm4vTextConfig(
            max_position_embeddings=65536,
            rope_scaling=RopeScaling(mrope_section=TEXT["glm4v_text"].mrope_section),
            partial_rotary_factor=TEXT["glm4v_text"].partial_rotary_factor,
            pad_token_id=151329,
            eos_token_id=(151329, 151336, 151338, 151348),
        )
        return cls(text_config=text)

    @classmethod
    def tiny(cls, **text_overrides: Any) -> Self:
        """A model of about 300,000 parameters with every part of the real one, for tests and examples."""
        text = {
            "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "partial_rotary_factor": 0.5,
            "rope_scaling": {"mrope_section": (1, 1, 2)},
        }  # fmt: skip
        vision = Glm4vVisionConfig(
            depth=2, hidden_size=32, num_heads=4, image_size=70, out_hidden_size=64, intermediate_size=96
        )
        return cls(
            text_config=Glm4vTextConfig.from_dict(text | text_overrides), vision_config=vision,
            image_token_id=314, video_token_id=315, image_start_token_id=310, image_end_token_id=311,
            video_start_token_id=312, video_end_token_id=313,
        )  # fmt: skip


def _check_divides(config: Any, prefix: str, divisor: str, dividend: str) -> None:
    number = getattr(config, divisor)
    if (value := getattr(config, dividend)) % number:
        raise ConfigError(fault(f"{prefix}{dividend}", value, f"a multiple of {divisor}, {number}"))


def _check_structure(field: str, model_type: Any, table: Mapping[str, Any]) -> None:
    if model_type not in table:
        raise ConfigError(fault(field, model_type, f"one of {', '.join(map(repr, table))}"))


def _known(model_type: Any, table: Mapping[str, Any], default: str) -> str:
    """The `model_type` of a part if it is one of the table; 4.57 writes others too, and reads none."""
    return model_type if isinstance(model_type, str) and model_type in table else default
