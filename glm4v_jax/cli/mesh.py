"""`glm4v mesh`: how a mesh splits a model over devices, and what each of them holds."""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from glm4v_jax.config.checks import CacheDtype, Positive, PositiveNumber
from glm4v_jax.config.members import DEFAULT, find_member
from glm4v_jax.config.quantization import Scheme
from glm4v_jax.console.options import find_model
from glm4v_jax.console.program import JsonOptions
from glm4v_jax.console.table import print_table
from glm4v_jax.devices.hardware import GIB, device_memory
from glm4v_jax.errors import ConfigError, counted
from glm4v_jax.planning.mesh_presets import PRESETS, check_text, parse_mesh, parse_preset

if TYPE_CHECKING:
    from glm4v_jax.config.model import Glm4vConfig
    from glm4v_jax.planning.memory_table import MemoryTable


@dataclasses.dataclass(kw_only=True)
class Mesh(JsonOptions):
    """Show how a mesh splits a model over devices, and the memory that each needs.

    Without a mesh, compare all presets. What does not fit gets the smallest mesh that does; temporaries of programs are
    not counted.

    The devices need not exist, and no weights are read.
    """

    # A tuple: several words are refused with a better message than a parser's.
    mesh: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PRESET|AXES]", help_behavior_hint="")
    ] = ()
    """A preset, or axes as fsdp=4,kv=2; without it, compare all presets."""

    devices: Annotated[
        Positive | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: those of this machine)")
    ] = None
    """Number of devices for a preset."""

    memory: Annotated[
        PositiveNumber | None,
        tyro.conf.arg(metavar="GIB", help_behavior_hint="(default: that of the devices of this machine)"),
    ] = None
    """Memory of a device, in GiB."""

    model: Annotated[str, tyro.conf.arg(metavar="DIR|NAME")] = DEFAULT
    """Checkpoint, or the name of a released one, as GLM-OCR, which need not be there."""

    train: bool = False
    """Count gradients and optimizer state of full fine-tuning with AdamW instead of a KV cache, as for the preset
    train."""

    rows: Annotated[Positive, tyro.conf.arg(metavar="N")] = 1
    """Number of sequences in the KV cache."""

    capacity: Annotated[Positive, tyro.conf.arg(metavar="N")] = 4096
    """Tokens per sequence, prompt and answer."""

    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Data type of weights and cache."""

    quantize: Scheme = "none"
    """Weights as integers, for inference."""

    cache_dtype: CacheDtype = "auto"
    """Data type of the KV cache; auto is that of the weights."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object, sizes in bytes."""

    def run(self) -> None:
        """Check the options, compute, and print tables."""
        self._check()
        from glm4v_jax.config.model import Glm4vConfig

        if member := find_member(self.model):
            config = member.config()
        else:
            config = Glm4vConfig.from_pretrained(self.model)
            self._count_stored()
        memory = self._memory()
        if self.mesh:
            found = self._describe(self.mesh[0], config, memory)
            if self.as_json:
                print(json.dumps(self._fields(self.mesh[0], found, config)))
                return
            _print_description(found)
            self._print_smallest({self.mesh[0]: found}, config)
            return
        presets = {name: self._describe(name, config, memory) for name in PRESETS}
        if self.as_json:
            print(json.dumps({name: self._fields(name, found, config) for name, found in presets.items()}))
            return
        _print_presets(presets)
        self._print_smallest(presets, config)

    def _count_stored(self) -> None:
        """Count the integers of a checkpoint that has some.

        Raises:
          ConfigError: --quantize is another scheme.
        """
        from glm4v_jax.checkpoints.plan import check_scheme
        from glm4v_jax.config.quantization import stored_quantization

        stored = stored_quantization(self.model)
        if stored is None:
            return
        if self.quantize != "none":
            check_scheme(self.quantize, stored)
            return
        self.quantize = stored.dtype
        print(
            f"{self.model} is quantised ({stored}): counted as with --quantize {stored.dtype}; "
            "`glm4v convert inspect` counts what it has in floats as well",
            file=sys.stderr,
        )

    def _fields(self, text: str, found: "MemoryTable", config: "Glm4vConfig") -> dict[str, Any]:
        """What is known of a mesh, as JSON has it; of one that does not fit, with the smallest that does."""
        if found.fits is not False:
            return found.to_dict()
        smallest = self._smallest(text, found, config)
        names = ("mesh", "num_devices", "device_bytes", "share")
        fields = None if smallest is None else {name: smallest.to_dict()[name] for name in names}
        return {**found.to_dict(), "smallest": fields}

    def _print_smallest(self, meshes: "Mapping[str, MemoryTable]", config: "Glm4vConfig") -> None:
        from glm4v_jax.files import size_text
        from glm4v_jax.planning.parameter_layout import mesh_text

        for text, found in meshes.items():
            if found.fits is not False:
                continue
            smallest = self._smallest(text, found, config)
            if smallest is None:
                print(f"{text} does not fit, and no mesh of such devices does")
                continue
            print(
                f"{text} does not fit; the smallest mesh that does has {counted(smallest.num_devices, 'such device')}: "
                f"{mesh_text(smallest.sizes)}, {size_text(smallest.device_bytes)} a device"
            )

    def _smallest(self, text: str, found: "MemoryTable", config: "Glm4vConfig") -> "MemoryTable | None":
        """The smallest mesh that fits by the same preset; in the place of axes, by that for the purpose."""
        from glm4v_jax.planning.memory_table import smallest_fit

        preset = parse_preset(text)
        name = preset[0].name if preset is not None else "train" if self.train else "latency"
        assert found.memory is not None
        return smallest_fit(config, name, found.memory, **self._counted(text))

    def _counted(self, text: str) -> dict[str, Any]:
        """Options of `describe` for a mesh."""
        preset = parse_preset(text)
        is_training = self.train or (preset is not None and preset[0].name == "train")
        return {
            "rows": self.rows,
            "capacity": self.capacity,
            "dtype": self.dtype,
            "cache_dtype": self.cache_dtype,
            "scheme": self.quantize,
            "is_training": is_training,
        }

    def _check(self) -> None:
        """Check what needs no JAX.

        Raises:
          CheckpointError, ConfigError: there is no such model or mesh.
        """
        if len(self.mesh) > 1:
            raise ConfigError(f"PRESET|AXES: found {len(self.mesh)}; expected at most one, as in fsdp=4,kv=2")
        if self.train and self.quantize != "none":
            raise ConfigError(
                f"--quantize: found {self.quantize} with --train; expected none: integers are not trained"
            )
        if find_member(self.model) is None:
            self.model = find_model(self.model)
        if self.mesh:
            check_text(self.mesh[0])
            if self.devices is not None and (asked := _devices_in(self.mesh[0])) not in (None, self.devices):
                raise ConfigError(f"--devices: found {self.devices}, and a mesh of {asked}; expected one of the two")

    def _memory(self) -> int | None:
        """Bytes of memory of a device; None if the device is not here and the user did not say."""
        if self.memory is not None:
            return int(self.memory * GIB)
        if self.devices is not None:
            return None
        import jax

        return device_memory(jax.local_devices()[0])

    def _describe(self, text: str, config: "Glm4vConfig", memory: int | None) -> "MemoryTable":
        from glm4v_jax.planning.memory_table import describe
        from glm4v_jax.planning.mesh_presets import sizes_for

        number = self.devices
        if number is None and _devices_in(text) is None:
            import jax

            number = jax.device_count()
        sizes = sizes_for(text, config, number, memory, scheme=self.quantize)
        return describe(config, sizes, memory=memory, **self._counted(text))


