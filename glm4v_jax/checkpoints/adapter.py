"""Adapters as PEFT keeps them: adapter_model.safetensors and adapter_config.json, written and read. No torch.

Names and layouts follow from the table in `weights`: a kernel's rule, cut in two at the rank, gives those of its A and
its B, so that heads are in the same order in an adapter as in its kernel.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from glm4v_jax.checkpoints import hf_mapping, hf_shards
from glm4v_jax.checkpoints.safetensors import SafetensorsFile, write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.files import replacing
from glm4v_jax.model import lora, params
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import Linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's two wrappers around the model

# What PEFT can make of a LoRA that is no A and B beside kernels alone; none of it may be set.
_REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "fan_in_fan_out",
)  # fmt: skip
# These initialisers leave the base's kernels alone; PiSSA, OLoRA, LoftQ, ... do not, and are nothing without theirs.
_INITIALISERS = (True, False, None, "gaussian", "eva", "orthogonal")


class Place(NamedTuple):
    """A linear module of the reference: its full name, its layer, and the table's rows for its A and its B."""

    module: str
    layer: int | None
    a: hf_mapping.Rule
    b: hf_mapping.Rule

    @property
    def path(self) -> str:
        """Of the linear layer here, without the layer's number (`params.linears`)."""
        return self.a.leaf.removesuffix(".lora_a")

    @property
    def pattern(self) -> str:
        """Regular expression for this module in every layer."""
        name = re.escape(self.module)
        return name if self.layer is None else name.replace(rf"\.{self.layer}\.", r"\.\d+\.", 1)


def places(config: Glm4vConfig) -> list[Place]:
    """Every module of the reference that can have an adapter; convolutions are ones too."""
    return [
        Place(name.removesuffix(".weight"), layer, *adapter_rules(rule))
        for name, (rule, layer) in hf_mapping.tensor_rules(config).items()
        if rule.leaf.endswith(".kernel")
    ]


def adapter_rules(rule: hf_mapping.Rule) -> tuple[hf_mapping.Rule, hf_mapping.Rule]:
    """The rows of A and B that go with a kernel's: "(K G H) D -> D K (G H)" -> "R D -> D R", "(K G H) R -> R K (G H)".

    A convolution's B is one of 1 x 1. Both parts of a fused kernel have its whole A.
    """
    (outputs, *inputs), leaf = rule.axes()
    of_outputs = [axis for axis in leaf if set(axis) <= set(outputs)]
    of_inputs = [axis for axis in leaf if axis not in of_outputs]
    ones = " 1" * (len(inputs) - 1)
    part = None if rule.part is None else (rule.part[0] - len(of_inputs) + 1, rule.part[1])
    tensor, path = rule.tensor.removesuffix(".weight"), rule.leaf.removesuffix(".kernel")
    return (
        hf_mapping.Rule(f"{tensor}.lora_A.weight", f"{path}.lora_a", f"R {_text(inputs)} -> {_text(of_inputs)} R"),
        hf_mapping.Rule(
            f"{tensor}.lora_B.weight", f"{path}.lora_b", f"{_text([outputs])} R{ones} -> R {_text(of_outputs)}", part
        ),
    )


def save_adapter(model: Glm4v, directory: str | Path, base_name: str = "") -> None:
    """Write a model's adapter for `peft.PeftModel.from_pretrained(base, directory)`.

    All processes call this; the first one writes. Tensors are float32, as the leaves are.

    Args:
      model: with an adapter.
      directory: made if need be; an adapter that is there is replaced.
      base_name: of the model that it belongs to, a directory or a name on the hub.

    Raises:
      ConfigError: the model has no adapter.
      OSError: the disk refuses.
    """
    if not lora.has_lora(model):
        raise ConfigError("found a model without an adapter; expected one of lora.add_lora or adapter.load_adapter")
    tensors, options = adapter_tensors(model), adapter_options(model, base_name)
    if jax.process_index() == 0:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config, file = directory / CONFIG, directory / WEIGHTS
        with replacing(config) as new_config, replacing(file) as new_file:
            write_safetensors(new_file, tensors, hf_shards.PYTORCH)
            new_config.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            # Weights beside the rank and alpha of others would pass for an adapter: weights alone do not.
            config.unlink(missing_ok=True)


