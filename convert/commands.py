"""`python -m convert`, also `glm4v convert`: a table of subcommands, each a typed dataclass that runs itself.

JAX and Orbax are imported when a subcommand runs, so that help and errors of options are immediate.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from glm4v_jax.config.checks import Natural
from glm4v_jax.config.members import find_member
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import Scheme
from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.program import Command, JsonOptions, run_program
from glm4v_jax.console.progress import Progress
from glm4v_jax.console.table import print_table
from glm4v_jax.errors import counted
from glm4v_jax.files import decimal_size
from glm4v_jax.planning.mesh_presets import check_text, mesh_for, sizes_for

if TYPE_CHECKING:
    from convert.inspect import Inspection
    from convert.source import Summary
    from convert.verify import Report

DIFFERENT, TROUBLE = 1, 2
"""Exit statuses of `verify`, the same as those of `diff`."""
LISTED = 20
"""Number of differing tensors to print; `--json` has all."""

Dtype = Literal["float32", "bfloat16", "float16"]
Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC", help_behavior_hint="")]
Target = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST", help_behavior_hint="")]


@dataclasses.dataclass(kw_only=True)
class _Writing(JsonOptions):
    """Options of the subcommands that write a checkpoint."""

    overwrite: bool = False
    """Replace a checkpoint that is there, once the new one is complete."""

    dry_run: bool = False
    """Check everything and print what would be written."""

    @property
    def output(self) -> Path:
        """The directory to make."""
        raise NotImplementedError

    def interrupted(self) -> str:
        """Say what is left after Ctrl-C; a second Ctrl-C may have ended the cleanup."""
        from glm4v_jax.checkpoints.atomic_directory import left_of

        left = left_of(self.output)
        if left is None:
            return "convert: interrupted; what was written has been removed, the source is as it was"
        return f"convert: interrupted; {left} is left until the next run to the same place, the source is as it was"


@dataclasses.dataclass(kw_only=True)
class _Conversion(_Writing):
    """Options of the subcommands that convert a checkpoint."""

    source: Source
    """Checkpoint in Hugging Face layout or Orbax format."""

    target: Target
    """Directory to make."""

    @property
    def output(self) -> Path:
        """The directory to make."""
        return Path(self.target)


@dataclasses.dataclass(kw_only=True)
class _Cast(_Conversion):
    """Options of the subcommands that may change the dtype."""

    dtype: Annotated[Dtype | None, tyro.conf.arg(help_behavior_hint="(default: unchanged)")] = None
    """Cast the weights."""


@dataclasses.dataclass(kw_only=True)
class Quantize(_Conversion):
    """Quantise a checkpoint into safetensors that this package, vLLM and transformers load.

    The layout is that of compressed-tensors: W8A16 or W4A16.

    Streams: host memory holds a few tensors. All other files of the checkpoint are copied.
    """

    to: Literal["int8", "int4"] = "int8"
    """Integers of 8 bits, with a scale for each output channel; or of 4 bits, with a scale for each group of inputs,
    half as large, with worse answers."""

    group: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 64)")] = None
    """How many inputs share a scale in int4."""

    layers: Literal["decoder", "all"] = "decoder"
    """Linear layers to quantise: the decoder's; or the ViT's and the head too, which not every vLLM loads."""

    max_shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "5GB"
    """Size of a file, as 5GB, 200MiB or a number of bytes."""

    def run(self) -> None:
        """Convert and print a summary."""
        from convert.quantize import quantize

        with Progress("quantising") as progress:
            summary = quantize(
                self.source, self.target, to=self.to, group=self.group, layers=self.layers,
                max_shard_size=self.max_shard_size, overwrite=self.overwrite, dry_run=self.dry_run,
                progress=progress.update,
            )  # fmt: skip
        _print_summary(summary, self.as_json)


@dataclasses.dataclass(kw_only=True)
class ToOrbax(_Cast):
    """Convert safetensors to an Orbax checkpoint, which `from_pretrained` loads onto any mesh.

    Streams: host memory holds a few tensors. Configuration, tokenizer and processor files are copied.
    """

    mesh: Annotated[str | None, tyro.conf.arg(metavar="PRESET|AXES", help_behavior_hint="(default: one device)")] = None
    """Mesh of the devices of this machine, or of all processes: axes as fsdp=4,kv=2, or a preset of `glm4v mesh`."""

    no_hash: bool = False
    """Do not record the SHA-256 of the source's files in the checkpoint."""

    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    def run(self) -> None:
        """Convert and print a summary."""
        from convert.to_orbax import to_orbax

        mesh = None
        if self.mesh is not None:
            from glm4v_jax.devices.distributed import check_devices

            check_text(self.mesh)
            mesh = mesh_for(self.mesh, Glm4vConfig.from_pretrained(self.source))
            check_devices(mesh)
        with Progress("converting to Orbax") as progress:
            summary = to_orbax(
                self.source, self.target, dtype=self.dtype, mesh=mesh, overwrite=self.overwrite, dry_run=self.dry_run,
                hash_files=not self.no_hash, progress=progress.update,
            )  # fmt: skip
        _print_summary(summary, self.as_json)


