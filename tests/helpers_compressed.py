"""Quantised checkpoints as compressed-tensors writes them, and what it reads of them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers_transformers import import_transformers
from reference import export

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.model.params import linears

IGNORED = ("lm_head", "re:.*embed_tokens.*")


def import_compressed_tensors():
    """Their package, which imports transformers; skips the test where either is not installed."""
    import_transformers()
    pytest.importorskip("compressed_tensors")


def is_linear(config, name):
    part = hf_mapping.wanted(config).get(hf_mapping.canonical(name))
    return part is not None and part.rule.is_linear


def write_theirs(directory, config, tensors, *, format="pack-quantized", **scheme):
    """Quantise the ViT and the decoder with their code; returns the scheme that it reads the result with."""
    import_compressed_tensors()
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from safetensors.torch import save_file

    args = QuantizationArgs(**scheme)
    layers = QuantizationScheme(targets=["Linear"], weights=args)
    compressor, stored = BaseCompressor.get_value_from_registry(format), {}
    for name, array in tensors.items():
        weight = torch.tensor(array).to(torch.bfloat16)
        if not is_linear(config, name) or name.startswith("lm_head"):
            stored[name] = weight
            continue
        groups = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero_point}
        for end, tensor in compressor.compress(state, layers).items():
            stored[f"{name.removesuffix('weight')}{end}"] = tensor.contiguous()
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    written = QuantizationConfig(
        config_groups={"group_0": layers}, ignore=list(IGNORED), format=format, quantization_status="compressed"
    )
    content = config.to_dict() | {"quantization_config": written.model_dump()}
    (directory / "config.json").write_text(json.dumps(content))
    return layers


def read_theirs(path, layers, dtype, format="pack-quantized"):
    """Name -> number of every weight in a file, as their code has it in a dtype."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from safetensors.torch import load_file

    compressor, found, states = BaseCompressor.get_value_from_registry(format), {}, {}
    tensors = load_file(path)
    for name, tensor in tensors.items():
        module, end = name.rsplit(".", 1)
        tensor = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        if f"{module}.weight_scale" in tensors and end.startswith("weight"):
            states.setdefault(module, {})[end] = tensor
        else:
            found[name] = tensor.float().numpy()
    for module, state in states.items():
        found[f"{module}.weight"] = compressor.decompress(state, layers)["weight"].float().numpy()
    return found


def weights_of(model, dtype):
    """Name -> number of every weight of our model, its layers one by one, dequantised in a dtype."""
    for found in linears(model).values():
        for linear in found:
            if linear.kernel_scale is not None:
                kernel = dequantized(linear.kernel[...], linear.kernel_scale[...], len(linear.in_axes))
                linear.kernel, linear.kernel_scale = nnx.Param(jnp.asarray(kernel.astype(dtype))), None
    return {name: np.asarray(tensor, np.float32) for name, tensor in export(model, model.config).items()}


def dequantized(kernel, scale, inputs):
    """By NumPy, in float32: a product of an integer and a scale in bfloat16 is exact there."""
    kernel, scale, last = np.asarray(kernel), np.asarray(scale), inputs - 1
    if kernel.dtype == np.uint8:  # two integers of 4 bits
        pairs = np.stack([kernel & 15, kernel >> 4], last + 1).astype(np.int8) - 8
        kernel = pairs.reshape(*kernel.shape[:last], -1, *kernel.shape[inputs:])
    if scale.ndim == kernel.ndim:
        scale = np.repeat(scale, kernel.shape[last] // scale.shape[last], axis=last)
    return kernel.astype(np.float32) * scale


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, name)
