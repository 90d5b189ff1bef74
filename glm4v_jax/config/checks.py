"""Checks of a configuration's fields, each of them an error that names the class and the field."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from glm4v_jax.errors import ConfigError

LARGEST_SIZE = 2**31 - 1
"""Dimensions are counted in int32."""


def is_integer(value: Any) -> bool:
    """Whether this is a whole number; `true` is none, though Python has it as 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether this is a number that a float can hold; `true` is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_sizes(config: Any, names: tuple[str, ...]) -> None:
    """Dimensions and counts."""
    for name in names:
        if not is_integer(value := getattr(config, name)) or not 0 < value <= LARGEST_SIZE:
            raise ConfigError(f"{_where(config, name)} is {value!r}, expected a whole number > 0 and < 2**31")


def check_number(
    config: Any, name: str, *, above: float | None = None, least: float = 0, most: float = math.inf
) -> None:
    """A number above `above`, or from `least`, to `most`."""
    value = getattr(config, name)
    if not is_number(value) or value < least or value > most or (above is not None and value <= above):
        low = f"above {above:g}" if above is not None else f"from {least:g}"
        high = "" if math.isinf(most) else f" to {most:g}"
        raise ConfigError(f"{_where(config, name)} is {value!r}, expected a number {low}{high}")


def check_flags(config: Any, names: tuple[str, ...]) -> None:
    """True or false, and nothing that Python would take for it."""
    for name in names:
        if not isinstance(value := getattr(config, name), bool):
            raise ConfigError(f"{_where(config, name)} is {value!r}, expected true or false")


def check_token(config: Any, name: str) -> None:
    """A token, or none; what the model makes of one beyond its vocabulary is not checked here."""
    if (value := getattr(config, name)) is not None and not is_integer(value):
        raise ConfigError(f"{_where(config, name)} is {value!r}, expected a token or null")


def check_tokens(config: Any, name: str) -> None:
    """A token, several, or none."""
    value = getattr(config, name)
    if not all(map(is_integer, value)) if isinstance(value, tuple) else value is not None and not is_integer(value):
        raise ConfigError(f"{_where(config, name)} is {value!r}, expected a token, a list of tokens or null")


def check_divides(config: Any, divisor: str, dividend: str) -> None:
    """One field divides the other."""
    if getattr(config, dividend) % getattr(config, divisor):
        raise ConfigError(
            f"{_where(config, dividend)} is {getattr(config, dividend)}, "
            f"expected a multiple of {divisor}, {getattr(config, divisor)}"
        )


def known_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """What of an object are fields of a dataclass."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in data.items() if k in names}


def object_of(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object in a field, an empty one where the field is absent or null."""
    value = data.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}, expected an object")
    return value


def _where(config: Any, name: str) -> str:
    return f"{type(config).__name__}.{name}"
