"""The dictionary that processors return, and the refusal of other libraries' tensors."""

from typing import Any

from glm4v_jax.errors import ConfigError


class BatchFeature(dict[str, Any]):
    """A dictionary whose entries are also attributes: `inputs["input_ids"]` and `inputs.input_ids` are the same array.

    It is a plain `dict` otherwise, so `model(**inputs)`, `inputs.keys()` and `jax.tree.map` work on it as they should.
    """

    def __getattr__(self, name: str) -> Any:
        """Return the entry `name`; raises `AttributeError` where there is none."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no entry {name!r}; it has {sorted(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the entry `name`."""
        self[name] = value


def check_return_tensors(value: Any) -> None:
    """Accept `None` and `"np"`, which both mean numpy arrays.

    Raises:
        ConfigError: for `"pt"`, `"tf"`, `"jax"` and anything else.
    """
    # The reference's TensorType is an enumeration with the same strings as values.
    if getattr(value, "value", value) not in (None, "np"):
        raise ConfigError(
            f"return_tensors={value!r} is not supported: numpy arrays are always returned, and jax takes them "
            "directly. Leave return_tensors out, or pass 'np'."
        )


def check_device(value: Any) -> None:
    """Refuse the reference's `device` argument, which moves torch tensors.

    Raises:
        ConfigError: for anything but `None`.
    """
    if value is not None:
        raise ConfigError(
            f"device={value!r} is not supported: images and videos are prepared on the host as numpy arrays, and the "
            "model places them. Leave device out."
        )
