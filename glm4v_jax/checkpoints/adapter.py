"""Adapters in PEFT's format: written from a model, and loaded into one. No torch."""

import collections
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.adapter_files import (
    CONFIG,
    HEAD,
    MAGNITUDE,
    PREFIX,
    WEIGHTS,
    Pair,
    adaptable_modules,
    read_adapter,
    sizes_of,
)
from glm4v_jax.checkpoints.hf_write import PYTORCH
from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.checkpoints.saved_modules import put_saved, replace_kernel, saved_tensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.devices.distributed import is_first, to_host
from glm4v_jax.errors import ConfigError
from glm4v_jax.files import replacing
from glm4v_jax.model import lora, params
from glm4v_jax.model.glm4v import Glm4v


def save_adapter(model: Glm4v, directory: str | Path, base_name: str = "") -> None:
    """Write a model's adapter for `peft.PeftModel.from_pretrained(base, directory)`.

    All processes call this; the first one writes. Tensors are float32, those of whole modules of the leaves' dtype.

    Args:
      model: with an adapter.
      directory: made if need be; an adapter that is there is replaced.
      base_name: of the model that the adapter belongs to, a directory or a name on the hub.

    Raises:
      ConfigError: the model has no adapter, or its magnitudes are fixed (`lora.fix_magnitudes`).
      OSError: the disk refuses.
    """
    if not lora.has_lora(model):
        raise ConfigError("found a model without an adapter; expected one of lora.add_lora or adapter.load_adapter")
    if any(linear.lora_gain is not None for found in params.linears(model).values() for linear in found):
        raise ConfigError("found an adapter whose magnitudes are fixed for inference; expected that of load_adapter")
    tensors, options = adapter_tensors(model), adapter_options(model, base_name)
    if is_first():
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config, file = directory / CONFIG, directory / WEIGHTS
        with replacing(config) as new_config, replacing(file) as new_file:
            write_safetensors(new_file, tensors, PYTORCH)
            new_config.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            # New weights beside an old configuration would pass for an adapter; weights alone do not.
            config.unlink(missing_ok=True)


def adapter_tensors(model: Glm4v) -> dict[str, np.ndarray]:
    """Return name, as PEFT writes it, -> A [R, inputs], B [outputs, R] or magnitude of every adapter, on the host.

    And the tensors of whole modules.

    Where several processes hold the model, all of them call this.
    """
    linears = params.linears(model)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in saved_tensors(model).items()}
    leaves = {
        path: [to_host([_leaf(x) for x in (linear.lora_a, linear.lora_b, linear.lora_magnitude)]) for linear in found]
        for path, found in linears.items()
    }
    for adapted in adaptable_modules(model.config):
        stacked = params.stacked_layers(linears[adapted.path][0]) is not None
        of_layer = leaves[adapted.path][0 if stacked else adapted.layer or 0]
        if of_layer[0] is None:
            continue
        a, b, magnitude = (x[adapted.layer] if stacked and x is not None else x for x in of_layer)
        sizes = sizes_of(model.config, a.shape[-1])
        tensors[f"{PREFIX}{adapted.module}.lora_A.weight"] = adapted.a.to_tensor(a, sizes)
        tensors[f"{PREFIX}{adapted.module}.lora_B.weight"] = adapted.b.to_tensor(b[adapted.b.index], sizes)
        if magnitude is not None:
            of_part = magnitude[adapted.magnitude.index]
            tensors[f"{PREFIX}{adapted.module}.{MAGNITUDE}"] = adapted.magnitude.to_tensor(of_part, sizes)
    return tensors


def adapter_options(model: Glm4v, base_name: str) -> dict[str, Any]:
    """Return the content of adapter_config.json: options that PEFT has had since 0.8."""
    linears = params.linears(model)
    found: dict[str, tuple[int, float]] = {}
    has_magnitudes = any(linear.lora_magnitude is not None for every in linears.values() for linear in every)
    for adapted in adaptable_modules(model.config):
        every = linears[adapted.path]
        linear = every[0 if len(every) == 1 else adapted.layer or 0]
        if linear.lora_a is not None:
            rank = linear.lora_a.shape[-1]
            found[adapted.pattern] = rank, round(linear.lora_scale * rank, 9)  # 9.6 / 3 * 3 is not 9.6
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
        "modules_to_save": list(model.modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {pattern: r for pattern, (r, _) in found.items() if r != rank},
        "revision": None,
        "target_modules": "|".join(found),
        "task_type": "CAUSAL_LM",
        "use_dora": has_magnitudes,
        "use_rslora": False,  # a scale is a scale: alpha says it for this rank
    }


def load_adapter(model: Glm4v, directory: str | Path, *, keep_dtype: bool = False) -> Glm4v:
    """Return the model with an adapter that PEFT, or `save_adapter`, has written; new modules around the same arrays.

    Where layers differ in rank the lower ones are padded with zeros, layers without an adapter get one of zeros, and
    where the two parts of a fused kernel have an A each the leaf has both, concatenated: the outputs stay the same.
    A head that PEFT has saved beside its adapter replaces the model's, as it does in PEFT, and so do whole modules
    (`modules_to_save`); where the model's are quantised, so are these.

    Args:
      model: without an adapter.
      directory: with adapter_config.json and adapter_model.safetensors.
      keep_dtype: let whole modules have the dtypes of the file, for training; by default they get those of the model's.

    Raises:
      CheckpointError: files are missing or corrupt, tensors do not fit the model (all are listed), or the adapter is
        more than A and B beside kernels.
      ConfigError: the model has an adapter already.
    """
    pairs, modules, saved = read_adapter(directory, model.config)
    with lora.on_mesh_of(model):
        result = _with_adapters(model, _by_leaf(pairs.values(), model.config))
        put_saved(result, modules, saved, keep_dtype=keep_dtype)
        return result


