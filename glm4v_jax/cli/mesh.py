"""`glm4v mesh`: how a model would lie on so many devices, and what each of them would hold."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import rich.console
import rich.markup
import rich.table
import tyro

from glm4v_jax.console.console import check_model
from glm4v_jax.devices.hardware import GIB, device_memory
from glm4v_jax.errors import ConfigError
from glm4v_jax.planning.mesh_presets import PRESETS, check_text, parse_mesh, parse_preset

if TYPE_CHECKING:
    from glm4v_jax.config.model import Glm4vConfig
    from glm4v_jax.planning.memory_table import Description

RELEASED = "9b"
"""What `--model` calls the released model, of which no file is needed."""
_WIDTH = 160
"""Of tables where there is no terminal."""


@dataclasses.dataclass(kw_only=True)
class Mesh:
    """Show how a mesh splits a model: what each device holds of weights and cache, and the presets to choose from.

    The devices need not exist, and no weights are read.
    """

    # Several words are taken, and refused with better words than a parser's.
    mesh: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PRESET|AXES]", help_behavior_hint="")
    ] = ()
    """A preset, or axes as fsdp=4,kv=2; without it all presets are compared."""

    devices: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: those here)")] = None
    """How many devices a preset shares out."""

    memory: Annotated[
        float | None, tyro.conf.arg(metavar="GIB", help_behavior_hint="(default: that of the devices here)")
    ] = None
    """What one of them has."""

    model: Annotated[str, tyro.conf.arg(metavar=f"DIR|{RELEASED}")] = RELEASED
    """Directory of a GLM-4.1V checkpoint, or the released model, of which nothing is needed."""

    rows: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Prompts in the cache."""

    capacity: Annotated[int, tyro.conf.arg(metavar="N")] = 4096
    """Tokens of each, answers included."""

    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Of weights and cache."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object, bytes throughout."""

    debug: bool = False
    """Show the whole traceback of an error."""

    def run(self) -> None:
        """Checks the options, computes, and prints tables."""
        self._check()
        from glm4v_jax.config.model import Glm4vConfig

        config = Glm4vConfig.glm4_1v_9b() if self.model == RELEASED else Glm4vConfig.from_pretrained(self.model)
        memory = self._memory()
        if self.mesh:
            found = self._describe(self.mesh[0], config, memory)
            print(json.dumps(found.to_dict())) if self.as_json else _print_description(found)
            return
        presets = {name: self._describe(name, config, memory) for name in PRESETS}
        if self.as_json:
            print(json.dumps({name: found.to_dict() for name, found in presets.items()}))
        else:
            _print_presets(presets)

    def _check(self) -> None:
        """Misses what needs no JAX.

        Raises:
          CheckpointError, ConfigError: there is no such model or mesh, or a number is none.
        """
        if len(self.mesh) > 1:
            raise ConfigError(f"PRESET|AXES: found {len(self.mesh)}, expected at most one, as in fsdp=4,kv=2")
        if self.devices is not None and self.devices < 1:
            raise ConfigError(f"--devices: found {self.devices}, expected at least 1")
        if self.memory is not None and not 0 < self.memory < float("inf"):
            raise ConfigError(f"--memory: found {self.memory}, expected a number of GiB above 0")
        if self.model != RELEASED:
            check_model(self.model)
        if self.mesh:
            check_text(self.mesh[0])
            if self.devices is not None and (asked := _devices_in(self.mesh[0])) not in (None, self.devices):
                raise ConfigError(f"--devices: found {self.devices} and a mesh of {asked}, expected one of the two")

    def _memory(self) -> int | None:
        """Bytes that a device has; of devices that are not here only what the user says."""
        if self.memory is not None:
            return int(self.memory * GIB)
        if self.devices is not None:
            return None
        import jax

        return device_memory(jax.local_devices()[0])

    def _describe(self, text: str, config: "Glm4vConfig", memory: int | None) -> "Description":
        from glm4v_jax.planning.memory_table import describe
        from glm4v_jax.planning.mesh_presets import sizes_for

        number = self.devices
        if number is None and _devices_in(text) is None:
            import jax

            number = jax.device_count()
        sizes = sizes_for(text, config, number, memory)
        return describe(config, sizes, rows=self.rows, capacity=self.capacity, dtype=self.dtype, memory=memory)


def _devices_in(text: str) -> int | None:
    """How many devices a text asks for itself."""
    if (found := parse_preset(text)) is not None:
        return found[1]
    return math.prod(parse_mesh(text).values())


def _print_description(found: "Description") -> None:
    from glm4v_jax.planning.memory_table import COLUMNS

    _print_table(COLUMNS, found.table(), numeric=("in all", "a device"), heads=True)
    rich.console.Console(soft_wrap=True, highlight=False).print(rich.markup.escape(found.summary()))


def _print_presets(presets: dict[str, "Description"]) -> None:
    from glm4v_jax.files import size_text
    from glm4v_jax.planning.parameter_layout import mesh_text

    numeric = ("weights a device", "cache a device", "of its memory")
    rows = [
        (
            name, mesh_text(found.sizes), size_text(found.weight_bytes), size_text(found.cache.device_bytes),
            "not known" if found.share is None else f"{found.share:.1%}", PRESETS[name].description,
        )
        for name, found in presets.items()
    ]  # fmt: skip
    _print_table(("preset", "mesh", *numeric, "for"), rows, numeric=numeric)
    first = next(iter(presets.values()))
    print(f"{first.num_devices} devices, a cache of {first.rows} x {first.capacity} slots, {first.dtype}")


def _print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[str], heads: bool = False
) -> None:
    """Draws a table; with `heads`, rows that have a first cell are those that sum up the ones below them."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_WIDTH)
    table = rich.table.Table(box=None, pad_edge=False)
    for column in columns:
        right = column in numeric
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*map(rich.markup.escape, row), style="bold" if heads and row[0] else None)
    console.print(table)
