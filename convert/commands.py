"""`python -m convert`, also `glm4v convert`: a table of subcommands, each a typed dataclass that runs itself.

JAX and Orbax are imported once a subcommand runs, so that help and complaints are immediate.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import rich.console
import rich.markup
import rich.table
import tyro

from convert.progress import gigabytes, shown
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.program import Command, JsonOptions, run_program
from glm4v_jax.errors import Glm4vError
from glm4v_jax.planning.mesh_presets import check_text, mesh_for, sizes_for

if TYPE_CHECKING:
    from convert.inspect import Inspection
    from convert.source import Summary
    from convert.verify import Report

DIFFERENT, TROUBLE = 1, 2
"""Exit statuses of `verify`, those of `diff`."""
LISTED = 20
"""How many differing tensors are shown; `--json` has all."""

Dtype = Literal["float32", "bfloat16", "float16"]
Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC", help_behavior_hint="")]
Target = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST", help_behavior_hint="")]


@dataclasses.dataclass(kw_only=True)
class _Writing(JsonOptions):
    """What the subcommands have that write a checkpoint."""

    overwrite: bool = False
    """Replace what is there, once the new one is complete."""

    dry_run: bool = False
    """Check everything and say what would be written."""

    @property
    def place(self) -> Path:
        """The directory to make."""
        raise NotImplementedError

    def interrupted(self) -> str:
        """What Ctrl-C has left; a second one may have ended the cleaning up too."""
        from glm4v_jax.checkpoints.atomic_directory import left_of

        left = left_of(self.place)
        if left is None:
            return "convert: interrupted; what was written has been removed, the source is as it was"
        return f"convert: interrupted; {left} is left until the next run to the same place, the source is as it was"


@dataclasses.dataclass(kw_only=True)
class ToOrbax(_Writing):
    """Convert safetensors to an Orbax checkpoint, which `from_pretrained` loads onto any mesh.

    Streams: host memory holds a few tensors. Configuration, tokenizer and processor files travel along.
    """

    source: Source
    """Checkpoint in Hugging Face layout."""

    target: Target
    """Directory to make."""

    dtype: Annotated[Dtype | None, tyro.conf.arg(help_behavior_hint="(default: as they are)")] = None
    """Cast the weights."""

    mesh: Annotated[str | None, tyro.conf.arg(metavar="PRESET|AXES", help_behavior_hint="(default: one device)")] = None
    """How the devices of this machine, or of all processes, share the work: axes as fsdp=4,kv=2, or a preset of
    `glm4v mesh`."""

    no_hash: bool = False
    """Do not note the SHA-256 of the source's files in the checkpoint."""

    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    @property
    def place(self) -> Path:
        """The directory to make."""
        return Path(self.target)

    def run(self) -> int:
        """Converts and prints a summary."""
        from convert.to_orbax import to_orbax

        mesh = None
        if self.mesh is not None:
            from glm4v_jax.devices.distributed import check_devices

            check_text(self.mesh)
            mesh = mesh_for(self.mesh, Glm4vConfig.from_pretrained(self.source))
            check_devices(mesh)
        with shown("to Orbax") as progress:
            summary = to_orbax(
                self.source, self.target, dtype=self.dtype, mesh=mesh, overwrite=self.overwrite, dry_run=self.dry_run,
                hash_files=not self.no_hash, progress=progress,
            )  # fmt: skip
        _tell(summary, self.as_json)
        return 0


@dataclasses.dataclass(kw_only=True)
class ToHf(_Writing):
    """Convert an Orbax checkpoint to safetensors, which transformers loads; or shard or cast safetensors anew.

    Names, dtypes and bits are those of the safetensors that it was made from.
    """

    source: Source
    """Orbax checkpoint, or one in Hugging Face layout."""

    target: Target
    """Directory to make."""

    max_shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "5GB"
    """Of one file, as 5GB, 200MiB or a number of bytes; "original" for the shards that there were."""

    dtype: Annotated[Dtype | None, tyro.conf.arg(help_behavior_hint="(default: as they are)")] = None
    """Cast the weights."""

    @property
    def place(self) -> Path:
        """The directory to make."""
        return Path(self.target)

    def run(self) -> int:
        """Converts and prints a summary."""
        from convert.to_hf import to_hf

        with shown("to safetensors") as progress:
            summary = to_hf(
                self.source, self.target, max_shard_size=self.max_shard_size, dtype=self.dtype,
                overwrite=self.overwrite, dry_run=self.dry_run, progress=progress,
            )  # fmt: skip
        _tell(summary, self.as_json)
        return 0