def _with_adapters(model: Glm4v, adapters: Mapping[str, Mapping[int, Sequence[Pair]]]) -> Glm4v:
    """See `load_adapter`; in the model's mesh."""
    result = lora.copy_without_lora(model)
    for path, found in params.linears(result).items():
        if path not in adapters:
            continue
        layers, scale = adapters[path], next(iter(adapters[path].values()))[0].scale
        inputs, outputs = params.sizes(found[0])
        fused = {layer: _fused(parts, outputs, scale) for layer, parts in layers.items()}
        rank = max(a.shape[-1] for a, _ in fused.values())
        count = params.stacked_layers(found[0]) or len(found)
        every = [
            (*_padded(fused.get(i), rank, inputs, outputs), _magnitude(layers.get(i, ()), outputs))
            for i in range(count)
        ]
        if params.stacked_layers(found[0]) is not None:
            a, b, magnitude = (np.stack(same) for same in zip(*every, strict=True))
            every = [(a, b, magnitude)]
        for linear, (a, b, magnitude) in zip(found, every, strict=True):
            put = functools.partial(_put, like=linear.kernel[...])
            lora.set_lora(linear, put(a, (*linear.in_axes, None)), put(b, (None, *linear.out_axes)), scale)
            if path == HEAD and (head := layers[0][0].base) is not None:
                is_integer = linear.kernel_scale is not None
                replace_kernel(linear, head if is_integer else head.astype(linear.kernel.dtype))
            if not np.isnan(magnitude).all():
                lora.set_magnitude(linear, put(magnitude, linear.out_axes))
    return result


def _magnitude(parts: Sequence[Pair], outputs: Sequence[int]) -> np.ndarray:
    """The magnitude of a fused kernel from those of its parts; NaN where there is none."""
    found = np.full(outputs, np.nan, lora.DTYPE)
    for part in parts:
        if part.magnitude is not None:
            found[part.adapted.b.index[1:]] = part.magnitude
    return found


def _by_leaf(pairs: Iterable[Pair], config: Glm4vConfig) -> dict[str, dict[int, list[Pair]]]:
    """Path of a linear layer -> number of the layer (0 if it exists once) -> its parts that have an adapter.

    These are pairs in the layout of the leaves, A [*inputs, R] and B [R, *outputs], without the axis of a part of a
    fused kernel: `adapted.b.index` is its position in the fused B.
    """
    found: dict[str, dict[int, list[Pair]]] = {}
    for pair in pairs:
        adapted, base, magnitude = pair.adapted, pair.base, pair.magnitude
        sizes = sizes_of(config, len(pair.a))
        if base is not None:
            base = hf_mapping.wanted(config)[f"{HEAD}.weight"].rule.to_leaf(base, sizes)
        if magnitude is not None:
            magnitude = adapted.magnitude.to_leaf(magnitude, sizes)
        a, b = adapted.a.to_leaf(pair.a, sizes), adapted.b.to_leaf(pair.b, sizes)
        part = pair._replace(a=a, b=b, base=base, magnitude=magnitude)
        found.setdefault(adapted.path, {}).setdefault(adapted.layer or 0, []).append(part)
    return found


def _fused(parts: Sequence[Pair], outputs: Sequence[int], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a fused kernel from those of its parts; an A that several share comes once."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for part in parts:
        b = np.zeros((part.a.shape[-1], *outputs), part.b.dtype)
        b[part.adapted.b.index] = part.b * np.float32(part.scale / scale)
        for a, others in pairs:
            if np.array_equal(a, part.a):
                others += b
                break
        else:
            pairs.append((part.a, b))
    return np.concatenate([a for a, _ in pairs], axis=-1), np.concatenate([b for _, b in pairs])


def _padded(
    pair: tuple[np.ndarray, np.ndarray] | None, rank: int, inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B, padded with zeros to this rank."""
    a, b = np.zeros((*inputs, rank), lora.DTYPE), np.zeros((rank, *outputs), lora.DTYPE)
    if pair is not None:
        a[..., : pair[0].shape[-1]], b[: pair[1].shape[0]] = pair
    return a, b


def _put(values: np.ndarray, axes: Sequence[str | None], like: Array) -> Array:
    """Put values where a kernel is; each process fills its own. Beside an abstract kernel they are abstract, too."""
    names = (*(None,) * (values.ndim - len(axes)), *axes)
    if isinstance(like, jax.core.Tracer):
        return mesh.reshard(jnp.asarray(values), *names)
    sharding = NamedSharding(like.sharding.mesh, mesh.spec(*names))
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__, dtype=values.dtype)


def _leaf(parameter: Any) -> Array | None:
    return None if parameter is None else parameter[...]


def _number(value: float) -> int | float:
    """As an integer if possible, as PEFT writes alpha."""
    return int(value) if value == int(value) else value
