"""The table of chips."""

from types import SimpleNamespace

import pytest

from glm4v_jax.devices.hardware import GIB, chip_of, device_memory, peak_flops


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("TPU v2", None),
        ("cpu", None),
    ],
)
def test_the_longest_prefix_gives_peak_flops(kind, expected):
    assert peak_flops(kind) == expected


@pytest.mark.parametrize(
    ("kind", "gigabytes"),
    [
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA A100-PCIE-40GB", 1555),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H100 NVL", 3900),
    ],
)
def test_boards_of_a_chip_have_bandwidths_of_their_own(kind, gigabytes):
    chip = chip_of(kind)
    assert chip is not None and chip.bandwidth == gigabytes * 1e9


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
        ("NVIDIA H100 NVL", "gpu", None, 94 * GIB),
        ("NVIDIA L40S", "gpu", None, 48 * GIB),
        ("something else", "gpu", None, None),
    ],
)
def test_a_device_reports_its_memory_or_the_table_has_it(kind, platform, reported, expected):
    device = SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: reported)
    assert device_memory(device) == expected
