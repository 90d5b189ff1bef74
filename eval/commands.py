"""`python -m eval`, also `glm4v eval`: scores of a checkpoint, task by task.

JAX is imported only once items and options are known to be good, so that help and complaints are immediate.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import rich.console
import rich.table
import rich.text
import tyro

from eval.compare_command import Compare
from eval.data.items import Item
from eval.files import ANSWERS, REPORT, RESULTS, SUMMARY
from eval.harness import Outcome, batch_of, forget_scores, score
from eval.report.report import write_report
from eval.summary import write_summary
from eval.tasks import TASKS, Task, find_task, read_items
from glm4v_jax.config.checks import Positive
from glm4v_jax.config.presets import preset
from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.options import ModelOptions, SamplingOptions, generation_config, long_answer
from glm4v_jax.console.program import Command, JsonOptions, run_program
from glm4v_jax.console.progress import run_batch
from glm4v_jax.console.table import printable
from glm4v_jax.errors import ConfigError
from glm4v_jax.files import model_fingerprint, to_json
from glm4v_jax.generate.offline.batch import Batch

if TYPE_CHECKING:
    from glm4v_jax.config.generation import GenerationConfig
    from glm4v_jax.generate.engine import Engine
    from glm4v_jax.inputs.processor import Glm4vProcessor


class _Work(NamedTuple):
    """A task with all that it takes."""

    task: Task
    items: list[Item]
    out: pathlib.Path
    config: "GenerationConfig"
    batch: Batch


@dataclasses.dataclass(kw_only=True)
class Run(JsonOptions):
    """Answer the items of tasks and score the answers.

    A run that ended early goes on when called again, without asking anything twice. Into --out go answers.jsonl (what
    the model said), results.jsonl (what was understood, and its score), summary.json and report.html; with several
    tasks, into a directory each.
    """

    task: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="NAME|TOML", help_behavior_hint="(default: those with data in the package)"),
    ] = ()
    """What to ask; may be given more than once. `glm4v eval tasks` lists them."""

    data: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: the task's own)"),
    ] = ()
    """Files of the task's items, as they were downloaded or in our own format; may be given more than once."""

    out: Annotated[str, tyro.conf.arg(metavar="DIR")] = "eval-out"
    """Where answers, results, summary and report go."""

    limit: Annotated[Positive | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Ask the first N items only."""

    slots: Annotated[Positive, tyro.conf.arg(metavar="N")] = 8
    """How many items are answered at a time."""

    restart: bool = False
    """Do not go on, but ask all anew."""

    report: bool = True
    """Write report.html."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the summaries as JSON."""

    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    _engine: Any = dataclasses.field(default=None, init=False)  # tyro reads annotations, and must not import JAX

    def run(self) -> int:
        """Reads and checks all items, then loads the model, asks, and scores."""
        self.model.check()
        names = self.task or tuple(name for name, task in TASKS.items() if task.is_built_in)
        tasks = [self._asked(find_task(name)) for name in names]
        if self.data and len(tasks) != 1:
            raise ConfigError(f"--data: found with {len(tasks)} tasks, expected it with one --task")
        if len({task.name for task in tasks}) != len(tasks):
            raise ConfigError(f"--task: found {', '.join(task.name for task in tasks)}, expected each once")
        root = pathlib.Path(self.out)
        if root.exists() and not root.is_dir():
            raise ConfigError(f"--out: found {self.out}, a file; expected a directory or nothing")
        configs = [generation_config(self.model.directory, task.preset, task.options) for task in tasks]
        work = []
        for task, config in zip(tasks, configs, strict=True):
            items = read_items(task, self.data, limit=self.limit)
            out = root if len(tasks) == 1 else root / task.name
            work.append(
                _Work(task, items, out, config, batch_of(items, out, config, self.model.directory, self.model.dtype))
            )
        if not self.restart and not self.distributed.is_one_of_several:
            for part in work:
                part.batch.check()  # not hours later, when the tasks before it are done

        from glm4v_jax.inputs.processor import Glm4vProcessor

        processor = Glm4vProcessor.from_pretrained(self.model.directory)
        outcomes: dict[str, Outcome] = {}
        summaries = []
        for part in work:
            part.out.mkdir(parents=True, exist_ok=True)
            load = functools.partial(self._load, processor, part.out)
            summaries.append(run_batch(part.batch, processor, load, restart=self.restart, debug=self.debug))
            outcome = self._score(part)
            if outcome is not None:
                outcomes[part.task.name] = outcome
        if outcomes:
            self._tell(outcomes, root)
        for summary in summaries:
            summary.raise_if_failed()
        return 0

    def _load(self, processor: "Glm4vProcessor", out: pathlib.Path) -> "Engine":
        """The engine, which all tasks share; called when there is something to answer."""
        if self._engine is None:
            self._engine = self.model.load(processor, self.slots)
        from glm4v_jax.devices.distributed import is_first

        if is_first():
            forget_scores(out)
            (pathlib.Path(self.out) / SUMMARY).unlink(missing_ok=True)  # of several tasks: this one's score is in it
        return self._engine

    def _asked(self, task: Task) -> Task:
        """A task with the options of the command over its own."""
        given = self.sampling.given(default_new_tokens=None)
        options = {**task.options, **given}
        name = self.sampling.preset or task.preset
        from_preset = {} if name is None else preset(name)
        if given.get("max_new_tokens") is not None and "think_budget" not in given:
            options |= {"think_budget": None, "answer_budget": None}  # or they would take its place
        if "max_new_tokens" not in {**from_preset, **options}:
            options["max_new_tokens"] = long_answer(self.model.directory)
        system = task.system if self.sampling.system is None else self.sampling.system
        return dataclasses.replace(task, options=options, preset=name, system=system)

    def _score(self, part: "_Work") -> Outcome | None:
        """Only in the first process, which has written the answers."""
        from glm4v_jax.devices.distributed import is_first

        if not is_first():
            return None
        task, config = part.task, dataclasses.asdict(part.config)
        default = dataclasses.asdict(type(part.config)())
        about = {
            "model": str(pathlib.Path(self.model.directory).resolve()),
            "model_fingerprint": model_fingerprint(self.model.directory),
            "dtype": self.model.dtype,
            "prompt": task.prompt,
            "system": task.system,
            "preset": task.preset,
            "options": {name: value for name, value in config.items() if value != default[name]},
        }
        outcome = score(part.items, task, part.out, about, self.sampling.seed)
        if self.report:
            write_report(part.items, outcome.results, outcome.summary, part.out / REPORT)
        return outcome

    def _tell(self, outcomes: Mapping[str, Outcome], root: pathlib.Path) -> None:
        summaries = {name: outcome.summary for name, outcome in outcomes.items()}
        if len(outcomes) > 1:
            scores = {name: summary["score"] for name, summary in summaries.items()}
            write_summary({"score": sum(scores.values()) / len(scores), "scores": scores}, root / SUMMARY)
        if self.as_json:
            print(to_json(next(iter(summaries.values())) if len(summaries) == 1 else summaries))
            return
        _print_table(summaries)
        files = f"{ANSWERS}, {RESULTS}, {SUMMARY}{f', {REPORT}' if self.report else ''}"
        print(f"{root}: {files}{' in a directory for each task' if len(outcomes) > 1 else ''}", file=sys.stderr)


@dataclasses.dataclass(kw_only=True)
class Tasks(JsonOptions):
    """List the tasks that there are."""

    def run(self) -> int:
        """Prints them."""
        if self.as_json:
            print(to_json({name: dataclasses.asdict(task) for name, task in TASKS.items()}))
            return 0
        table = rich.table.Table("task", "metric", "what", box=None, pad_edge=False)
        for name, task in TASKS.items():
            table.add_row(name, task.metric, rich.text.Text(task.description))
        rich.console.Console(width=None if sys.stdout.isatty() else 200).print(table)
        return 0


COMMANDS: dict[str, Callable[..., Command]] = {"run": Run, "compare": Compare, "tasks": Tasks}

DESCRIPTION = (
    "Scores of GLM-4.1V, without a judge: your checkpoint, data sets as they are downloaded. Without a subcommand: run."
)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m eval") -> int:
    """Runs one subcommand.

    Args:
        arguments: what follows the program's name; that of this process by default.
        prog: the program's name in help and errors.

    Returns:
        The exit status: 0; 1 after one line on standard error that says what is wrong; 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["run", *given]
    return run_program(COMMANDS, given, name="eval", prog=prog, description=DESCRIPTION)


def _print_table(summaries: Mapping[str, Mapping[str, Any]]) -> None:
    console = rich.console.Console(width=None if sys.stdout.isatty() else 160)
    table = rich.table.Table(
        "task", "score", "95% interval", "n", "no answer", "not understood", "truncated", "errors",
        box=None, pad_edge=False,
    )  # fmt: skip
    for name, summary in summaries.items():
        rates, (low, high) = summary["rates"], summary["interval"]
        shares = (rates["no_answer"], rates["parse_failure"], summary["truncated_share"], rates["error"])
        table.add_row(
            printable(name), f"{summary['score']:.3f}", f"{low:.3f} to {high:.3f}", f"{summary['count']:,}",
            *(f"{share:.1%}" for share in shares),
        )  # fmt: skip
        for group, of in summary["groups"].items():
            table.add_row(f"  {printable(group)}", f"{of['mean']:.3f}", "", f"{of['count']:,}", *[""] * 4)
        for part, value in summary["parts"].items():
            table.add_row(f"  {printable(part)}", f"{value:.3f}", *[""] * 6)
    console.print(table)
