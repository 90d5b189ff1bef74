"""Quantised weights in compressed-tensors' layout: the tensors that stand for one, as integers and scales.

A weight [out, in] of a linear layer is stored as several tensors, whose names end in place of `weight` in
- `weight_packed`: int32 [out, in * bits / 32], the first integer in the lowest bits, each with half of its range added:
  8 bits are bytes with the top bit flipped, 4 bits are 0 to 15 for -8 to 7;
- `weight_scale`: floats [out, groups], one group where all inputs share a scale;
- `weight_shape`: int64 [out, in];
- `weight_zero_point`, if the scheme has them: integers to subtract, [out, groups], packed along `out`.
In the formats that do not pack, `weight` is int8, and so are the zero points.
"""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, TensorInfo
from glm4v_jax.config.checks import fault, raise_faults
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import FIELD, StoredQuantization
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.model.quantize import scale_path

WEIGHT, PACKED, SCALE, SHAPE, ZERO_POINT = (
    "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
)  # fmt: skip
_INTEGERS = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}


class StoredTensor(NamedTuple):
    """What one of the tensors must be: its shape, and one of these dtypes."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def stored_tensors(shape: tuple[int, ...], stored: StoredQuantization) -> dict[str, StoredTensor]:
    """Return the ends of the names -> the tensors, of a weight [out, in]; groups divide the inputs."""
    outputs, inputs = shape
    groups = 1 if stored.group is None else inputs // stored.group
    scale = StoredTensor((outputs, groups), hf_mapping.DTYPES)
    if not stored.packed:
        zero_point = StoredTensor((outputs, groups), ("int8",))
        found = {WEIGHT: StoredTensor(shape, ("int8",)), SCALE: scale, ZERO_POINT: zero_point}
    else:
        found = {
            PACKED: StoredTensor((outputs, packed_size(inputs, stored.bits)), ("int32",)),
            SCALE: scale,
            SHAPE: StoredTensor((2,), ("int64", "int32")),
            ZERO_POINT: StoredTensor((packed_size(outputs, stored.bits), groups), ("int32",)),
        }
    if stored.symmetric:
        del found[ZERO_POINT]
    return found


def parameters_of(rule: hf_mapping.Rule, sizes: Mapping[str, int]) -> int:
    """Return the number of parameters in a tensor; of a quantised weight, its integers have them."""
    return math.prod(rule.tensor_shape(sizes)) if rule.suffix in ("", WEIGHT, PACKED) else 0


def packed_size(count: int, bits: int) -> int:
    """Return the number of int32 that hold `count` integers."""
    return math.ceil(count * bits / 32)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack int8 [rows, count] into int32 [rows, count * bits / 32].

    >>> pack(np.array([[-8, 7, 0]], np.int8), 4)
    array([[2288]], dtype=int32)
    """
    rows, count = values.shape
    biased = np.zeros((rows, packed_size(count, bits) * 32 // bits), np.uint8)
    biased[:, :count] = values.view(np.uint8) ^ np.uint8(0x80) if bits == 8 else values + np.int8(8)
    return (biased if bits == 8 else biased[:, 0::2] | (biased[:, 1::2] << 4)).view("<i4")


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpack int32 [rows, ...] into int8 [rows, count], the inverse of `pack`."""
    words = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return (words[:, :count] ^ np.uint8(0x80)).view(np.int8)
    values = np.empty((len(words), 2 * words.shape[1]), np.int8)
    values[:, 0::2], values[:, 1::2] = words & 15, words >> 4
    values -= np.int8(8)
    return values[:, :count]


@dataclasses.dataclass
class QuantizedWeight:
    """A weight [out, in] of a checkpoint; its name is without the end that names one of its tensors."""

    files: CheckpointFiles
    name: str
    shape: tuple[int, ...]
    stored: StoredQuantization

    def values(self) -> np.ndarray:
        """Return the integers less their zero points, int8 [out, in]; 8 bits as uint8 with the top one flipped.

        That is a view of the file, which `write_signed` copies.
        """
        outputs, inputs = self.shape
        if not self.stored.packed:
            values = self._read(WEIGHT)
        elif self.stored.bits == 8:
            return self._read(PACKED).view(np.uint8)[:, :inputs]
        else:
            values = unpack(self._read(PACKED), self.stored.bits, inputs)
        if self.stored.symmetric:
            if self.stored.bits == 4 and not -8 <= (low := values.min()) <= (high := values.max()) <= 7:
                expected = f"-8 to 7, or num_bits 8 in {FIELD}"
                raise CheckpointError(f"{self.name}.{WEIGHT}: found integers from {low} to {high}; expected {expected}")
            return values
        zeros = self._read(ZERO_POINT)
        if self.stored.packed:
            zeros = unpack(zeros.T, self.stored.bits, outputs).T
        groups = values.reshape(outputs, zeros.shape[1], -1)
        return (groups - zeros[:, :, None]).reshape(outputs, inputs)

    @property
    def has_pairs(self) -> bool:
        """Whether bytes of the file are pairs of integers as `model.cpu_matmul.pack_int4` makes them."""
        return self.stored.packed and self.stored.symmetric and self.stored.bits == 4 and self.shape[1] % 2 == 0

    def pairs(self) -> np.ndarray:
        """Return these bytes, uint8 [out, in / 2], a view of the file."""
        return self._read(PACKED).view(np.uint8)[:, : self.shape[1] // 2]

    def scale(self) -> np.ndarray:
        """Return the scales, float32 [out, groups]."""
        return self._read(SCALE).astype(np.float32)

    def faults(self) -> list[str]:
        """Return what is wrong with the shape in the checkpoint, if anything."""
        found = list(map(int, self._read(SHAPE))) if self.stored.packed else list(self.shape)
        return [] if found == list(self.shape) else [fault(f"{self.name}.{SHAPE}", found, str(list(self.shape)))]

    def _read(self, suffix: str) -> np.ndarray:
        return self.files.read(f"{self.name}.{suffix}")


def write_signed(out: np.ndarray, values: np.ndarray) -> None:
    """Write the integers into int8, of what `QuantizedWeight.values` returns as uint8 or of a slice of it."""
    np.bitwise_xor(values, np.uint8(0x80), out=out.view(np.uint8))


class ScaleLayout(NamedTuple):
    """How the scales [out, groups] of a quantised weight become the leaf beside the kernel.

    Attributes:
      rule: of the weight.
      sizes: of the letters in its layout, with those of inputs counted in blocks that share a scale.
      inputs: axes of the leaf to drop, because there is a scale for each output channel.
    """

    rule: hf_mapping.Rule
    sizes: Mapping[str, int]
    inputs: tuple[int, ...]

    @classmethod
    def of(cls, rule: hf_mapping.Rule, stored: StoredQuantization, sizes: Mapping[str, int]) -> "ScaleLayout":
        """A leaf has groups along the last input axis only: where groups span more axes, their scales are repeated."""
        letters = rule.axes()[0][1]
        if stored.group is None and stored.dtype == "int8":
            inputs = (axis for axis, inner in enumerate(rule.axes()[1]) if set(inner) <= set(letters))
            return cls(rule, {**sizes, **dict.fromkeys(letters, 1)}, tuple(inputs))
        group = stored.group or rule.tensor_shape(sizes)[1]
        block = math.gcd(group, sizes[letters[-1]])
        return cls(rule, {**sizes, letters[-1]: sizes[letters[-1]] // block}, ())

    def shape(self, kernel: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the leaf beside a kernel of one layer, which may be fused."""
        shape = list(self.rule.leaf_shape(self.sizes))
        if self.rule.part is not None:
            shape.insert(self.rule.part[0], kernel[self.rule.part[0]])
        return tuple(size for axis, size in enumerate(shape) if axis not in self.dropped)

    @property
    def dropped(self) -> set[int]:
        """The axes of the kernel, fused, that the leaf does not have."""
        fused = len(self.rule.axes()[1]) if self.rule.part is None else self.rule.part[0]
        return {axis + (axis >= fused) for axis in self.inputs}

    def fill(self, leaf: np.ndarray, scale: np.ndarray) -> None:
        """Write the scales [out, groups] of the weight into the leaf, or into its part of it."""
        blocks, groups = self.rule.tensor_shape(self.sizes)[1], scale.shape[1]
        self._part(leaf)[...] = self.rule.to_leaf(scale[:, np.arange(blocks) * groups // blocks], self.sizes)

    def read(self, leaf: np.ndarray, groups: int) -> np.ndarray:
        """Invert `fill`."""
        blocks = self.rule.to_tensor(self._part(leaf), self.sizes)
        return blocks[:, np.arange(groups) * blocks.shape[1] // groups]

    def _part(self, leaf: np.ndarray) -> np.ndarray:
        return np.expand_dims(leaf, tuple(self.dropped))[self.rule.index]


def stored_leaves(config: Glm4vConfig, stored: StoredQuantization, kernels: Collection[str]) -> dict[str, TensorInfo]:
    """Return path -> shape and dtype of kernels and their scales, where a checkpoint has these kernels quantised."""
    sizes, shapes = hf_mapping.dimensions(config), hf_mapping.leaf_shapes(config)
    found: dict[str, TensorInfo] = {}
    for part in hf_mapping.wanted(config).values():
        if (path := part.path) in kernels and path not in found:
            found[path] = TensorInfo(shapes[path], _INTEGERS[stored.dtype])
            scale = ScaleLayout.of(part.rule, stored, sizes).shape(shapes[path])
            found[scale_path(path)] = TensorInfo(scale, np.dtype(np.float32))
    return found


def match(
    config: Glm4vConfig, infos: Mapping[str, TensorInfo], where: str, stored: StoredQuantization | None = None
) -> dict[str, hf_mapping.LeafPart]:
    """Match a checkpoint's tensors against the table, as `hf_mapping.match` does, and a scheme if weights have a scale.

    Raises:
      CheckpointError: see `hf_mapping.match`; or a field of the scheme is not that of the tensors.
      ConfigError: a group of the scheme does not divide a layer's inputs.
    """
    found = {hf_mapping.canonical(name): info for name, info in infos.items()}
    hf_mapping.check_depths(config, found, where)
    if stored is None:
        if quantized_name := next((name for name in found if name.endswith((PACKED, SCALE))), None):
            raise CheckpointError(f"{where}: {FIELD}: found nothing; expected the scheme of {quantized_name}")
        return hf_mapping.match(config, infos, where)
    sizes = hf_mapping.dimensions(config)
    quantized = {
        name: part.rule.tensor_shape(sizes) for name, part in hf_mapping.wanted(config).items()
        if part.rule.is_linear and not found.keys().isdisjoint(_marks(name))
    }  # fmt: skip
    if not quantized:
        raise CheckpointError(f"{where}: {FIELD}: found {stored}, but no quantised weight; expected some")
    expected = expected_tensors(config, quantized, stored, where)
    _check_scheme(stored, quantized, found, where)
    listed = hf_mapping.without_unused(config, infos.items())
    names = hf_mapping.check_tensors(listed, expected.shapes, where, dtypes=expected.dtypes)
    return {names[key]: part for key, part in expected.parts.items()}


def _check_scheme(
    stored: StoredQuantization, quantized: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo], where: str
) -> None:
    """Check the fields of the scheme against the weights: where all of these agree on a value, it is the field's.

    Raises:
      CheckpointError: a field has another value; all such are listed.
    """
    told = [_told(found, name, shape) for name, shape in quantized.items()]
    fields = {
        "num_bits": stored.bits,
        "group_size": stored.group,
        "symmetric": stored.symmetric,
        "format": stored.format,
    }
    faults = []
    for field, value in fields.items():
        possible = set[Any].intersection(*(values[field] for values in told))
        if possible and value not in possible:
            (expected,) = possible if len(possible) == 1 else (None,)  # of a group with all inputs, a channel
            faults.append(fault(field, value, f"{json.dumps(expected)}, the scheme of {next(iter(quantized))}"))
    raise_faults(faults, CheckpointError, where=f"{where}: {FIELD}")


def _told(found: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]) -> dict[str, set[Any]]:
    """Return field of the scheme -> values that it may have, as the tensors of a weight [out, in] tell."""
    stem, inputs = name.removesuffix(WEIGHT), shape[1]
    packed, scale = (found[stem + suffix].shape if stem + suffix in found else () for suffix in (PACKED, SCALE))
    told: dict[str, set[Any]] = {
        "num_bits": {bits for bits in (8, 4) if not packed or packed[-1] == packed_size(inputs, bits)},
        "group_size": set(),
        "symmetric": {stem + ZERO_POINT not in found},
        "format": {"pack-quantized" if packed else "int-quantized"},
    }
    if len(scale) == 2 and scale[1] and inputs % scale[1] == 0:
        told["group_size"] = {None, inputs} if scale[1] == 1 else {inputs // scale[1]}
    return told


def check_ignored(config: Glm4vConfig, ignored: Sequence[str], quantized: Collection[str], where: str) -> None:
    """Check the layers that a checkpoint says are in floats; warn of those that the model does not have.

    `ignored` are names, classes and, after "re:", patterns of the beginnings of names. CheckpointError if one is among
    `quantized`, canonical names of layers in integers.
    """
    names = {name.rpartition(".")[0] for name in hf_mapping.wanted(config)} | {"lm_head"}
    names |= {f"{hf_mapping.LAYER_GROUPS[0]}{layer}.eh_proj" for layer in config.text_config.extra_layers}
    modules = names | {name[: dot.start()] for name in names for dot in re.finditer(r"\.", name)}
    for entry in ignored:
        matching = [name for name in sorted(modules) if any(_matches(entry, spelled) for spelled in _spellings(name))]
        if found := [name for name in matching if name in quantized]:
            expected = f"{found[0]}, which it matches, in floats"
            raise CheckpointError(f"{where}: {FIELD}: {fault('ignore', entry, expected)}")
        if not matching and not entry[:1].isupper():  # of a class
            warnings.warn(f"{where}: {FIELD}: ignore: found {entry!r}, which matches no layer", stacklevel=2)


def _matches(entry: str, name: str) -> bool:
    """Whether an entry means a layer, as compressed-tensors reads it."""
    return re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name


def _spellings(name: str) -> list[str]:
    """The names in a checkpoint of which `hf_mapping.canonical` makes one."""
    found = [name, name.removeprefix("language_model.")]
    return found + [f"model.{spelled}" for spelled in found]


def _marks(name: str) -> list[str]:
    """The tensors of which a weight has one if it is quantised."""
    stem = name.removesuffix(WEIGHT)
    return [stem + PACKED, stem + SCALE]


class ExpectedTensors(NamedTuple):
    """The tensors of a checkpoint, by canonical name; with dtypes where they are not `hf_mapping.DTYPES`."""

    parts: dict[str, hf_mapping.LeafPart]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, tuple[str, ...]]


def expected_tensors(
    config: Glm4vConfig, quantized: Collection[str], stored: StoredQuantization | None, where: str
) -> ExpectedTensors:
    """Return the tensors of a checkpoint in which some weights, by canonical name, are quantised.

    CheckpointError if of a kind of weights only some are; ConfigError if a group does not divide a layer's inputs.
    """
    sizes, expected = hf_mapping.dimensions(config), ExpectedTensors({}, {}, {})
    for name, part in hf_mapping.wanted(config).items():
        shape = part.rule.tensor_shape(sizes)
        if stored is None or name not in quantized:
            expected.parts[name], expected.shapes[name] = part, shape
            continue
        if stored.group is not None and shape[1] % stored.group:
            divisor = f"a divisor of the {shape[1]} inputs of {name}"
            raise ConfigError(fault(f"{where}: {FIELD}: group_size", stored.group, divisor))
        for suffix, tensor in stored_tensors(shape, stored).items():
            key = name.removesuffix(WEIGHT) + suffix
            rule = dataclasses.replace(part.rule, tensor=part.rule.tensor.removesuffix(WEIGHT) + suffix, suffix=suffix)
            expected.parts[key], expected.shapes[key] = part._replace(rule=rule), tensor.shape
            expected.dtypes[key] = tensor.dtypes
    # The parts of a fused leaf are one array, and so are the layers of a stacked one.
    rules = {key: part.rule for key, part in expected.parts.items()}
    floats = {rule.leaf: key for key, rule in rules.items() if not rule.suffix}
    mixed = {rule.leaf: key for key, rule in rules.items() if rule.suffix and rule.leaf in floats}
    faults = [
        f"{key}: found it beside {floats[leaf]} in floats; expected both quantised" for leaf, key in mixed.items()
    ]
    raise_faults(faults, CheckpointError, where=where)
    return expected
