"""The files of an adapter, adapter_model.safetensors and adapter_config.json of PEFT: their names, and what is read.

Names and layouts follow from the table in `hf_mapping`: a kernel's rule, cut in two at the rank, gives those of its A
and its B, so that heads are in the same order in an adapter as in its kernel; its outputs alone, those of DoRA's
magnitude.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from msgspec import Meta

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.safetensors import SafetensorsFile
from glm4v_jax.checkpoints.saved_modules import named_modules, parts_of
from glm4v_jax.config.checks import Positive, fault, from_mapping, raise_faults, validate
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import ADAPTER_CONFIG, read_json_object
from glm4v_jax.model import lora

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's two wrappers around the model
HEAD = "lm_head"
MAGNITUDE = "lora_magnitude_vector"

# Options of PEFT that make more of a LoRA than A and B beside kernels; none of them is supported.
_REFUSED = (
    "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "fan_in_fan_out", "use_bdlora", "kasa_config", "arrow_config",
    "monteclora_config",
)  # fmt: skip


class AdaptedModule(NamedTuple):
    """A linear module of the reference: its full name, its layer, and the rules of its A, its B and its magnitude."""

    module: str
    layer: int | None
    a: hf_mapping.Rule
    b: hf_mapping.Rule
    magnitude: hf_mapping.Rule

    @property
    def path(self) -> str:
        """Of the linear layer here, without the layer's number (`params.linears`)."""
        return self.a.leaf.removesuffix(".lora_a")

    @property
    def pattern(self) -> str:
        """Regular expression for this module in every layer."""
        name = re.escape(self.module)
        return name if self.layer is None else name.replace(rf"\.{self.layer}\.", r"\.\d+\.", 1)


def adaptable_modules(config: Glm4vConfig) -> list[AdaptedModule]:
    """Return every module of the reference that can have an adapter, convolutions included."""
    return [
        AdaptedModule(name.removesuffix(".weight"), layer, *adapter_rules(rule))
        for name, (rule, layer) in hf_mapping.tensor_rules(config).items()
        if rule.leaf.endswith(".kernel")
    ]


