"""The partition of every parameter and of the cache on a mesh, and the bytes that each device holds of them.

For training, gradients and the optimizer's state take the place of the cache.

Read from the abstract model; no devices are needed. Activations and temporaries of programs are not in it:
`compile_for_topology` has them, from the compiled programs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from glm4v_jax.config.checks import CacheDtype
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import AXES, current_rules, names_of
from glm4v_jax.errors import ConfigError
from glm4v_jax.files import size_text
from glm4v_jax.planning.mesh_presets import sizes_for
from glm4v_jax.planning.parameter_layout import check_mesh, devices_along, mesh_text, parameter_layout

# Prefix of a parameter's path -> the part of the model that it belongs to; the first that fits counts.
_PARTS = {
    "language_model.embed_tokens.": "embedding",
    "language_model.layers.": "decoder layers",
    "language_model.": "last norm",
    "lm_head.": "head",
    "visual.merger.": "merger",
    "visual.": "ViT",
}
_FLOAT32 = 4
_STATE = {"gradients": ("of trained weights", 1), "optimizer state": ("moments of AdamW", 2)}
"""What training holds besides weights: part -> name, and how many arrays for each that is trained."""
_KV_AXES = ("layers", "batch", "kv_heads", "slots", "head_dim")
FROZEN = ("ViT",)
"""Parts that full fine-tuning does not train by default."""
COUNTS = (*range(1, 17), *(1 << power for power in range(5, 13)))
"""Numbers of devices to look for a mesh that holds a model."""
COLUMNS = ("part", "array", "shape", "split by", "in all", "a device")
"""Of `MemoryTable.table`."""


@dataclasses.dataclass(frozen=True)
class ArrayMemory:
    """An array, or several of the same shape and partition.

    part: of the model: "embedding", "decoder layers", "last norm", "head", "ViT", "merger"; or "gradients", "optimizer
      state", "cache".
    name: of a parameter its path below that of its part.
    count: number of arrays: one per layer, or keys and values.
    shape: of one of them.
    axes: the mesh axes that shard each dimension, joined with "+"; "-" where it is replicated.
    nbytes: of all of them.
    device_bytes: what one device holds of all of them.
    """

    part: str
    name: str
    count: int
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    nbytes: int
    device_bytes: int


@dataclasses.dataclass(frozen=True)
class MemoryTable:
    """What each device of a mesh holds; all of them hold the same number of bytes.

    sizes: axis -> devices.
    dtype: of weights and cache.
    rows, capacity: prompts in the cache, and slots of each, as requested.
    weights: in the order of the model.
    cache: keys and values; rows and slots are padded to what the mesh divides. Empty for training.
    memory: bytes that a device has, if that is known.
    training: gradients and the optimizer's state, for training.
    scheme: of quantised weights.
    cache_dtype: "int8" where the cache holds integers and their scales.
    """

    sizes: dict[str, int]
    dtype: str
    rows: int
    capacity: int
    weights: tuple[ArrayMemory, ...]
    cache: ArrayMemory
    memory: int | None
    training: tuple[ArrayMemory, ...] = ()
    scheme: str = "none"
    cache_dtype: CacheDtype = "auto"

    @property
    def precision(self) -> str:
        """The numbers that it is in, in words."""
        return self.dtype if self.scheme == "none" else f"{self.scheme} and {self.dtype}"

    @property
    def arrays(self) -> tuple[ArrayMemory, ...]:
        """Everything that a device holds."""
        return (*self.weights, *self.training, *([self.cache] if self.cache.nbytes else []))

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.sizes.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on a device."""
        return sum(held.device_bytes for held in self.weights)

    @property
    def device_bytes(self) -> int:
        """Bytes on a device."""
        return sum(held.device_bytes for held in self.arrays)

    @property
    def share(self) -> float | None:
        """Fraction of a device's memory that this takes; None if its memory is not known."""
        return None if self.memory is None else self.device_bytes / self.memory

    @property
    def fits(self) -> bool | None:
        """Whether a device has that much memory, temporaries apart; None if its memory is not known."""
        return None if self.memory is None else self.device_bytes <= self.memory

    def parts(self) -> dict[str, tuple[int, int]]:
        """Part -> total bytes, and bytes on a device."""
        totals: dict[str, tuple[int, int]] = {}
        for held in self.arrays:
            total, device = totals.get(held.part, (0, 0))
            totals[held.part] = total + held.nbytes, device + held.device_bytes
        return totals

    def table(self) -> list[tuple[str, ...]]:
        """Rows of `COLUMNS`: every part with its sums, followed by its arrays."""
        rows: list[tuple[str, ...]] = []
        for part, (total, device) in self.parts().items():
            rows.append((part, "", "", "", size_text(total), size_text(device)))
            for held in self.arrays:
                if held.part == part:
                    name = held.name if held.count == 1 else f"{held.name} x {held.count}"
                    partition = ("x".join(map(str, held.shape)), " ".join(held.axes))
                    rows.append(("", name, *partition, size_text(held.nbytes), size_text(held.device_bytes)))
        return rows

    def summary(self) -> str:
        """The mesh, and the bytes on a device, in a line."""
        share = "" if self.share is None or self.memory is None else f", {self.share:.1%} of {size_text(self.memory)}"
        together = f"together {size_text(self.device_bytes)}"
        if self.training:
            sizes = [f"{size_text(device)} of {part}" for part, (_, device) in self.parts().items() if part in _STATE]
            beside, together = " and ".join(sizes), f"{together} for full fine-tuning with AdamW"
        else:
            kind = "a cache" if self.cache_dtype == "auto" else f"a cache in {self.cache_dtype}"
            beside = f"{size_text(self.cache.device_bytes)} of {kind} of {self.rows} x {self.capacity} slots"
            together = f"{together} in {self.precision}"
        weights = f"a device holds {size_text(self.weight_bytes)} of weights"
        return f"mesh {mesh_text(self.sizes)}: {weights}{', ' if self.training else ' and '}{beside}, {together}{share}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("rows", "capacity", "num_devices", "weight_bytes", "device_bytes", "memory", "share", "fits")
        return {
            "mesh": self.sizes,
            "dtype": self.dtype,
            "cache_dtype": self.cache_dtype,
            "quantize": self.scheme,
            **{name: getattr(self, name) for name in names},
            "cache_bytes": self.cache.device_bytes,
            "parts": {
                part: {"nbytes": total, "device_bytes": device} for part, (total, device) in self.parts().items()
            },
            "arrays": [dataclasses.asdict(held) for held in self.arrays],
        }


