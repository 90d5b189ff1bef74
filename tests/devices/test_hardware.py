"""The table of chips."""

from types import SimpleNamespace

import pytest

from glm4v_jax.devices.hardware import GIB, device_memory, peak_flops


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("TPU v2", None),
        ("cpu", None),
    ],
)
def test_the_longest_prefix_gives_peak_flops(kind, expected):
    assert peak_flops(kind) == expected


@pytest.mark.parametrize(
    ("kind", "platform", "reported", "expected"),
    [
        ("cpu", "cpu", {"bytes_limit": 7}, None),
        ("TPU v5 lite", "tpu", {"bytes_limit": 17_066_622_976}, 17_066_622_976),
        ("TPU v5 lite", "tpu", None, 16 * GIB),
        ("TPU v5p", "tpu", {}, 95 * GIB),
        ("TPU v5", "tpu", None, 95 * GIB),
        ("TPU v6 lite", "tpu", None, 32 * GIB),
        ("NVIDIA H100 80GB HBM3", "gpu", None, 80 * GIB),
        ("NVIDIA A100-SXM4-40GB", "gpu", None, 40 * GIB),
        ("NVIDIA A100-SXM4-80GB", "gpu", None, 80 * GIB),
        ("NVIDIA L40S", "gpu", None, 48 * GIB),
        ("something else", "gpu", None, None),
    ],
)
def test_a_device_reports_its_memory_or_the_table_has_it(kind, platform, reported, expected):
    device = SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: reported)
    assert device_memory(device) == expected
