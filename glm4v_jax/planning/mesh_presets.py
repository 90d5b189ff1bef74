"""Meshes by purpose: how many devices go to which axis for a model, and the texts that name a mesh.

A text is the name of a preset ("latency"; "latency:8" for eight devices), or axes ("fsdp=4,kv=2"). What the model's
dimensions allow is read from its abstract parameters (`parameter_layout`), so that every preset divides.
"""

import dataclasses
import functools
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from glm4v_jax.config.checks import did_you_mean
from glm4v_jax.devices.hardware import device_memory
from glm4v_jax.errors import ConfigError

# JAX is imported where it is needed: the command line's help wants the names of presets at once.
if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from glm4v_jax.config.model import Glm4vConfig

MAX_DEVICES = 1 << 20
"""More than any machine has; beyond it, the arithmetic of shardings overflows."""
MAX_FSDP = 64
"""Beyond it a shard is so small that gathering it is bound by latency."""
WEIGHTS_SHARE = 0.5
"""Fraction of a device's memory for the weights of a replica; the rest is for caches, which give throughput."""

_BFLOAT16_BITS = 16
Sizes = dict[str, int]
Choose = Callable[["Glm4vConfig", int, int | None, str], Sizes]


@dataclasses.dataclass(frozen=True)
class MeshPreset:
    """A way to distribute devices over the axes of a mesh.

    name: in texts.
    description: what it is for and does, in a sentence.
    choose: (configuration, number of devices, bytes of memory of a device or None, scheme of quantised weights) ->
      axis -> devices; all devices are used, and every parameter divides.
    """

    name: str
    description: str
    choose: Choose


def parse_mesh(text: str) -> Sizes:
    """Parse axes such as "fsdp=4,kv=2": axis -> devices; other axes have one.

    Raises:
      ConfigError: an axis is unknown or named twice, its number is invalid, or there are too many devices.
    """
    from glm4v_jax.devices.mesh import AXES

    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, number = (side.strip() for side in part.partition("="))
        if axis not in AXES or axis in seen or not re.fullmatch(r"[1-9]\d{0,18}", number):
            near = did_you_mean(axis, AXES) if axis not in AXES else ""
            raise ConfigError(
                f"mesh: found {part!r} in {text!r}; expected some of {', '.join(AXES)}, each once "
                f"and with a number of devices, as in fsdp=4,kv=2{near}"
            )
        seen.add(axis)
        sizes[axis] = int(number)
    if (count := math.prod(sizes.values())) > MAX_DEVICES:
        raise ConfigError(f"mesh: found {count:,} devices in {text!r}; expected at most {MAX_DEVICES:,}")
    return sizes


def parse_preset(text: str) -> tuple[MeshPreset, int | None] | None:
    """Parse a preset and, after a colon, its number of devices; None if the text has axes.

    Raises:
      ConfigError: there is no such preset, or the number is invalid.
    """
    if "=" in text or not text.strip(" ,"):
        return None
    name, colon, number = (side.strip() for side in text.partition(":"))
    if name not in PRESETS:
        raise ConfigError(
            f"mesh: found {text!r}; expected one of the presets {', '.join(PRESETS)}, or axes as in fsdp=4,kv=2"
            f"{did_you_mean(name, PRESETS)}"
        )
    if colon and not re.fullmatch(r"[1-9]\d{0,6}", number):
        raise ConfigError(f"mesh: found {number!r} devices in {text!r}; expected a number above 0, as in {name}:8")
    return PRESETS[name], int(number) if colon else None


def check_text(text: str) -> None:
    """Check that a text names a mesh, whatever the model and the devices are.

    Raises:
      ConfigError: it has an unknown preset or axis, or an invalid number.
    """
    if parse_preset(text) is None:
        parse_mesh(text)


def sizes_for(
    text: str,
    config: "Glm4vConfig",
    num_devices: int | None = None,
    memory: int | None = None,
    *,
    scheme: str = "none",
) -> Sizes:
    """Compute the sizes of the mesh that a text names, axis -> devices, all axes; no devices are needed.

    Args:
      text: a preset's name, one with a number of devices as in "latency:8", or axes as in "fsdp=4,kv=2".
      config: of the model.
      num_devices: for a preset whose text has no number.
      memory: bytes that a device has, if that is known.
      scheme: of quantised weights.

    Raises:
      ConfigError: there is no such preset or axis, the number of devices is invalid, or the model does not divide.
    """
    from glm4v_jax.planning.parameter_layout import check_mesh

    if (found := parse_preset(text)) is None:
        sizes = parse_mesh(text)
    else:
        preset, written = found
        number = num_devices if written is None else written
        if number is None:
            raise ConfigError(f"mesh {preset.name}: found no number of devices; expected one, as in {preset.name}:8")
        if not 1 <= number <= MAX_DEVICES:
            raise ConfigError(f"mesh {preset.name}: found {number:,} devices; expected from 1 to {MAX_DEVICES:,}")
        sizes = preset.choose(config, number, memory, scheme)
    check_mesh(config, sizes, scheme)
    return sizes