def describe(
    config: Glm4vConfig,
    sizes: Mapping[str, int],
    *,
    rows: int = 1,
    capacity: int = 4096,
    dtype: str = "bfloat16",
    scheme: str = "none",
    cache_dtype: CacheDtype = "auto",
    memory: int | None = None,
    is_training: bool = False,
) -> MemoryTable:
    """Compute what each device of a mesh holds of a model, and of a cache for its prompts or of what trains it.

    Args:
      config: of the model.
      sizes: axis -> devices; axes left out have one.
      rows: prompts in the cache.
      capacity: slots of each.
      dtype: of weights and cache; for training, of the frozen weights.
      scheme: of quantised weights; training ignores it.
      cache_dtype: "int8" for a cache of integers with their scales.
      memory: bytes that a device has, if that is known.
      is_training: count full fine-tuning with AdamW as `glm4v train` does it, all of it in float32, instead of a cache.

    Raises:
      ConfigError: the model or the groups of its integers do not divide by the mesh, or a number is below 1.
    """
    for name, number in (("rows", rows), ("capacity", capacity)):
        if number < 1:
            raise ConfigError(f"{name}: found {number}; expected at least 1")
    all_axes = dict.fromkeys(AXES, 1) | dict(sizes)
    scheme = "none" if is_training else scheme
    check_mesh(config, all_axes, scheme)
    itemsize = jnp.dtype(dtype).itemsize
    weights, trained, trained_on_device = [], 0, 0
    for leaf in parameter_layout(config, scheme):
        prefix, part = next((prefix, part) for prefix, part in _PARTS.items() if leaf.path.startswith(prefix))
        name = leaf.path.removeprefix(prefix)
        size = _FLOAT32 if is_training and part not in FROZEN else itemsize
        bits = 8 * size if leaf.bits is None else leaf.bits
        nbytes, device_bytes = bits * leaf.parameters // 8, bits * leaf.device_parameters(all_axes) // 8
        if part not in FROZEN:
            trained, trained_on_device = trained + nbytes, trained_on_device + device_bytes
        weights.append(
            ArrayMemory(part, name, leaf.count, leaf.shape, _axes_texts(leaf.axes, all_axes), nbytes, device_bytes)
        )
    held = dtype if cache_dtype == "auto" else cache_dtype
    cache = _cache(config, all_axes, 0 if is_training else rows, capacity, held)
    training = tuple(
        ArrayMemory(part, name, count, (), (), count * trained, count * trained_on_device)
        for part, (name, count) in _STATE.items()
        if is_training
    )
    return MemoryTable(
        all_axes, str(dtype), rows, capacity, tuple(weights), cache, memory, training, scheme, cache_dtype
    )


def smallest_fit(config: Glm4vConfig, preset: str, memory: int, **options: Any) -> MemoryTable | None:
    """Find the fewest devices of `memory` bytes that hold a model by a preset; None if no number of `COUNTS` does.

    `options` are those of `describe`.
    """
    for number in COUNTS:
        sizes = sizes_for(f"{preset}:{number}", config, memory=memory, scheme=options.get("scheme", "none"))
        found = describe(config, sizes, memory=memory, **options)
        if found.fits:
            return found
    return None


def _cache(config: Glm4vConfig, sizes: Mapping[str, int], rows: int, capacity: int, dtype: str) -> ArrayMemory:
    """Keys and values, as `KVCache` has them: [N, B, K, S, H], the scales of integers included."""
    text = config.text_config
    assert text.num_key_value_heads is not None
    rules = current_rules()
    axes = tuple(names_of(rules[name]) for name in _KV_AXES)
    wanted = (text.num_hidden_layers, rows, text.num_key_value_heads, capacity, text.head_dim)
    along = [devices_along(names, sizes) for names in axes]
    shape = tuple(-(-size // shards) * shards for size, shards in zip(wanted, along, strict=True))
    slot = shape[-1] * jnp.dtype(dtype).itemsize + (_FLOAT32 if dtype == "int8" else 0)
    nbytes = 2 * slot * math.prod(shape[:-1])
    name = "keys and values, with scales" if dtype == "int8" else "keys and values"
    return ArrayMemory("cache", name, 2, shape, _axes_texts(axes, sizes), nbytes, nbytes // math.prod(along))


def cache_bytes(config: Glm4vConfig, sizes: Mapping[str, int], rows: int, capacity: int, dtype: str) -> int:
    """Return the bytes of a KV cache that a device of a mesh holds, of floats or of int8; see `describe`."""
    all_axes = dict.fromkeys(AXES, 1) | dict(sizes)
    return _cache(config, all_axes, rows, capacity, dtype).device_bytes


def _axes_texts(axes: Sequence[tuple[str, ...]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple("+".join(name for name in names if sizes[name] > 1) or "-" for names in axes)
