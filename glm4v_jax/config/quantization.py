"""How a quantised checkpoint stores its weights: `quantization_config` of config.json, as compressed-tensors writes it.

Read are integers with a scale for each output channel or group of inputs, made by rounding, AWQ or GPTQ. What else
compressed-tensors and others express there (floats of 8 bits, quantised activations, sparsity, transforms, other
programs' layouts) is refused by the name of the field.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from msgspec import Meta

from glm4v_jax.config.checks import fault, from_mapping, object_of, raise_faults, validate
from glm4v_jax.errors import ConfigError, naming
from glm4v_jax.files import assets_directory, read_json_object

FIELD = "quantization_config"
METHOD = "compressed-tensors"

Scheme = Literal["none", "int8", "int4"]
"""Weights, as they are loaded for inference: as they are, or as integers."""
Format = Literal["pack-quantized", "int-quantized", "naive-quantized"]
"""The first packs integers into int32, the others keep each as an int8."""


class StoredQuantization(NamedTuple):
    """The scheme of a checkpoint; which of its tensors are quantised, their names say.

    >>> StoredQuantization(bits=4, group=64).dtype
    'int4'

    Attributes:
      bits: 8 or 4, of an integer.
      group: how many inputs share a scale; None if all inputs of an output channel do.
      symmetric: without zero points.
      packed: several integers in an int32.
    """

    bits: int = 8
    group: int | None = None
    symmetric: bool = True
    packed: bool = True

    @property
    def dtype(self) -> Literal["int8", "int4"]:
        """What holds an integer less its zero point: the difference of two integers of 4 bits has 5."""
        return "int4" if self.bits == 4 and self.symmetric else "int8"

    @property
    def format(self) -> Format:
        """How integers are stored, as it is written."""
        return "pack-quantized" if self.packed else "int-quantized"

    def __str__(self) -> str:
        shared = "a scale for each channel" if self.group is None else f"groups of {self.group}"
        return f"{self.bits} bits, {shared}{'' if self.symmetric else ' and zero points'}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the object in the field.

        Raises:
          ConfigError: it is another program's, or has a scheme that is not read here.
        """
        if (method := data.get("quant_method")) != METHOD:
            expected = f"{METHOD!r}: load the weights that it was made from, with --quantize"
            raise ConfigError(fault(f"{FIELD}.quant_method", method, expected))
        written = from_mapping(_Written, data, where=f"{FIELD}.", ignore_unknown=True)
        # compressed-tensors ignores what it does not know here, but an object is about the numbers, like all it knows.
        objects = {name for name, value in data.items() if value and isinstance(value, Mapping)}
        if unknown := sorted(objects - {field.name for field in dataclasses.fields(_Written)}):
            raise ConfigError(fault(f"{FIELD}.{unknown[0]}", data[unknown[0]], "no such field"))
        schemes: dict[str, Self] = {}
        for name, group in written.config_groups.items():
            where = f"{FIELD}.config_groups.{name}."
            found = from_mapping(_ConfigGroup, _without_nulls(group), where=where)
            weights = from_mapping(_Weights, _without_nulls(found.weights), where=f"{where}weights.")
            stored_as = found.format or written.format
            if stored_as == "mixed-precision":
                raise ConfigError(f"{where}format: found nothing; expected one of {', '.join(get_args(Format))}")
            size = weights.group_size if weights.group_size != -1 else None
            schemes[name] = cls(weights.num_bits, size, weights.symmetric, stored_as == "pack-quantized")
        if not schemes:
            raise ConfigError(f"{FIELD}.config_groups: found nothing; expected a scheme of linear layers")
        (first, scheme), *others = schemes.items()
        for name, other in others:
            if other != scheme:
                raise ConfigError(
                    f"{FIELD}.config_groups: found {other} in {name} and {scheme} in {first}; expected one scheme"
                )
        return scheme

    def to_dict(self, ignore: Sequence[str]) -> dict[str, Any]:
        """Write the object: all linear layers but those that `ignore` names are quantised."""
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False,
            "strategy": "channel" if self.group is None else "group", "group_size": self.group,
        }  # fmt: skip
        activations = {"input_activations": None, "output_activations": None}
        return {
            "quant_method": METHOD,
            "quantization_status": "compressed",
            "format": self.format,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **activations}},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def quantization_in(config: Mapping[str, Any]) -> StoredQuantization | None:
    """Return the scheme in the object of a config.json; None where its weights are floats.

    Raises:
      ConfigError: see `StoredQuantization.from_dict`.
    """
    data = object_of(config, FIELD)
    return StoredQuantization.from_dict(data) if data else None