def adapter_tensors(model: Glm4v) -> dict[str, np.ndarray]:
    """Name, as PEFT writes it, -> A [R, inputs] or B [outputs, R] of every module with an adapter, on the host."""
    linears, tensors = params.linears(model), {}
    leaves = {path: [_on_host(linear) for linear in found] for path, found in linears.items()}
    for place in places(model.config):
        stacked = params.stacked_layers(linears[place.path][0]) is not None
        pair = leaves[place.path][0 if stacked else place.layer or 0]
        if pair is None:
            continue
        a, b = (side[place.layer] for side in pair) if stacked else pair
        sizes = _sizes(model.config, a.shape[-1])
        if place.b.part is not None:
            axis, index = place.b.part
            b = np.take(b, index, axis)
        tensors[f"{_PREFIX}{place.module}.lora_A.weight"] = place.a.to_tensor(a, sizes)
        tensors[f"{_PREFIX}{place.module}.lora_B.weight"] = place.b.to_tensor(b, sizes)
    return tensors


def adapter_options(model: Glm4v, base_name: str) -> dict[str, Any]:
    """What adapter_config.json says of a model's adapter: options that PEFT has had since 0.8."""
    linears = params.linears(model)
    found: dict[str, tuple[int, float]] = {}
    for place in places(model.config):
        every = linears[place.path]
        linear = every[0 if len(every) == 1 else place.layer or 0]
        if linear.lora_a is not None:
            rank = linear.lora_a.shape[-1]
            found[place.pattern] = rank, round(linear.lora_scale * rank, 9)  # 9.6 / 3 * 3 is not 9.6
    (rank, alpha), _ = collections.Counter(found.values()).most_common(1)[0]
    return {
        "alpha_pattern": {pattern: _number(a) for pattern, (_, a) in found.items() if a != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {pattern: r for pattern, (r, _) in found.items() if r != rank},
        "revision": None,
        "target_modules": "|".join(found),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def load_adapter(model: Glm4v, directory: str | Path) -> Glm4v:
    """The model with an adapter that PEFT, or `save_adapter`, has written; new modules around the same arrays.

    Ranks that differ between layers are filled up with zeros, layers without an adapter get one of zeros, and the two
    parts of a fused kernel with an A each get both of them one after the other: what is computed stays the same.

    Args:
      model: without an adapter, in the current mesh.
      directory: with adapter_config.json and adapter_model.safetensors.

    Raises:
      CheckpointError: files are missing or corrupt, tensors do not fit the model (all are listed), or the adapter is
        something else than A and B beside kernels.
      ConfigError: the model has an adapter already.
    """
    result = lora.copy_without_lora(model)
    pieces = _pieces(read_adapter(directory, model.config).values(), model.config)
    for path, found in params.linears(result).items():
        if path not in pieces:
            continue
        layers, scale = pieces[path], next(iter(pieces[path].values()))[0].scale
        inputs, outputs = params.sizes(found[0])
        fused = {layer: _fused(parts, outputs, scale) for layer, parts in layers.items()}
        rank = max(a.shape[-1] for a, _ in fused.values())
        count = params.stacked_layers(found[0]) or len(found)
        every = [_filled(fused.get(i), rank, inputs, outputs) for i in range(count)]
        if params.stacked_layers(found[0]) is not None:
            every = [(np.stack([a for a, _ in every]), np.stack([b for _, b in every]))]
        for linear, (a, b) in zip(found, every, strict=True):
            lora.set_lora(linear, _put(a, (*linear.in_axes, None)), _put(b, (None, *linear.out_axes)), scale)
    return result


class _Piece(NamedTuple):
    """One module's adapter, in the leaves' layout: A [*inputs, R], B [R, *outputs] without the axis of a part."""

    a: np.ndarray
    b: np.ndarray
    part: tuple[int, int] | None
    scale: float


@dataclasses.dataclass(frozen=True)
class _Scaling:
    """What adapter_config.json says of ranks, and of the number that B A is multiplied with."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    by_root: bool

    @classmethod
    def read(cls, path: Path) -> "_Scaling":
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}; expected an adapter of PEFT") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: found no JSON ({error}); expected an adapter's configuration") from error
        if not isinstance(options, dict) or options.get("peft_type") != "LORA":
            kind = options.get("peft_type") if isinstance(options, dict) else options
            raise CheckpointError(f"{path}: peft_type: found {kind!r}; expected 'LORA'")
        for name in _REFUSED:
            if options.get(name):
                raise CheckpointError(f"{path}: {name}: found {options[name]!r}; expected none: it is not supported")
        if options.get("bias", "none") != "none":
            raise CheckpointError(f"{path}: bias: found {options['bias']!r}; expected 'none': it is not supported")
        if (start := options.get("init_lora_weights")) not in _INITIALISERS:
            raise CheckpointError(f"{path}: init_lora_weights: found {start!r}, which changes the base; expected true")
        try:
            return cls(
                int(options["r"]), float(options["lora_alpha"]), dict(options.get("rank_pattern") or {}),
                dict(options.get("alpha_pattern") or {}), bool(options.get("use_rslora")),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: found no usable r, lora_alpha or pattern ({error!r})") from error

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scale of a module, as PEFT finds them (`get_pattern_key`)."""
        rank = next((r for key, r in self.ranks.items() if re.match(rf"(.*\.)?({key})$", module)), self.rank)
        alpha = next((a for key, a in self.alphas.items() if re.match(rf"(.*\.)?({key})$", module)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.by_root else rank)


class Pair(NamedTuple):
    """One module's adapter as the file has it, float32: A [R, inputs], B [outputs, R], of a convolution with a window.

    Beside the module's weight W it stands for W + scale B A.
    """

    place: Place
    a: np.ndarray
    b: np.ndarray
    scale: float

    def added_to(self, weight: np.ndarray) -> np.ndarray:
        """W + scale B A in float32, in the shape of the weight."""
        product = self.b.reshape(len(self.b), -1) @ self.a.reshape(len(self.a), -1)
        product *= np.float32(self.scale)
        product = product.reshape(weight.shape)
        product += weight
        return product


def read_adapter(directory: str | Path, config: Glm4vConfig) -> dict[str, Pair]:
    """Name of a weight, without prefixes as `hf_mapping.canonical` has it, -> the adapter beside it.

    Raises:
      CheckpointError: as of `load_adapter`.
    """
    directory = Path(directory)
    return _read(directory / WEIGHTS, config, _Scaling.read(directory / CONFIG))


def _read(path: Path, config: Glm4vConfig, scaling: _Scaling) -> dict[str, Pair]:
    file = SafetensorsFile(path)
    names = {hf_mapping.canonical(name.removeprefix(_PREFIX)): name for name in file}
    known, problems = set(), []
    found: dict[str, Pair] = {}
    for place in places(config):
        module = hf_mapping.canonical(place.module)
        keys = [f"{module}.lora_{side}.weight" for side in "AB"]
        known |= set(keys)
        present = [key for key in keys if key in names]
        if len(present) == 1:
            problems += [
                f"missing: {_PREFIX}{place.module}{key.removeprefix(module)}" for key in keys if key not in names
            ]
        if len(present) < 2:
            continue
        rank, scale = scaling.of(names[keys[0]].removeprefix(_PREFIX).removesuffix(".lora_A.weight"))
        sizes, tensors = _sizes(config, rank), []
        for rule, key in zip((place.a, place.b), keys, strict=True):
            name, expected = names[key], rule.tensor_shape(sizes)
            if file[name].shape == expected:
                tensors.append(file.read(name).astype(lora.DTYPE))
            else:
                problems.append(f"misshapen: {name} has shape {list(file[name].shape)}, expected {list(expected)}")
        if len(tensors) == 2:
            found[f"{module}.weight"] = Pair(place, tensors[0], tensors[1], scale)
    problems += [f"unexpected: {name} {list(file[name].shape)}" for key, name in names.items() if key not in known]
    if not names:
        problems.append("it is empty")
    if problems:
        raise CheckpointError(f"{path}: {len(problems)} tensors do not fit the model: " + "; ".join(sorted(problems)))
    return found


def _pieces(pairs: Iterable[Pair], config: Glm4vConfig) -> dict[str, dict[int, list[_Piece]]]:
    """Path of a linear layer -> layer (0 where there is one only) -> its parts that there is an adapter for."""
    found: dict[str, dict[int, list[_Piece]]] = {}
    for place, a, b, scale in pairs:
        sizes = _sizes(config, len(a))
        piece = _Piece(place.a.to_leaf(a, sizes), place.b.to_leaf(b, sizes), place.b.part, scale)
        found.setdefault(place.path, {}).setdefault(place.layer or 0, []).append(piece)
    return found


def _fused(parts: Sequence[_Piece], outputs: Sequence[int], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a whole kernel from those of its parts: an A that several have stands there once."""
    whole: list[tuple[np.ndarray, np.ndarray]] = []
    for piece in parts:
        b = np.zeros((piece.a.shape[-1], *outputs), piece.b.dtype)
        where: tuple[Any, ...] = (...,)
        if piece.part is not None:
            axis, index = piece.part
            where = (*(slice(None),) * axis, index)
        b[where] = piece.b * np.float32(piece.scale / scale)
        for a, others in whole:
            if np.array_equal(a, piece.a):
                others += b
                break
        else:
            whole.append((piece.a, b))
    return np.concatenate([a for a, _ in whole], axis=-1), np.concatenate([b for _, b in whole])


def _filled(
    pair: tuple[np.ndarray, np.ndarray] | None, rank: int, inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B filled up with zeros to this rank."""
    a, b = np.zeros((*inputs, rank), lora.DTYPE), np.zeros((rank, *outputs), lora.DTYPE)
    if pair is not None:
        a[..., : pair[0].shape[-1]], b[: pair[1].shape[0]] = pair
    return a, b


def _put(values: np.ndarray, axes: Sequence[str | None]) -> Array:
    """Onto the devices of the current mesh, of which each process fills its own."""
    spec = PartitionSpec(*(None,) * (values.ndim - len(axes)), *mesh.spec(*axes))
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__, dtype=values.dtype)


def _on_host(linear: Linear) -> tuple[np.ndarray, np.ndarray] | None:
    """A and B of a linear layer, put together from all devices of all processes."""
    if linear.lora_a is None or linear.lora_b is None:
        return None
    a, b = (_whole(leaf) for leaf in (linear.lora_a[...], linear.lora_b[...]))
    return a, b


def _whole(leaf: Array) -> np.ndarray:
    if not leaf.is_fully_addressable:
        leaf = jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))
    return np.asarray(leaf)


def _sizes(config: Glm4vConfig, rank: int) -> dict[str, int]:
    """The sizes of the letters in the rows of A and B, and of the axes of length 1."""
    return hf_mapping.dimensions(config) | {"R": rank, "1": 1}


def _text(axes: Sequence[Sequence[str]]) -> str:
    """Axes in einops notation."""
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes)


def _number(value: float) -> int | float:
    """As an integer where it is one, as alpha usually is."""
    return int(value) if value == int(value) else value
