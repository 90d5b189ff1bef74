"""`quantization_config`: schemes that are read, and every other one refused by its field."""

import copy

import pytest

from glm4v_jax.config.quantization import StoredQuantization
from glm4v_jax.errors import ConfigError

INT4 = StoredQuantization(4, 64)


@pytest.mark.parametrize(
    "scheme",
    [
        StoredQuantization(),
        StoredQuantization(8, 128),
        INT4,
        StoredQuantization(4),
        StoredQuantization(4, 64, symmetric=False),
        StoredQuantization(packed=False),
    ],
)
def test_what_is_written_is_read(scheme):
    assert StoredQuantization.from_dict(scheme.to_dict(["lm_head"])) == scheme


def changed(where, field, value):
    data = copy.deepcopy(INT4.to_dict([]))
    group = data["config_groups"]["group_0"]
    {"": data, "group": group, "weights": group["weights"]}[where][field] = value
    return data


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("weights", "strategy", None),  # which the group tells
        ("weights", "actorder", "weight"),
        ("weights", "actorder", False),
        ("weights", "observer", "mse"),
        ("group", "format", "pack-quantized"),
        ("", "sparsity_config", {}),
        ("", "sparsity_config", {"format": "dense"}),
        ("", "version", "0.20.1"),
        ("", "run_compressed", True),
        ("", "a_newer_field", 3),
        ("", "moe_sparsity_config", None),
        ("", "ignore", None),
        ("group", "targets", ["re:.*mlp.*"]),
        ("group", "a_newer_field", None),
        ("weights", "scale_dtype", "torch.bfloat16"),
        ("weights", "zp_dtype", "torch.int8"),
        ("weights", "observer_kwargs", {"averaging_constant": 0.01}),
        ("weights", "block_structure", None),
    ],
)
def test_fields_that_change_nothing_are_accepted(where, field, value):
    assert StoredQuantization.from_dict(changed(where, field, value)) == INT4


TWO = {
    name: scheme.to_dict([])["config_groups"]["group_0"]
    for name, scheme in zip("ab", (INT4, StoredQuantization()), strict=True)
}


@pytest.mark.parametrize(
    ("where", "field", "value", "message"),
    [
        ("", "quant_method", "gptq", "quant_method: found 'gptq'; expected 'compressed-tensors': load the weights"),
        ("", "quant_method", "bitsandbytes", "quant_method: found 'bitsandbytes'; expected 'compressed-tensors'"),
        ("", "quantization_status", "frozen", "quantization_status: found 'frozen'; expected 'compressed'"),
        ("", "format", "float-quantized", "format: found 'float-quantized'; expected one of 'pack-quantized', "),
        (
            "",
            "format",
            "mixed-precision",
            "config_groups.group_0.format: found nothing; expected one of pack-quantized",
        ),
        ("", "kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme: found {'num_bits': 8}; expected null"),
        ("", "sparsity_config", {"format": "marlin-24"}, "sparsity_config: found {.*}; expected null"),
        ("", "transform_config", {"config_groups": {"u": 1}}, "transform_config: found {.*}; expected null"),
        ("", "moe_sparsity_config", {"experts": 2}, "moe_sparsity_config: found {.*}; expected no such field"),
        ("", "ignore", "lm_head", "ignore: found 'lm_head'; expected a list of strings"),
        ("", "ignore", ["lm_head", "re:*visual"], r"ignore\[1\]: found 're:\*visual'; expected a regular expression"),
        ("group", "rotation", 2, "group_0.rotation: found an unknown field; expected some of weights, targets"),
        ("weights", "group_sise", 64, "weights.group_sise: found an unknown field; .*; did you mean 'group_size'"),
        ("weights", "block_structure", [2, 2], r"weights.block_structure: found \[2, 2\]; expected null"),
        ("", "config_groups", {}, "config_groups: found nothing; expected a scheme of linear layers"),
        ("", "config_groups", 3, "config_groups: found 3; expected an object"),
        ("", "config_groups", {"W8A16": ["Linear"]}, r"config_groups.W8A16: found \['Linear'\]; expected an object"),
        (
            "",
            "config_groups",
            TWO,
            "found 8 bits, a scale for each channel in b and 4 bits, groups of 64 in a; expected",
        ),
        ("group", "input_activations", {"num_bits": 8}, "group_0.input_activations: found {.*}; expected null"),
        ("group", "weights", None, "group_0.weights: found None; expected an object"),
        ("weights", "num_bits", 3, "group_0.weights.num_bits: found 3; expected one of 8, 4"),
        ("weights", "num_bits", 2.5, "weights.num_bits: found 2.5; expected one of 8, 4"),
        ("weights", "type", "float", "weights.type: found 'float'; expected 'int'"),
        ("weights", "strategy", "block", "weights.strategy: found 'block'; expected one of 'channel', 'group'"),
        ("weights", "strategy", "channel", "weights.group_size: found 64; expected null with strategy 'channel'"),
        ("weights", "group_size", None, "weights.group_size: found None; expected how many inputs share a scale"),
        (
            "weights",
            "group_size",
            "64",
            "weights.group_size: found '64'; expected how many inputs share a scale, or -1",
        ),
        ("weights", "actorder", "group", "weights.actorder: found 'group'; expected null or 'weight'"),
        ("weights", "dynamic", True, "weights.dynamic: found True; expected false"),
        ("weights", "symmetric", "no", "weights.symmetric: found 'no'; expected true or false"),
    ],
)
def test_another_scheme_is_refused_by_its_field(where, field, value, message):
    with pytest.raises(
        ConfigError, match=rf"^quantization_config\..*{message.replace('.', '[.]').replace('[.]*', '.*')}"
    ):
        StoredQuantization.from_dict(changed(where, field, value))


def test_zero_points_of_8_bits_are_refused():
    with pytest.raises(ConfigError, match=r"weights\.symmetric: found False; expected true with 8 bits"):
        StoredQuantization.from_dict(StoredQuantization(8, 64, symmetric=False).to_dict([]))