def stored_quantization(directory: str | pathlib.Path) -> StoredQuantization | None:
    """Return the scheme of a checkpoint in either format; None where its weights are floats, or nothing says.

    Raises:
      CheckpointError: its configuration is not JSON.
      ConfigError: see `StoredQuantization.from_dict`.
    """
    path = assets_directory(directory) / "config.json"
    if not path.is_file():
        return None
    with naming(path, ConfigError):
        return quantization_in(read_json_object(path))


def ignored_layers(directory: str | pathlib.Path) -> tuple[str, ...]:
    """Return the names and patterns of layers that a quantised checkpoint says it has in floats."""
    data = object_of(read_json_object(assets_directory(directory) / "config.json"), FIELD)
    return tuple(data.get("ignore") or ())


def _without_nulls(data: Any) -> Any:
    """What an object says: a null is a field that is not used, perhaps of a newer version."""
    return {key: value for key, value in data.items() if value is not None} if isinstance(data, Mapping) else data


@dataclasses.dataclass(frozen=True)
class _Written:
    """Fields of the object that concern all weights."""

    quantization_status: Literal["compressed"]
    format: Literal["pack-quantized", "int-quantized", "naive-quantized", "mixed-precision"]
    config_groups: dict[str, Any]
    kv_cache_scheme: None = None
    sparsity_config: Any = None
    transform_config: Any = None
    ignore: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        validate(self)
        for index, entry in enumerate(self.ignore or ()):
            try:
                re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
            except re.error as error:
                raise ConfigError(fault(f"ignore[{index}]", entry, f"a regular expression ({error})")) from error
        for name in ("sparsity_config", "transform_config"):
            value = getattr(self, name)
            if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
                raise ConfigError(fault(name, value, "null: neither sparsity nor transforms"))


@dataclasses.dataclass(frozen=True)
class _ConfigGroup:
    """One of `config_groups`; which layers are its targets, the names of their tensors say."""

    weights: Any = None
    targets: Any = None
    format: Format | None = None
    input_activations: None = None
    output_activations: None = None

    def __post_init__(self) -> None:
        validate(self)


@dataclasses.dataclass(frozen=True)
class _Weights:
    """How a group of weights is quantised; the defaults are those of compressed-tensors."""

    num_bits: Literal[8, 4] = 8
    type: Literal["int"] = "int"
    symmetric: bool = True
    strategy: Literal["channel", "group"] | None = None
    group_size: Annotated[int, Meta(ge=-1, description="how many inputs share a scale, or -1")] | None = None
    dynamic: bool = False
    actorder: Any = None
    block_structure: None = None
    scale_dtype: Any = None
    """That of the tensors counts."""
    zp_dtype: Any = None
    observer: Any = None
    """How scales were found, as its arguments."""
    observer_kwargs: Any = None

    def __post_init__(self) -> None:
        validate(self)
        faults = []
        if self.dynamic:
            faults.append(fault("dynamic", self.dynamic, "false: scales in the checkpoint"))
        if self.actorder not in (None, False, "weight", "static"):
            expected = "null or 'weight': inputs in the order of the layer"
            faults.append(fault("actorder", self.actorder, expected))
        if self.num_bits == 8 and not self.symmetric:
            faults.append(fault("symmetric", False, "true with 8 bits: less its zero point such an integer needs 9"))
        grouped = self.group_size not in (None, -1)
        if self.strategy == "channel" and grouped:
            faults.append(fault("group_size", self.group_size, "null with strategy 'channel'"))
        if (self.strategy == "group" and not grouped) or self.group_size == 0:
            faults.append(fault("group_size", self.group_size, "how many inputs share a scale"))
        if self.strategy is None and self.group_size is None:
            faults.append("strategy: found nothing, a scale for the whole tensor; expected 'channel' or 'group'")
        raise_faults(faults)