@dataclasses.dataclass(kw_only=True)
class ToHf(_Cast):
    """Convert an Orbax checkpoint to safetensors, which transformers loads; or reshard or cast safetensors.

    Names, dtypes and bits are those of the safetensors that it was made from.
    """

    max_shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "5GB"
    """Size of a file, as 5GB, 200MiB or a number of bytes; "original" for the shards of the original."""

    def run(self) -> None:
        """Convert and print a summary."""
        from convert.to_hf import to_hf

        with Progress("converting to safetensors") as progress:
            summary = to_hf(
                self.source, self.target, max_shard_size=self.max_shard_size, dtype=self.dtype,
                overwrite=self.overwrite, dry_run=self.dry_run, progress=progress.update,
            )  # fmt: skip
        _print_summary(summary, self.as_json)


@dataclasses.dataclass(kw_only=True)
class Verify(JsonOptions):
    """Compare two checkpoints of either format, tensor by tensor.

    Exit status 0 if they are equal, 1 if they differ, 2 after an error.
    """

    left: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A", help_behavior_hint="")]
    """A checkpoint in either format."""

    right: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B", help_behavior_hint="")]
    """Another."""

    tolerance: Annotated[float, tyro.conf.arg(metavar="X")] = 0.0
    """Accept numbers that differ by this much, and other dtypes; by default every bit must agree."""

    trouble = TROUBLE

    def run(self) -> int:
        """Compare and print what differs."""
        from convert.verify import verify

        with Progress("comparing") as progress:
            report = verify(self.left, self.right, progress=progress.update)
        if self.as_json:
            print(json.dumps(_report_fields(report, self.tolerance)))
        else:
            _print_report(report, self.tolerance)
        return DIFFERENT if report.different(self.tolerance) else 0


@dataclasses.dataclass(kw_only=True)
class InspectTensors(JsonOptions):
    """List the tensors of a checkpoint in either format: shapes, dtypes, leaves of the model, sharding on a mesh.

    No data are read, and the devices of the mesh need not exist.
    """

    source: Source
    """A checkpoint."""

    mesh: Annotated[str, tyro.conf.arg(metavar="PRESET|AXES")] = "data=1,fsdp=1,kv=1,q=1,seq=1"
    """Mesh to shard it on: axes as fsdp=4,kv=2, or a preset with a number of devices, as latency:8."""

    quantize: Scheme = "none"
    """Count the bytes per device of weights as integers, as `glm4v generate --quantize` makes them."""

    def run(self) -> None:
        """Read the headers and print tables."""
        from convert.inspect import inspect

        check_text(self.mesh)
        sizes = sizes_for(self.mesh, Glm4vConfig.from_pretrained(self.source), scheme=self.quantize)
        inspection = inspect(self.source, sizes, self.quantize)
        if self.as_json:
            print(json.dumps(inspection.to_dict()))
        else:
            _print_inspection(inspection)


@dataclasses.dataclass(kw_only=True)
class Synth(_Writing):
    """Write a checkpoint of random weights in Hugging Face layout, sharded like the released one, for trials."""

    out: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="(required)")]
    """Directory to make."""

    config: Annotated[str, tyro.conf.arg(metavar="NAME|tiny|FILE")] = "tiny"
    """Model: a released checkpoint (GLM-4.6V-Flash, GLM-OCR, ...; full is GLM-4.1V), the package's tiny one, or that of
    a config.json."""

    tiny: bool = False
    """Make the released checkpoint at tiny size, with a tokenizer."""

    dtype: Dtype = "bfloat16"
    """Dtype of the weights."""

    seed: Natural = 0
    """Random seed."""

    shards: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 4, or as layers allow)")] = (
        None
    )
    """Number of weight files."""

    @property
    def output(self) -> Path:
        """The directory to make."""
        return Path(self.out)

    def run(self) -> None:
        """Write and print a summary."""
        from convert.synth import load_config, synth

        with Progress("writing") as progress:
            summary = synth(
                load_config(self.config, self.tiny), self.out, dtype=self.dtype, seed=self.seed, count=self.shards,
                member=find_member(self.config), overwrite=self.overwrite, dry_run=self.dry_run,
                progress=progress.update,
            )  # fmt: skip
        _print_summary(summary, self.as_json)