def mesh_for(
    text: str, config: "Glm4vConfig", *, scheme: str = "none", devices: "Sequence[jax.Device] | None" = None
) -> "Mesh":
    """Make the mesh that a text names (see `sizes_for`), of the devices here; a preset takes all of them.

    ConfigError as there; or if there are fewer devices than that.
    """
    import jax

    from glm4v_jax.devices.mesh import make_mesh

    devices = list(devices) if devices is not None else jax.devices()
    # Devices of other processes do not report their memory.
    ours = [device for device in devices if device.process_index == jax.process_index()]
    memory = device_memory(ours[0]) if ours else None
    return make_mesh(**sizes_for(text, config, len(devices), memory, scheme=scheme), devices=devices)


def _latency(config: "Glm4vConfig", num_devices: int, memory: int | None, scheme: str, *, rest: str = "q") -> Sizes:
    """As many devices on the tensor axes as the model divides by: first kv, then `rest`; the others on data."""
    sizes = _largest("kv", {}, config, num_devices, scheme)
    sizes = _largest(rest, sizes, config, num_devices, scheme)
    return _with_rest(sizes, num_devices)


def _throughput(config: "Glm4vConfig", num_devices: int, memory: int | None, scheme: str) -> Sizes:
    """As few tensor devices as hold the weights; the most there can be if that is too few."""
    from glm4v_jax.planning.parameter_layout import parameter_layout

    if memory is None:
        return _with_rest(_largest("kv", {}, config, num_devices, scheme), num_devices)
    layout = parameter_layout(config, scheme)
    most = _latency(config, num_devices, memory, scheme)
    for tensor in _divisors(most["kv"] * most["q"]):
        sizes = _latency(config, tensor, memory, scheme)
        held = sum((leaf.bits or _BFLOAT16_BITS) * leaf.device_parameters(sizes) for leaf in layout) // 8
        if sizes["data"] == 1 and held <= WEIGHTS_SHARE * memory:
            return sizes | {"data": num_devices // tensor}
    return most


def _train(config: "Glm4vConfig", num_devices: int, memory: int | None, scheme: str) -> Sizes:
    """As many devices on fsdp as still pay; the others on data."""
    return _with_rest(_largest("fsdp", {}, config, num_devices, scheme, at_most=MAX_FSDP), num_devices)


PRESETS: Mapping[str, MeshPreset] = types.MappingProxyType(
    {
        preset.name: preset
        for preset in (
            MeshPreset(
                "latency",
                "Lowest latency for few prompts: every device holds a shard of each layer (axes kv and q).",
                _latency,
            ),
            MeshPreset(
                "throughput",
                "Highest throughput for many prompts: as few devices per replica as hold the weights in half of their "
                "memory, and as many replicas as there are devices for (axis data).",
                _throughput,
            ),
            MeshPreset(
                "train",
                "Training: weights, gradients and optimizer state are sharded over the devices that share the batch "
                "(axis fsdp).",
                _train,
            ),
            MeshPreset(
                "long-context",
                "Long prompts: as latency, and the slots of the cache are sharded too (axes kv and seq).",
                functools.partial(_latency, rest="seq"),
            ),
        )
    }
)


def _largest(
    axis: str, sizes: Sizes, config: "Glm4vConfig", num_devices: int, scheme: str, *, at_most: int | None = None
) -> Sizes:
    """`sizes`, with as many of the remaining devices along another axis as the model divides by."""
    from glm4v_jax.devices.mesh import AXES
    from glm4v_jax.planning.parameter_layout import misfits

    every = dict.fromkeys(AXES, 1) | sizes
    left = num_devices // math.prod(every.values())
    fitting = (every | {axis: size} for size in reversed(_divisors(left)) if at_most is None or size <= at_most)
    return next(sizes for sizes in fitting if not misfits(config, sizes, scheme))


def _with_rest(sizes: Sizes, num_devices: int) -> Sizes:
    """`sizes`, with the remaining devices along data."""
    return sizes | {"data": num_devices // math.prod(sizes.values())}


def _divisors(number: int) -> list[int]:
    """In ascending order."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]
