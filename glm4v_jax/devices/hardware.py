"""One table of chips: memory, arithmetic and bandwidth, as published.

>>> chip_of("TPU v5 lite").hbm
17179869184
>>> chip_of("cpu") is None
True
"""

import dataclasses
import os
import re
from typing import TYPE_CHECKING

from glm4v_jax.errors import ConfigError

if TYPE_CHECKING:
    import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip has; 0 where no figure is known here.

    Attributes:
      kinds: the beginning of `jax.Device.device_kind`, in whole words.
      generation: how libtpu names it in a slice, such as "v5e" in "v5e:2x4".
      hbm: bytes of memory of a device.
      flops: bfloat16 operations per second of a device, dense.
      bandwidth: bytes per second from memory.
      links: bytes per second over all links to other chips.
      available: bytes of its memory that programs may use, by what the compiler says when it refuses one; all of it
        where that is not known.
      clock: cycles per second of a core: `flops` by those of a cycle, of 4 matrix units of 128 x 128 in a v5e, 8 of
        them in a v5p, and 4 of 256 x 256 in a v6e.
    """

    kinds: tuple[str, ...]
    generation: str = ""
    hbm: int = 0
    flops: float = 0.0
    bandwidth: float = 0.0
    links: float = 0.0
    available: int = 0
    clock: float = 0.0

    def __post_init__(self) -> None:
        if not self.available:
            object.__setattr__(self, "available", self.hbm)


# cloud.google.com/tpu/docs/system-architecture-tpu-vm and its pages v4, v5e, v5p, v6e; NVIDIA's data sheets.
CHIPS = (
    Chip(("TPU v2",), "v2", 8 * GIB),
    Chip(("TPU v3",), "v3", 16 * GIB),
    Chip(("TPU v4",), "v4", 32 * GIB, 275e12),
    Chip(("TPU v5 lite", "TPU v5e"), "v5e", 16 * GIB, 197e12, 819e9, 200e9, 63 * GIB // 4, 1.5e9),
    Chip(("TPU v6", "TPU v6e"), "v6e", 32 * GIB, 918e12, 1640e9, 448e9, 125 * GIB // 4, 1.75e9),
    Chip(("TPU v5", "TPU v5p"), "v5p", 95 * GIB, 459e12, 2765e9, 600e9, clock=1.75e9),
    Chip(("NVIDIA A100",), hbm=80 * GIB, flops=312e12, bandwidth=2039e9),
    Chip(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), hbm=40 * GIB, flops=312e12, bandwidth=1555e9),
    Chip(("NVIDIA A100 80GB PCIe",), hbm=80 * GIB, flops=312e12, bandwidth=1935e9),
    Chip(("NVIDIA H100",), hbm=80 * GIB, flops=989e12, bandwidth=3350e9),
    Chip(("NVIDIA H100 PCIe",), hbm=80 * GIB, flops=756e12, bandwidth=2000e9),
    Chip(("NVIDIA H100 NVL",), hbm=94 * GIB, flops=835e12, bandwidth=3900e9),
    Chip(("NVIDIA H200",), hbm=141 * GIB, flops=989e12, bandwidth=4800e9),
    Chip(("NVIDIA H200 NVL",), hbm=141 * GIB, flops=835e12, bandwidth=4800e9),
    Chip(("NVIDIA GH200",), flops=989e12),
    Chip(("NVIDIA B200",), flops=2250e12),
    Chip(("NVIDIA L4",), hbm=24 * GIB, flops=121e12, bandwidth=300e9),
    Chip(("NVIDIA L40S",), hbm=48 * GIB, flops=362e12, bandwidth=864e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose name fits a `device_kind` best; None if it is not in the table, as of a CPU.

    >>> chip_of("NVIDIA L40") is None  # not an L4
    True
    """
    fitting = [
        (len(kind), chip) for chip in CHIPS for kind in chip.kinds if re.match(rf"{re.escape(kind)}(?!\w)", device_kind)
    ]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 operations per second of a device; None if that is not known."""
    chip = chip_of(device_kind)
    return chip.flops or None if chip else None


def missing_device() -> str | None:
    """Why JAX finds no device, in a line; None if it finds one."""
    try:
        import jax

        jax.local_devices()
    except Exception as error:  # of a driver, of a plug-in, or of importing either; some say nothing
        platforms = os.environ.get("JAX_PLATFORMS")
        asked = f"of $JAX_PLATFORMS, {platforms}" if platforms else "at all"
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"JAX: found no device {asked} ({reason}); expected at least one"
    return None


def check_32_bits() -> None:
    """Check that JAX's integers have 32 bits, which the cache and sampling rely on; ConfigError if they have 64."""
    import jax

    if jax.config.jax_enable_x64:
        raise ConfigError("JAX: found 64 bits (jax_enable_x64, $JAX_ENABLE_X64); expected 32: switch them off")


def device_memory(device: "jax.Device") -> int | None:
    """Bytes that a device has for arrays: what it reports itself, else the table; None for a CPU."""
    if device.platform == "cpu":
        return None
    if reported := (device.memory_stats() or {}).get("bytes_limit"):
        return int(reported)
    chip = chip_of(device.device_kind)
    return chip.hbm or None if chip else None
