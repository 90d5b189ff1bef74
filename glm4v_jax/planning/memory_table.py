"""Who holds what on a mesh: the partition of every parameter and of the cache, and bytes for a device.

Read from the abstract model; no devices are needed. What programs need besides, activations and temporaries, is not in
it (`bench.aot` has that, from the compiled programs).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import AXES, RULES, names_of
from glm4v_jax.errors import ConfigError
from glm4v_jax.files import size_text
from glm4v_jax.planning.parameter_layout import check_mesh, devices_along, mesh_text, parameter_layout

# How a parameter's path begins -> the part of the model that it belongs to; the first that fits.
_PARTS = {
    "language_model.embed_tokens.": "embedding",
    "language_model.layers.": "decoder layers",
    "language_model.": "last norm",
    "lm_head.": "head",
    "visual.merger.": "merger",
    "visual.": "ViT",
}
_KV_AXES = ("layers", "batch", "kv_heads", "slots", "head_dim")
COLUMNS = ("part", "array", "shape", "split by", "in all", "a device")
"""Of `Description.table`."""


@dataclasses.dataclass(frozen=True)
class Held:
    """An array, or several that are equal but for what is in them.

    part: of the model: "embedding", "decoder layers", "last norm", "head", "ViT", "merger"; or "cache".
    name: of a parameter its path behind that of its part.
    count: how many there are: one a layer, or keys and values.
    shape: of one of them.
    axes: the mesh axes that split each dimension, joined with "+"; "-" where every device has all of it.
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
class Description:
    """What the devices of a mesh hold; they all hold as much.

    sizes: axis -> devices.
    dtype: of weights and cache.
    rows, capacity: prompts in the cache, and slots for each, as they were asked for.
    weights: in the order of the model.
    cache: keys and values; rows and slots are padded to what the mesh divides.
    memory: bytes that a device has, if that is known.
    """

    sizes: dict[str, int]
    dtype: str
    rows: int
    capacity: int
    weights: tuple[Held, ...]
    cache: Held
    memory: int | None

    @property
    def num_devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.sizes.values())

    @property
    def weight_bytes(self) -> int:
        """What one device holds of the weights."""
        return sum(held.device_bytes for held in self.weights)

    @property
    def device_bytes(self) -> int:
        """What one device holds of weights and cache."""
        return self.weight_bytes + self.cache.device_bytes

    @property
    def share(self) -> float | None:
        """Of a device's memory, for weights and cache."""
        return None if self.memory is None else self.device_bytes / self.memory

    def parts(self) -> dict[str, tuple[int, int]]:
        """Part of the model, and "cache" -> bytes in all, and for a device."""
        totals: dict[str, tuple[int, int]] = {}
        for held in (*self.weights, self.cache):
            whole, device = totals.get(held.part, (0, 0))
            totals[held.part] = whole + held.nbytes, device + held.device_bytes
        return totals

    def table(self) -> list[tuple[str, ...]]:
        """Rows of `COLUMNS`: every part with its sums, and below it its arrays."""
        rows: list[tuple[str, ...]] = []
        for part, (whole, device) in self.parts().items():
            rows.append((part, "", "", "", size_text(whole), size_text(device)))
            for held in (*self.weights, self.cache):
                if held.part == part:
                    name = held.name if held.count == 1 else f"{held.name} x {held.count}"
                    partition = ("x".join(map(str, held.shape)), " ".join(held.axes))
                    rows.append(("", name, *partition, size_text(held.nbytes), size_text(held.device_bytes)))
        return rows

    def summary(self) -> str:
        """The mesh, and what a device of it holds, in a line."""
        share = "" if self.share is None or self.memory is None else f", {self.share:.1%} of {size_text(self.memory)}"
        return (
            f"mesh {mesh_text(self.sizes)}: a device holds {size_text(self.weight_bytes)} of weights and "
            f"{size_text(self.cache.device_bytes)} of a cache of {self.rows} x {self.capacity} slots, together "
            f"{size_text(self.device_bytes)} in {self.dtype}{share}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("dtype", "rows", "capacity", "num_devices", "weight_bytes", "device_bytes", "memory", "share")
        return {
            "mesh": self.sizes,
            **{name: getattr(self, name) for name in names},
            "cache_bytes": self.cache.device_bytes,
            "parts": {
                part: {"nbytes": whole, "device_bytes": device} for part, (whole, device) in self.parts().items()
            },
            "arrays": [dataclasses.asdict(held) for held in (*self.weights, self.cache)],
        }

    def __str__(self) -> str:
        table = [COLUMNS, *self.table()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for row in table:
            texts = (cell.ljust(width) for cell, width in zip(row[:-2], widths[:-2], strict=True))
            numbers = (cell.rjust(width) for cell, width in zip(row[-2:], widths[-2:], strict=True))
            lines.append("  ".join([*texts, *numbers]).rstrip())
        return "\n".join([*lines, self.summary()])


def describe(
    config: Glm4vConfig,
    sizes: Mapping[str, int],
    *,
    rows: int = 1,
    capacity: int = 4096,
    dtype: str = "bfloat16",
    memory: int | None = None,
) -> Description:
    """What each device of a mesh holds of a model and of a cache for its prompts.

    Args:
      config: of the model.
      sizes: axis -> devices; axes left out have one.
      rows: prompts in the cache.
      capacity: slots of each.
      dtype: of weights and cache.
      memory: bytes that a device has, if that is known.

    Raises:
      ConfigError: the model does not divide by the mesh, or a number is none.
    """
    for name, number in (("rows", rows), ("capacity", capacity)):
        if number < 1:
            raise ConfigError(f"{name}: found {number}, expected at least 1")
    whole = dict.fromkeys(AXES, 1) | dict(sizes)
    check_mesh(config, whole)
    itemsize = jnp.dtype(dtype).itemsize
    weights = []
    for leaf in parameter_layout(config):
        prefix, part = next((prefix, part) for prefix, part in _PARTS.items() if leaf.path.startswith(prefix))
        name = leaf.path.removeprefix(prefix)
        nbytes, device_bytes = itemsize * leaf.parameters, itemsize * leaf.device_parameters(whole)
        weights.append(Held(part, name, leaf.count, leaf.shape, _axes_texts(leaf.axes, whole), nbytes, device_bytes))
    cache = _cache(config, whole, rows, capacity, itemsize)
    return Description(whole, str(dtype), rows, capacity, tuple(weights), cache, memory)


def _cache(config: Glm4vConfig, sizes: Mapping[str, int], rows: int, capacity: int, itemsize: int) -> Held:
    """Keys and values, as `KVCache` has them: [N, B, K, S, H]."""
    text = config.text_config
    assert text.num_key_value_heads is not None
    axes = tuple(names_of(RULES[name]) for name in _KV_AXES)
    wanted = (text.num_hidden_layers, rows, text.num_key_value_heads, capacity, text.head_dim)
    along = [devices_along(names, sizes) for names in axes]
    shape = tuple(-(-size // shards) * shards for size, shards in zip(wanted, along, strict=True))
    nbytes = 2 * itemsize * math.prod(shape)
    return Held("cache", "keys and values", 2, shape, _axes_texts(axes, sizes), nbytes, nbytes // math.prod(along))


def _axes_texts(axes: Sequence[tuple[str, ...]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple("+".join(name for name in names if sizes[name] > 1) or "-" for names in axes)
