"""`python -m train`, also `glm4v train`: a table of subcommands, each a typed dataclass that runs itself.

JAX is imported only by the subcommands that need it, once they run, so that help and complaints are immediate.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import rich.console
import rich.progress
import rich.table
import rich.text
import tyro

from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.options import check_model
from glm4v_jax.console.program import Command, JsonOptions, Options, run_program
from glm4v_jax.console.table import printable
from glm4v_jax.errors import DataError
from glm4v_jax.files import replacing, to_json
from glm4v_jax.inputs.media.quiet import quiet_ffmpeg, unsuspected_pictures
from train.export_command import Export

if TYPE_CHECKING:
    from train.data.check import Report

BAD, TROUBLE = 1, 2
"""Exit statuses of `check`: there are bad rows; it could not look."""
_PERIOD = 10.0
"""Seconds between two plain lines of progress."""

FormatName = Literal["openai", "sharegpt", "alpaca", "swift", "hf", "llava"]


@dataclasses.dataclass(kw_only=True)
class Check(JsonOptions):
    """Look through training data: what there is, how long it is, and which rows cannot be learned from, and why.

    Exit status 0 where all rows are good, 1 where some are bad, 2 in case of trouble.
    """

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DATA ...", help_behavior_hint="")]
    """Files (.json, .jsonl, .parquet), directories of such, or DIR/dataset_info.json:NAME."""

    model: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: count characters)")] = None
    """Checkpoint whose tokenizer and processor count tokens; videos are decoded for it."""

    format: Annotated[FormatName | None, tyro.conf.arg(help_behavior_hint="(default: by the fields of each row)")] = (
        None
    )
    """Format of all rows."""

    media_dir: Annotated[
        str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: that of the data file)")
    ] = None
    """What paths of pictures and videos are relative to."""

    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Look at the first N rows."""

    decode: bool = False
    """Decode every picture and video, those of the net too; else files are only seen to be there."""

    histogram: Annotated[str | None, tyro.conf.arg(metavar="PNG", help_behavior_hint="(default: none)")] = None
    """Draw the lengths into this file."""

    trouble = TROUBLE

    def run(self) -> int:
        """Checks, and prints what was found."""
        from train.data.check import check
        from train.data.lengths import TokenCounter, count_characters
        from train.data.records import read_records

        if not self.data:
            raise DataError("DATA: found no file, expected at least one")
        measure, unit = count_characters, "characters"
        if self.model is not None:
            from glm4v_jax.inputs.processor import Glm4vProcessor

            check_model(self.model)
            measure, unit = TokenCounter(Glm4vProcessor.from_pretrained(self.model)), "tokens"
        decoding = self.decode or self.model is not None
        records = read_records(self.data, format=self.format, media_dir=self.media_dir)
        with quiet_ffmpeg() if decoding else contextlib.nullcontext(), unsuspected_pictures(), _shown() as progress:
            report = check(records, measure=measure, unit=unit, limit=self.limit, decode=self.decode, progress=progress)
        if self.histogram is not None:
            self._draw(report)
        if self.as_json:
            print(to_json(report.to_dict()))
        else:
            _print_report(report)
        return BAD if report.bad else 0

    def _draw(self, report: "Report") -> None:
        from train.data.histogram import draw_histogram

        path = pathlib.Path(self.histogram or "")
        if not report.lengths:
            print(f"train: {path}: not drawn, there is no good row", file=sys.stderr)
            return
        title = f"{', '.join(os.path.basename(os.path.normpath(data)) for data in self.data)}: {len(report.lengths):,}"
        picture = draw_histogram(report.lengths, report.unit, f"{title} records")
        with replacing(path) as aside:
            picture.save(aside, "PNG")


@dataclasses.dataclass(kw_only=True)
class Run(Options):
    """Train: run the job that a TOML file describes, from its latest checkpoint if there is one.

    On several hosts, run the same command on each; they share the job's directory. SIGTERM to any of them makes the job
    save and end with status 0; the same command goes on from there, as it does after a crash.
    """

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG", help_behavior_hint="")]
    """The job: a .toml file; `train.config.TrainConfig` has its fields."""

    profile: Annotated[int, tyro.conf.arg(metavar="STEPS", help_behavior_hint="(default: none)")] = 0
    """Write a profile of so many steps into the job's directory, for TensorBoard or Perfetto."""

    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    def run(self) -> int:
        """Trains, and says how it goes on standard error."""
        from train.config import load_config

        config = load_config(self.config)
        check_model(config.model)
        from glm4v_jax.devices.compilation_cache import use_compilation_cache
        from train.loop import train

        use_compilation_cache()

        def tell(line: str) -> None:
            print(printable(line), file=sys.stderr, flush=True)

        with quiet_ffmpeg(), unsuspected_pictures():
            result = train(config, profile=self.profile, tell=tell)
        told = "done" if result.is_done else "stopped; the same command goes on from there"
        print(f"{config.out}: {result.step} of {config.steps} steps, {told}")
        return 0


COMMANDS: dict[str, Callable[..., Command]] = {"run": Run, "check": Check, "export": Export}

DESCRIPTION = (
    "Fine-tuning of GLM-4.1V on your own pictures, videos and conversations. A file that ends in .toml in the place of "
    "a subcommand is a job to run."
)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train") -> int:
    """Runs one subcommand.

    Args:
        arguments: what follows the program's name; that of this process by default.
        prog: the program's name in help and errors.

    Returns:
        The exit status: 0; what the subcommand says after one line on standard error that says what is wrong; 130
        after Ctrl-C. An unknown option exits with status 2 by `SystemExit`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].endswith(".toml"):
        given = ["run", *given]
    return run_program(COMMANDS, given, name="train", prog=prog, description=DESCRIPTION)


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[int, int], None]]:
    """Inside, what is yielded takes rows done and rows in all: a bar on a terminal, a line now and then elsewhere."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        told = time.perf_counter()

        def tell(done: int, total: int) -> None:
            nonlocal told
            if time.perf_counter() - told >= _PERIOD:
                told = time.perf_counter()
                print(f"{done:,} of {total:,} rows", file=sys.stderr, flush=True)

        yield tell
        return
    columns = (
        rich.progress.TextColumn("rows"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("rows", total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def _print_report(report: "Report") -> None:
    good = report.checked - report.bad
    looked = f"{report.checked:,}" if report.checked == report.total else f"{report.checked:,} of {report.total:,}"
    formats = ", ".join(f"{name} {count:,}" for name, count in report.formats.most_common())
    remote = f", {report.remote:,} of both in the net and not looked at" if report.remote else ""
    lengths = ", ".join(f"{name} {value:,}" for name, value in report.summary.items())
    rows = {
        "rows": f"{looked}: {good:,} good, {report.bad:,} bad",
        "formats": formats or "none",
        "messages": f"{report.messages:,}, of which {report.learned:,} are learned",
        "shown": f"pictures {report.pictures:,}, videos {report.videos:,}{remote}; "
        f"records without any {report.text_only:,}",
        report.unit: f"{lengths}; longest at {report.longest}" if lengths else "none",
    }
    console = rich.console.Console(soft_wrap=True)
    table = rich.table.Table(box=None, pad_edge=False, show_header=False)
    if not console.is_terminal:
        console = rich.console.Console(width=240)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, rich.text.Text(printable(value)))
    console.print(table)
    if report.problems:
        more = f", {len(report.problems)} of them shown" if report.bad > len(report.problems) else ""
        print(f"\nbad rows{more}:")
        for problem in report.problems:
            print(printable(f"  {problem.place}: {' '.join(problem.reason.split())}"))
