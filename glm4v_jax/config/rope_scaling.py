"""`rope_scaling` of a configuration: which rope, with which parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from msgspec import Meta

from glm4v_jax.config.checks import Natural, Positive, known_fields, object_of, validate
from glm4v_jax.errors import ConfigError

RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
_REQUIRED_KEYS: dict[RopeType, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """`rope_scaling` of `config.json`: the rope type, its parameters, and the M-RoPE sections.

    `mrope_section` counts the rotated frequencies that follow the temporal, height and width position; None means the
    released checkpoint's. The other fields are documented at `transformers.modeling_rope_utils`.
    """

    rope_type: RopeType = "default"
    mrope_section: Annotated[tuple[Natural, Natural, Natural], Meta(description="three counts")] | None = None
    factor: Annotated[float, Meta(ge=1)] | None = None
    original_max_position_embeddings: Positive | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        validate(self, prefix="text_config.rope_scaling.")
        missing = [key for key in _REQUIRED_KEYS[self.rope_type] if getattr(self, key) is None]
        if missing:
            raise ConfigError(
                f"text_config.rope_scaling: found rope_type {self.rope_type!r}; expected {', '.join(missing)} with it"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON object; `type` is the old spelling of `rope_type`. Other keys are ignored.

        Raises:
          ConfigError: it is not an object, or a field is invalid.
        """
        data = dict(object_of({"rope_scaling": data}, "rope_scaling"))
        if "type" in data:
            data["rope_type"] = data.pop("type")
        return cls(**known_fields(cls, data))

    def to_dict(self) -> dict[str, Any]:
        """Write the JSON object, without the fields that are not set."""
        data = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if self.truncate:
            del data["truncate"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}
