"""`rope_scaling` of a configuration: which rope, with which parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

from glm4v_jax.config.checks import is_integer, is_number, known_fields, object_of
from glm4v_jax.errors import ConfigError

_REQUIRED_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}

_ROPE_NUMBERS = (
    "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor",
    "high_freq_factor",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """`rope_scaling` of `config.json`: the rope type, its parameters, and the M-RoPE sections.

    `mrope_section` counts the rotated frequencies that follow the temporal, height and width position; None means the
    released checkpoint's. The other fields are documented at `transformers.modeling_rope_utils`.
    """

    rope_type: str = "default"
    mrope_section: tuple[int, int, int] | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
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
        for name in ("mrope_section", "short_factor", "long_factor"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if not isinstance(self.rope_type, str) or self.rope_type not in _REQUIRED_ROPE_KEYS:
            known = ", ".join(_REQUIRED_ROPE_KEYS)
            raise ConfigError(f"rope_scaling.rope_type is {self.rope_type!r}, expected one of: {known}")
        missing = [key for key in _REQUIRED_ROPE_KEYS[self.rope_type] if getattr(self, key) is None]
        if missing:
            raise ConfigError(f"rope_scaling of rope_type {self.rope_type!r} lacks {', '.join(missing)}")
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"rope_scaling.truncate is {self.truncate!r}, expected true or false")
        for name in _ROPE_NUMBERS:
            value = getattr(self, name)
            if value is not None and not is_number(value):
                raise ConfigError(f"rope_scaling.{name} is {value!r}, expected a number")
        length = self.original_max_position_embeddings
        if length is not None and (not is_integer(length) or length < 1):
            raise ConfigError(
                f"rope_scaling.original_max_position_embeddings is {length!r}, expected a whole number > 0"
            )
        for name in ("short_factor", "long_factor"):
            if (values := getattr(self, name)) is not None and not _is_tuple_of(values, is_number):
                raise ConfigError(f"rope_scaling.{name} is {_listed(values)}, expected a list of numbers")
        if self.factor is not None and self.factor < 1:
            raise ConfigError(f"rope_scaling.factor is {self.factor}, expected a number >= 1")
        section = self.mrope_section
        if section is not None and (not _is_tuple_of(section, is_integer) or len(section) != 3 or min(section) < 0):
            raise ConfigError(f"rope_scaling.mrope_section is {_listed(section)}, expected three counts >= 0")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From the JSON object; `type` is the old spelling of `rope_type`. Keys of no meaning here are ignored.

        Raises:
          ConfigError: it is no object, or a field of it is not what it should be.
        """
        data = dict(object_of({"rope_scaling": data}, "rope_scaling"))
        if "type" in data:
            data["rope_type"] = data.pop("type")
        return cls(**known_fields(cls, data))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, without the fields that are not set."""
        data = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if self.truncate:
            del data["truncate"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


def _is_tuple_of(values: Any, is_one: Callable[[Any], bool]) -> bool:
    return isinstance(values, tuple) and all(map(is_one, values))


def _listed(values: Any) -> str:
    """As the file has it."""
    return repr(list(values) if isinstance(values, tuple) else values)
