"""`python -m train`, also `glm4v train`: its subcommands, each a typed dataclass that runs itself.

JAX is imported only by the subcommands that need it, once they run, so that help and errors are immediate.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.drawings import check_png, write_png
from glm4v_jax.console.options import find_model
from glm4v_jax.console.program import Command, JsonOptions, Options, run_program
from glm4v_jax.console.progress import Progress
from glm4v_jax.console.table import print_table, printable
from glm4v_jax.errors import ConfigError, DataError, counted, naming
from glm4v_jax.files import to_json
from glm4v_jax.inputs.media.quiet import quiet_ffmpeg, without_size_warnings
from train import JobKind
from train.data import FormatName
from train.export_command import Export
from train.levels_command import MeasureLevels

if TYPE_CHECKING:
    from train.data.check import DataReport

BAD, TROUBLE = 1, 2
"""Exit statuses of `check`: there are bad rows; it could not check them."""


@dataclasses.dataclass(kw_only=True)
class Init(Options):
    """Print a job file to begin with: every field, what it means, and its default. `glm4v train init lora > job.toml`.

    Lines that a job needs are set; the others are commented out.
    """

    kind: Annotated[tyro.conf.Positional[JobKind], tyro.conf.arg(help_behavior_hint="(default: lora)")] = "lora"
    """Full fine-tuning (sft), an adapter (lora), learning from preferences, or by reward (rl)."""

    def run(self) -> int:
        """Print it."""
        from train.job_file import job_file

        print(job_file(self.kind), end="")
        return 0


@dataclasses.dataclass(kw_only=True)
class Check(JsonOptions):
    """Check training data: what it contains, how long records are, and which rows cannot be trained on, and why.

    Exit status 0 if all rows are good, 1 if some are bad, 2 after an error.
    """

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DATA ...", help_behavior_hint="")]
    """Files (.json, .jsonl, .parquet), directories of them, or DIR/dataset_info.json:NAME."""

    model: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: count characters)")] = None
    """Checkpoint whose tokenizer and processor count tokens; videos are decoded for it."""

    format: Annotated[FormatName | None, tyro.conf.arg(help_behavior_hint="(default: detected for each row)")] = None
    """Format of all rows."""

    media_dir: Annotated[
        str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: that of the data file)")
    ] = None
    """Directory that paths of images and videos are relative to."""

    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Check only the first N rows."""

    preference: bool = False
    """Rows have a preferred and a rejected answer; lengths are of both together, as they have to fit a row."""

    decode: bool = False
    """Decode every image and video, remote ones too; otherwise only check that files exist."""

    histogram: Annotated[str | None, tyro.conf.arg(metavar="PNG", help_behavior_hint="(default: none)")] = None
    """Draw the distribution of lengths into this file."""

    trouble = TROUBLE

    def run(self) -> int:
        """Check the data, and print a report."""
        from train.data.check import check
        from train.data.lengths import TokenCounter, count_characters
        from train.data.records import read_records

        if not self.data:
            raise DataError("DATA: found no file; expected at least one")
        if self.histogram is not None:
            check_png("--histogram", self.histogram)
        measure, unit = count_characters, "characters"
        if self.model is not None:
            from glm4v_jax.inputs.processor import Glm4vProcessor

            measure, unit = TokenCounter(Glm4vProcessor.from_pretrained(find_model(self.model))), "tokens"
        decoding = self.decode or self.model is not None
        records = read_records(self.data, format=self.format, media_dir=self.media_dir, is_preference=self.preference)
        quiet = quiet_ffmpeg() if decoding else contextlib.nullcontext()
        with quiet, without_size_warnings(), Progress("checking", "rows") as progress:
            report = check(
                records, measure=measure, unit=unit, limit=self.limit, decode=self.decode, progress=progress.update
            )
        if self.histogram is not None:
            self._draw(report)
        if self.as_json:
            print(to_json(report.to_dict()))
        else:
            _print_report(report, self.decode)
        return BAD if report.bad else 0

    def _draw(self, report: "DataReport") -> None:
        from train.data.histogram import draw_histogram

        path = pathlib.Path(self.histogram or "")
        if not report.lengths:
            print(f"train: {path}: not drawn, because there is no good row", file=sys.stderr)
            return
        title = f"{', '.join(os.path.basename(os.path.normpath(data)) for data in self.data)}: {len(report.lengths):,}"
        image = draw_histogram(report.lengths, report.unit, f"{title} records")
        write_png(image, path)