def adapter_rules(rule: hf_mapping.Rule) -> tuple[hf_mapping.Rule, hf_mapping.Rule, hf_mapping.Rule]:
    """Return the rules of A, B and magnitude that go with a kernel's.

    "(K G H) D -> D K (G H)" gives "R D -> D R", "(K G H) R -> R K (G H)" and "(K G H) -> K (G H)". The B of a
    convolution has a window of 1 x 1, and its magnitude all dimensions of a kernel. Both parts of a fused kernel share
    its A.
    """
    (outputs, *inputs), leaf = rule.axes()
    of_outputs = [axis for axis in leaf if set(axis) <= set(outputs)]
    of_inputs = [axis for axis in leaf if axis not in of_outputs]
    ones = " 1" * (len(inputs) - 1)
    part = None if rule.part is None else (rule.part[0] - len(of_inputs) + 1, rule.part[1])
    tensor, path = rule.tensor.removesuffix(".weight"), rule.leaf.removesuffix(".kernel")
    magnitude = f"1 {_text([outputs])}{ones}" if ones else _text([outputs])
    return (
        hf_mapping.Rule(f"{tensor}.lora_A.weight", f"{path}.lora_a", f"R {_text(inputs)} -> {_text(of_inputs)} R"),
        hf_mapping.Rule(
            f"{tensor}.lora_B.weight", f"{path}.lora_b", f"{_text([outputs])} R{ones} -> R {_text(of_outputs)}", part
        ),
        hf_mapping.Rule(
            f"{tensor}.{MAGNITUDE}", f"{path}.lora_magnitude", f"{magnitude} -> {_text(of_outputs)}",
            None if part is None else (part[0] - 1, part[1]),
        ),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Options:
    """What adapter_config.json says of ranks and scales, and of what must be as it is supported.

    Initialisers other than these (PiSSA, OLoRA, LoftQ, ...) change the base's kernels, and need that base.
    """

    peft_type: Literal["LORA"]
    r: Positive
    lora_alpha: float
    rank_pattern: Annotated[dict[str, Positive] | None, Meta(description="an object of patterns and ranks")] = None
    alpha_pattern: Annotated[dict[str, float] | None, Meta(description="an object of patterns and numbers")] = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    modules_to_save: Annotated[list[str] | None, Meta(description="a list of modules")] = None
    bias: Annotated[Literal["none"], Meta(description="'none': it is not supported")] = "none"
    init_lora_weights: Annotated[
        bool | Literal["gaussian", "eva", "orthogonal"] | None, Meta(description="true: this one changes the base")
    ] = True

    def __post_init__(self) -> None:
        validate(self, CheckpointError)

    @classmethod
    def read(cls, path: Path) -> "_Options":
        options = read_json_object(path, "an adapter of PEFT")
        faults = [fault(name, options[name], "none: it is not supported") for name in _REFUSED if options.get(name)]
        try:
            found = from_mapping(cls, options, CheckpointError, ignore_unknown=True)
        except CheckpointError as error:
            faults = [*error.faults, *faults]
        raise_faults(faults, CheckpointError, where=str(path))
        return found

    def scale_of(self, module: str) -> tuple[int, float]:
        """Return rank and scale of a module, as PEFT finds them (`get_pattern_key`)."""

        def found(patterns: Mapping[str, Any] | None, default: Any) -> Any:
            return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)

        rank, alpha = found(self.rank_pattern, self.r), found(self.alpha_pattern, self.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


class Pair(NamedTuple):
    """One module's adapter as the file has it, float32: A [R, inputs], B [outputs, R], of a convolution with a window.

    With it the module's weight W becomes W + scale B A; with DoRA each output of that gets its `magnitude` as its norm.
    PEFT also saves the W of a head: `base`, in its own dtype.
    """

    adapted: AdaptedModule
    a: np.ndarray
    b: np.ndarray
    scale: float
    base: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    def added_to(self, weight: np.ndarray) -> np.ndarray:
        """Return what becomes of the weight, in float32 and in its shape; it is W unless the adapter has its own."""
        weight = weight if self.base is None else self.base.astype(np.float32)
        product = self.b.reshape(len(self.b), -1) @ self.a.reshape(len(self.a), -1)
        product *= np.float32(self.scale)
        product = product.reshape(weight.shape)
        product += weight
        if self.magnitude is not None:
            norms = np.linalg.norm(product.reshape(len(product), -1), axis=1)
            product *= (self.magnitude.ravel() / norms).reshape(-1, *(1,) * (product.ndim - 1))
        return product


class Adapter(NamedTuple):
    """What the files of an adapter hold, by the names of weights as `hf_mapping.canonical` spells them.

    Attributes:
      pairs: the adapter beside a weight.
      modules: names in `lora.MODULES_TO_SAVE` of those that replace the model's.
      saved: their tensors, views of the file.
    """

    pairs: dict[str, Pair]
    modules: tuple[str, ...]
    saved: dict[str, np.ndarray]


def read_adapter(directory: str | Path, config: Glm4vConfig) -> Adapter:
    """Read the files of an adapter.

    Raises:
      CheckpointError: as of `load_adapter`.
    """
    options, file = _Options.read(Path(directory) / CONFIG), SafetensorsFile(Path(directory) / WEIGHTS)
    if not file:
        raise CheckpointError(f"{file.path}: found no tensors; expected those of an adapter")

    def spell(name: str) -> str:
        return hf_mapping.canonical(name.removeprefix(PREFIX))

    names = {spell(name): name.removeprefix(PREFIX) for name in file}
    present: dict[str, tuple[AdaptedModule, float]] = {}
    modules = named_modules(options.modules_to_save or (), config, str(Path(directory) / CONFIG))
    whole = {hf_mapping.canonical(name): part.rule for name, part in parts_of(config, modules)}
    expected = {key: rule.tensor_shape(hf_mapping.dimensions(config)) for key, rule in whole.items()}
    for adapted in adaptable_modules(config):
        module = hf_mapping.canonical(adapted.module)
        if f"{module}.weight" in whole:
            continue
        rules = {f"{module}.lora_A.weight": adapted.a, f"{module}.lora_B.weight": adapted.b}
        if options.use_dora:
            rules[f"{module}.{MAGNITUDE}"] = adapted.magnitude
        # PEFT's patterns are for names as they are in the file.
        if (name := next((names[key] for key in rules if key in names), None)) is not None:
            rank, scale = options.scale_of(re.sub(r"\.lora_[^.]*(\.weight)?$", "", name))
            present[module] = adapted, scale
            expected |= {key: rule.tensor_shape(sizes_of(config, rank)) for key, rule in rules.items()}
            if module == HEAD and (base := f"{module}.base_layer.weight") in names:
                expected[base] = hf_mapping.wanted(config)[f"{module}.weight"].rule.tensor_shape(sizes_of(config, rank))
    found = hf_mapping.check_tensors(file.items(), expected, str(file.path), spell=spell, any_dtype=True)

    def tensor(key: str) -> np.ndarray:
        return file.read(found[key]).astype(lora.DTYPE)

    pairs = {
        f"{module}.weight": Pair(
            adapted, tensor(f"{module}.lora_A.weight"), tensor(f"{module}.lora_B.weight"), scale,
            file.read(found[base]) if (base := f"{module}.base_layer.weight") in found else None,
            tensor(name) if (name := f"{module}.{MAGNITUDE}") in found else None,
        )
        for module, (adapted, scale) in present.items()
    }  # fmt: skip
    return Adapter(pairs, modules, {key: file.read(found[key]) for key in whole})


def sizes_of(config: Glm4vConfig, rank: int) -> dict[str, int]:
    """Sizes of the letters in the rules of A and B, and of axes of length 1."""
    return hf_mapping.dimensions(config) | {"R": rank, "1": 1}


def _text(axes: Sequence[Sequence[str]]) -> str:
    """Axes in einops notation."""
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes)