def _devices_in(text: str) -> int | None:
    """The number of devices that a text itself asks for."""
    if (found := parse_preset(text)) is not None:
        return found[1]
    return math.prod(parse_mesh(text).values())


def _print_description(found: "MemoryTable") -> None:
    from glm4v_jax.planning.memory_table import COLUMNS

    rows = found.table()
    # A row with a first cell sums up those below it.
    print_table(COLUMNS, rows, right=("in all", "a device"), bold=[number for number, row in enumerate(rows) if row[0]])
    print(found.summary())


def _print_presets(presets: dict[str, "MemoryTable"]) -> None:
    from glm4v_jax.files import size_text
    from glm4v_jax.planning.parameter_layout import mesh_text

    numeric = ("weights per device", "besides", "of its memory")
    rows = []
    for name, found in presets.items():
        sizes = size_text(found.weight_bytes), size_text(found.device_bytes - found.weight_bytes)
        share = "unknown" if found.share is None else f"{found.share:.1%}"
        rows.append((name, mesh_text(found.sizes), *sizes, share, PRESETS[name].description))
    print_table(("preset", "mesh", *numeric, "for"), rows, right=numeric)
    first = next(iter(presets.values()))
    kind = "a cache" if first.cache_dtype == "auto" else f"a cache in {first.cache_dtype}"
    cache = f"{kind} of {first.rows} x {first.capacity} tokens"
    beside = "gradients and optimizer state" if first.training else f"{cache}, for train gradients and optimizer state"
    print(f"{counted(first.num_devices, 'device')}, {first.precision}; besides weights: {beside}")