@dataclasses.dataclass(kw_only=True)
class Train(Options):
    """Run a training job, a TOML file, from its latest checkpoint if there is one.

    On several hosts, run the same command on each; they share the output directory. SIGTERM to any of them makes the
    job save and end with status 0; the same command resumes it, as it does after a crash.
    """

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG", help_behavior_hint="")]
    """The job, a .toml file; its fields are those of `train.config.TrainConfig`."""

    profile: Annotated[int, tyro.conf.arg(metavar="STEPS", help_behavior_hint="(default: none)")] = 0
    """Write a profile of STEPS steps to the output directory, for TensorBoard or Perfetto."""

    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    def run(self) -> int:
        """Train, with a log on standard error."""
        from train.config import FIELDS, load_config

        config = load_config(self.config)
        find_model(config.model, f"{self.config}: model")
        from glm4v_jax.devices.compilation_cache import use_compilation_cache
        from train.loop import train

        use_compilation_cache()

        def log(line: str) -> None:
            print(printable(line), file=sys.stderr, flush=True)

        with (
            naming(self.config, begins=FIELDS),
            quiet_ffmpeg(),
            without_size_warnings(),
            Progress("loading the weights") as weights,
            Progress("checking the lengths of prompts", "problems") as lengths,
        ):

            def show(progress: Progress, done: int, total: int) -> None:
                progress.update(done, total)
                if done == total:
                    progress.close()

            loading, checking = functools.partial(show, weights), functools.partial(show, lengths)

            if config.rl is not None:
                from train.rl.loop import learn

                if self.profile:
                    raise ConfigError("--profile: found it beside rl; expected a job without")
                result = learn(config, log=log, progress=loading, checking=checking)
            else:
                result = train(config, profile=self.profile, log=log, progress=loading)
        status = "done" if result.is_done else "stopped; the same command resumes the job"
        of = f"{result.step} of {counted(config.steps, 'step')}" if config.steps else counted(result.step, "step")
        print(f"{config.out}: {of}, {status}")
        return 0

    def interrupted(self) -> str:
        """Say that nothing is lost."""
        return "train: interrupted; the same command resumes the job from its latest checkpoint, if there is one"


COMMANDS: dict[str, Callable[..., Command]] = {
    "run": Train, "init": Init, "check": Check, "levels": MeasureLevels, "export": Export,
}  # fmt: skip

DESCRIPTION = (
    "Fine-tune GLM-4.1V on your own images, videos and conversations. `train JOB.toml` is short for `train run "
    "JOB.toml`."
)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train") -> int:
    """Run one subcommand; `arguments` are those of this process by default, `prog` is the program's name in help.

    Returns the exit status: 0; that of the subcommand after an error, which is one line on standard error; 130 after
    Ctrl-C. An unknown option exits with status 2 by `SystemExit`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].endswith(".toml"):
        given = ["run", *given]
    return run_program(COMMANDS, given, name="train", prog=prog, description=DESCRIPTION)


def _print_report(report: "DataReport", decoded: bool) -> None:
    good = report.checked - report.bad
    checked = f"{report.checked:,}" if report.checked == report.total else f"{report.checked:,} of {report.total:,}"
    formats = ", ".join(f"{name} {count:,}" for name, count in report.formats.most_common())
    remote = f", {report.remote:,} of both at URLs and not checked" if report.remote else ""
    unread = (
        "" if decoded or not report.pictures + report.videos else "; not decoded: pass --decode to find damaged ones"
    )
    lengths = ", ".join(f"{name} {value:,}" for name, value in report.summary.items())
    rows = [
        ("rows", f"{checked}: {good:,} good, {report.bad:,} bad"),
        ("formats", formats or "none"),
        ("messages", f"{report.messages:,}, of which {report.learned:,} contribute to the loss"),
        ("media", f"images {report.pictures:,}, videos {report.videos:,}{remote}{unread}"),
        ("text only", f"{report.text_only:,}"),
        (report.unit, f"{lengths}; longest at {report.longest}" if lengths else "none"),
    ]
    print_table(("", ""), rows, header=False)
    if report.problems:
        more = f", {len(report.problems)} of them shown" if report.bad > len(report.problems) else ""
        print(f"\nbad rows{more}:")
        for problem in report.problems:
            print(printable(f"  {problem.place}: {' '.join(problem.reason.split())}"))