@dataclasses.dataclass(kw_only=True)
class Verify(JsonOptions):
    """Compare two checkpoints of either format, tensor by tensor.

    Exit status 0 where they are equal, 1 where they differ, 2 in case of trouble.
    """

    left: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A", help_behavior_hint="")]
    """A checkpoint."""

    right: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B", help_behavior_hint="")]
    """Another."""

    tolerance: Annotated[float, tyro.conf.arg(metavar="X")] = 0.0
    """Let numbers differ by this much, and dtypes; by default every bit counts."""

    trouble = TROUBLE

    def run(self) -> int:
        """Compares and prints what differs."""
        from convert.verify import verify

        with shown("comparing") as progress:
            report = verify(self.left, self.right, progress=progress)
        different = report.different(self.tolerance)
        if self.as_json:
            print(json.dumps(_report_fields(report, self.tolerance)))
        else:
            _print_report(report, self.tolerance)
        return DIFFERENT if different else 0


@dataclasses.dataclass(kw_only=True)
class Inspect(JsonOptions):
    """Show the tensors of a checkpoint of either format: shapes, dtypes, where they go, and how a mesh splits them.

    No data are read, and the devices of the mesh need not exist.
    """

    source: Source
    """A checkpoint."""

    mesh: Annotated[str, tyro.conf.arg(metavar="PRESET|AXES")] = "data=1,fsdp=1,kv=1,q=1,seq=1"
    """Devices along the axes, as fsdp=4,kv=2, or a preset for so many, as latency:8: what does one of them hold?"""

    def run(self) -> int:
        """Reads the headers and prints tables."""
        from convert.inspect import inspect

        check_text(self.mesh)
        inspection = inspect(self.source, sizes_for(self.mesh, Glm4vConfig.from_pretrained(self.source)))
        if self.as_json:
            print(json.dumps(inspection.to_dict()))
        else:
            _print_inspection(inspection)
        return 0


@dataclasses.dataclass(kw_only=True)
class Synth(_Writing):
    """Write a checkpoint of random weights in Hugging Face layout, sharded like the released one: to rehearse with."""

    out: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="(required)")]
    """Directory to make."""

    config: Annotated[str, tyro.conf.arg(metavar="full|tiny|FILE")] = "tiny"
    """The 9B, the package's tiny model, or a config.json."""

    dtype: Dtype = "bfloat16"
    """Of the weights."""

    seed: int = 0
    """Of the numbers."""

    shards: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 4, or as layers allow)")] = (
        None
    )
    """How many files."""

    @property
    def place(self) -> Path:
        """The directory to make."""
        return Path(self.out)

    def run(self) -> int:
        """Writes and prints a summary."""
        from convert.synth import load_config, synth

        if self.seed < 0:
            raise Glm4vError(f"--seed: found {self.seed}, expected at least 0")
        with shown("writing") as progress:
            summary = synth(
                load_config(self.config), self.out, dtype=self.dtype, seed=self.seed, count=self.shards,
                overwrite=self.overwrite, dry_run=self.dry_run, progress=progress,
            )  # fmt: skip
        _tell(summary, self.as_json)
        return 0


COMMANDS: dict[str, Callable[..., Command]] = {
    "inspect": Inspect,
    "to-orbax": ToOrbax,
    "to-hf": ToHf,
    "verify": Verify,
    "synth": Synth,
}


DESCRIPTION = "GLM-4.1V checkpoints: Hugging Face safetensors <-> Orbax, at any size, with nothing lost."