COMMANDS: dict[str, Callable[..., Command]] = {
    "inspect": InspectTensors,
    "to-orbax": ToOrbax,
    "to-hf": ToHf,
    "quantize": Quantize,
    "verify": Verify,
    "synth": Synth,
}


DESCRIPTION = "GLM-4.1V checkpoints: Hugging Face safetensors <-> Orbax, at any size, with nothing lost."


def main(arguments: Sequence[str] | None = None, prog: str = "python -m convert") -> int:
    """Run one subcommand; `arguments` are those of this process by default, `prog` is the program's name in help.

    Returns the exit status: see `run_program`; errors of `verify` have status 2.
    """
    return run_program(COMMANDS, arguments, name="convert", prog=prog, description=DESCRIPTION)


def _print_summary(summary: "Summary", as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(summary), default=str))
        return
    files = "" if not summary.files else f" in {counted(summary.files, 'file')}"
    content = f"{counted(summary.tensors, 'tensor')}, {decimal_size(summary.nbytes)}{files}"
    if summary.dry_run:
        print(f"{summary.target}: nothing written; would have {content}")
    else:
        speed = summary.nbytes / summary.seconds / 1e6
        print(f"{summary.target}: {content}, in {summary.seconds:.1f} s ({speed:.0f} MB/s)")
    for note in summary.notes:
        print(note)


def _report_fields(report: "Report", tolerance: float) -> dict[str, Any]:
    different = [dataclasses.asdict(tensor) for tensor in report.different(tolerance)]
    for tensor in different:
        if tensor["max_difference"] == float("inf"):  # which JSON does not have
            tensor["max_difference"] = "infinite"
    return {
        "left": str(report.left),
        "right": str(report.right),
        "equal": not different,
        "tensors": len(report.tensors),
        "nbytes": report.nbytes,
        "left_checksum": report.left_checksum,
        "right_checksum": report.right_checksum,
        "different": different,
    }


def _print_report(report: "Report", tolerance: float) -> None:
    different = report.different(tolerance)
    if not different:
        within = f" within {tolerance:g}" if tolerance else ""
        print(f"equal{within}: {counted(len(report.tensors), 'tensor')}, {decimal_size(report.nbytes)} compared")
    else:
        columns = ("tensor", str(report.left), str(report.right), "numbers that differ", "by at most")
        rows = []
        for tensor in different[:LISTED]:
            sides = (tensor.left or "missing", tensor.right or "missing")
            count = "" if tensor.unequal is None else f"{tensor.unequal:,}"
            most = "" if tensor.max_difference is None else f"{tensor.max_difference:.6g}"
            rows.append((tensor.name, *sides, count, most))
        print_table(columns, rows, right=columns[3:])
        more = f", {LISTED} of them shown" if len(different) > LISTED else ""
        print(f"different: {len(different)} of {counted(len(report.tensors), 'tensor')}{more}")
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
            decimal_size(group.nbytes),
            decimal_size(group.device_bytes),
        )
        for group in inspection.groups
    ]
    columns = ("tensor", "shape", "dtype", "leaf", "sharded by", "size", "per device")
    print_table(columns, rows, right=columns[5:])
    depth = {name: name.count(".") for name in inspection.modules}
    modules = [("  " * depth[name] + name.split(".")[-1], f"{count:,}") for name, count in inspection.modules.items()]
    print_table(("module", "parameters"), modules, right=["parameters"])
    mesh = ",".join(f"{axis}={size}" for axis, size in inspection.mesh.items())
    print(
        f"{inspection.directory} ({inspection.format}): {counted(inspection.tensors, 'tensor')}, "
        f"{counted(inspection.parameters, 'parameter')}, {counted(inspection.nbytes, 'byte')}; "
        f"{inspection.device_bytes:,} on a device of {mesh}"
    )