def main(arguments: Sequence[str] | None = None, prog: str = "python -m convert") -> int:
    """Runs one subcommand.

    Args:
        arguments: what follows the program's name; that of this process by default.
        prog: the program's name in help and errors.

    Returns:
        The exit status: 0; 1, or 2 of `verify`, after one line on standard error that says what is wrong; 130 after
        Ctrl-C. An unknown option exits with status 2 by `SystemExit`.
    """
    return run_program(COMMANDS, arguments, name="convert", prog=prog, description=DESCRIPTION)


def _tell(summary: "Summary", as_json: bool) -> None:
    if as_json:
        fields = dataclasses.asdict(summary)
        print(json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}))
        return
    speed = summary.nbytes / summary.seconds / 1e6
    files = "" if not summary.files else f" in {summary.files} file{'s' * (summary.files != 1)}"
    what = f"{summary.tensors} tensors, {gigabytes(summary.nbytes)}{files}"
    if summary.dry_run:
        print(f"{summary.target}: nothing written; would have {what}")
    else:
        print(f"{summary.target}: {what}, in {summary.seconds:.1f} s ({speed:.0f} MB/s)")
    for note in summary.notes:
        print(note)


def _report_fields(report: "Report", tolerance: float) -> dict[str, Any]:
    different = report.different(tolerance)
    return {
        "left": str(report.left),
        "right": str(report.right),
        "equal": not different,
        "tensors": len(report.tensors),
        "nbytes": report.nbytes,
        "left_checksum": report.left_checksum,
        "right_checksum": report.right_checksum,
        # JSON has no infinity.
        "different": [{**dataclasses.asdict(t), "max_difference": _finite(t.max_difference)} for t in different],
    }


def _finite(value: float | None) -> float | str | None:
    return "infinite" if value == float("inf") else value


def _print_report(report: "Report", tolerance: float) -> None:
    different = report.different(tolerance)
    if not different:
        within = f" within {tolerance:g}" if tolerance else ""
        print(f"equal{within}: {len(report.tensors)} tensors, {gigabytes(report.nbytes)} compared")
    else:
        columns = ("tensor", str(report.left), str(report.right), "numbers that differ", "by at most")
        rows = []
        for tensor in different[:LISTED]:
            sides = (tensor.left or "missing", tensor.right or "missing")
            count = "" if tensor.unequal is None else f"{tensor.unequal:,}"
            most = "" if tensor.max_difference is None else f"{tensor.max_difference:.6g}"
            rows.append((tensor.name, *sides, count, most))
        _print_table(columns, rows)
        more = f", {LISTED} of them shown" if len(different) > LISTED else ""
        print(f"different: {len(different)} of {len(report.tensors)} tensors{more}")
    print(f"sha256 {report.left_checksum}  {report.left}")
    print(f"sha256 {report.right_checksum}  {report.right}")


def _print_inspection(inspection: "Inspection") -> None:
    rows = [
        (
            group.name if group.count == 1 else f"{group.name} x {group.count}",
            "x".join(map(str, group.shape)),
            group.dtype,
            group.leaf,
            " ".join(group.sharding),
            gigabytes(group.nbytes),
            gigabytes(group.device_bytes),
        )
        for group in inspection.groups
    ]
    _print_table(("tensor", "shape", "dtype", "leaf", "split by", "size", "a device"), rows)
    depth = {name: name.count(".") for name in inspection.modules}
    modules = [("  " * depth[name] + name.split(".")[-1], f"{count:,}") for name, count in inspection.modules.items()]
    _print_table(("module", "parameters"), modules)
    mesh = ",".join(f"{axis}={size}" for axis, size in inspection.mesh.items())
    print(
        f"{inspection.directory} ({inspection.format}): {inspection.tensors} tensors, {inspection.parameters:,} "
        f"parameters, {inspection.nbytes:,} bytes; {inspection.device_bytes:,} on a device of {mesh}"
    )


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=240)
    table = rich.table.Table(box=None, pad_edge=False)
    for column in columns:
        numeric = column in ("size", "a device", "parameters", "numbers that differ", "by at most")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(rich.markup.escape(cell) for cell in row))
    console.print(table)
