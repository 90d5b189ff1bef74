"""`python -m eval`, also `glm4v eval`: score a checkpoint, task by task.

JAX is imported only after items and options are checked, so that help and errors are immediate.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from eval.compare_command import Compare
from eval.data.items import Item
from eval.read_items import read_items
from eval.report.report import write_report
from eval.results import ANSWERS, REPORT, RESULTS, SUMMARY
from eval.summary import score_run, write_summary
from eval.tasks import TASKS, Task, find_task
from glm4v_jax.config.checks import Positive
from glm4v_jax.config.presets import preset
from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.options import ModelOptions, SamplingOptions, generation_config, long_answer
from glm4v_jax.console.program import Command, JsonOptions, run_program
from glm4v_jax.console.progress import run_batch
from glm4v_jax.console.table import print_table
from glm4v_jax.errors import ConfigError
from glm4v_jax.files import fingerprint, made_directory, model_fingerprint, to_json
from glm4v_jax.generate.completion import completion_fields
from glm4v_jax.generate.offline.batch import PromptBatch
from glm4v_jax.generate.offline.prompts import BatchPrompt

if TYPE_CHECKING:
    from glm4v_jax.config.generation import GenerationConfig
    from glm4v_jax.generate.completion import Completion
    from glm4v_jax.generate.engine import Engine
    from glm4v_jax.inputs.processor import Glm4vProcessor


class _Job(NamedTuple):
    """A task with its items, and the batch of prompts that writes their answers."""

    task: Task
    items: list[Item]
    out: pathlib.Path
    config: "GenerationConfig"
    batch: PromptBatch


@dataclasses.dataclass(kw_only=True)
class RunTasks(JsonOptions):
    """Answer the items of tasks and score the answers.

    An interrupted run resumes when it is called again, and asks nothing twice. --out gets answers.jsonl (what the model
    wrote), results.jsonl (what was parsed of it, and its score), summary.json and report.html; with several tasks, in a
    directory each.
    """

    task: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="NAME|TOML", help_behavior_hint="(default: those with data in the package)"),
    ] = ()
    """A task, or a TOML file with one. `glm4v eval tasks` lists the tasks of the package."""

    data: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: the task's own)"),
    ] = ()
    """A file of the task's items, as published or in our own format."""

    out: Annotated[str, tyro.conf.arg(metavar="DIR")] = "eval-out"
    """Output directory for answers, results, summary and report."""

    limit: Annotated[Positive | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Answer the first N items only."""

    slots: Annotated[Positive, tyro.conf.arg(metavar="N")] = 8
    """Answer this many items at a time."""

    restart: bool = False
    """Answer all items again instead of resuming."""

    no_report: bool = False
    """Do not write report.html."""

    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    _engine: Any = dataclasses.field(default=None, init=False)  # tyro reads annotations, and must not import JAX

    def run(self) -> int:
        """Read and check all items, then load the model, answer, and score."""
        import rapidfuzz  # noqa: F401  # metrics use it once there are answers; if it is missing, that shows now

        self.model.check()
        names = self.task or tuple(name for name, task in TASKS.items() if task.is_built_in)
        tasks = [self._with_options(find_task(name)) for name in names]
        if self.data and len(tasks) != 1:
            raise ConfigError(f"--data: found with {len(tasks)} tasks; expected it with one --task")
        if len({task.name for task in tasks}) != len(tasks):
            raise ConfigError(f"--task: found {', '.join(task.name for task in tasks)}; expected each once")
        root = pathlib.Path(self.out)
        if root.exists() and not root.is_dir():
            raise ConfigError(f"--out: found {self.out}, a file; expected a directory or nothing")
        configs = [generation_config(self.model.directory, task.preset, task.options) for task in tasks]
        jobs = []
        for task, config in zip(tasks, configs, strict=True):
            items = read_items(task, self.data, limit=self.limit)
            out = root if len(tasks) == 1 else root / task.name
            jobs.append(_Job(task, items, out, config, self._batch(items, out, config)))
        if not self.restart and not self.distributed.is_one_of_several:
            for job in jobs:
                job.batch.check()  # not hours later, after the tasks before it

        from glm4v_jax.devices.distributed import is_first
        from glm4v_jax.inputs.processor import Glm4vProcessor

        processor = Glm4vProcessor.from_pretrained(self.model.directory)
        summaries: dict[str, dict[str, Any]] = {}
        batches = []
        for job in jobs:
            load = functools.partial(self._load, processor, job.out)
            with made_directory(job.out):
                batches.append(run_batch(job.batch, processor, load, restart=self.restart, verbose=self.verbose))
            if is_first():  # which has written the answers
                summaries[job.task.name] = self._score(job)
        if summaries:
            self._print(summaries, root)
        for batch in batches:
            batch.raise_if_failed()
        return 0

    def _load(self, processor: "Glm4vProcessor", out: pathlib.Path) -> "Engine":
        """Return the engine, which all tasks share; called when there is something to answer."""
        if self._engine is None:
            self._engine = self.model.load(processor, self.slots)
        from glm4v_jax.devices.distributed import is_first

        if is_first():
            # Scores of earlier answers, and those of several tasks, which include them.
            for path in (out / RESULTS, out / SUMMARY, out / REPORT, pathlib.Path(self.out) / SUMMARY):
                path.unlink(missing_ok=True)
        return self._engine

    def _batch(self, items: Sequence[Item], out: pathlib.Path, config: "GenerationConfig") -> PromptBatch:
        """Make the batch of prompts; the seed of an item's draws comes from its id and the config's seed."""
        return PromptBatch(
            [BatchPrompt(item.id, item.messages, item.asked, place=item.place) for item in items],
            str(out / ANSWERS),
            config,
            self.model.sources,
            dtype=self.model.precision,
            name_field="id",
            answer_fields=_answer_fields,
            things="items",
            keep_others=True,  # a run over the first few items does not undo one over all
        )

    def _with_options(self, task: Task) -> Task:
        """Return a task with the options of the command over its own."""
        given = self.sampling.given(default_new_tokens=None)
        options = {**task.options, **given}
        name = self.sampling.preset or task.preset
        from_preset = {} if name is None else preset(name)
        if given.get("max_new_tokens") is not None and "think_budget" not in given:
            options |= {"think_budget": None, "answer_budget": None}  # which would replace it
        if "max_new_tokens" not in {**from_preset, **options}:
            options["max_new_tokens"] = long_answer(self.model.directory)
        system = task.system if self.sampling.system is None else self.sampling.system
        return dataclasses.replace(task, options=options, preset=name, system=system)

    def _score(self, job: _Job) -> dict[str, Any]:
        """Score the answers of a task, write everything but them, and return the summary."""
        task, config = job.task, dataclasses.asdict(job.config)
        default = dataclasses.asdict(type(job.config)())
        about = {
            "model": str(pathlib.Path(self.model.directory).resolve()),
            "model_fingerprint": model_fingerprint(self.model.directory),
            **self._adapter(),
            "dtype": self.model.precision,
            "prompt": task.prompt,
            "system": task.system,
            "preset": task.preset,
            "options": {name: value for name, value in config.items() if value != default[name]},
        }
        results, summary = score_run(job.items, task, job.out, about, self.sampling.seed)
        if not self.no_report:
            write_report(job.items, results, summary, job.out / REPORT)
        return summary

    def _adapter(self) -> dict[str, str]:
        """Return what the summary says of the adapter, if there is one."""
        directory = self.model.adapter
        if directory is None:
            return {}
        return {"adapter": str(pathlib.Path(directory).resolve()), "adapter_fingerprint": fingerprint(directory)}

    def _print(self, summaries: Mapping[str, Mapping[str, Any]], root: pathlib.Path) -> None:
        if len(summaries) > 1:
            scores = {name: summary["score"] for name, summary in summaries.items()}
            write_summary({"score": sum(scores.values()) / len(scores), "scores": scores}, root / SUMMARY)
        if self.as_json:
            print(to_json(next(iter(summaries.values())) if len(summaries) == 1 else summaries))
            return
        _print_summaries(summaries)
        files = f"{ANSWERS}, {RESULTS}, {SUMMARY}{'' if self.no_report else f', {REPORT}'}"
        print(f"{root}: {files}{' in a directory for each task' if len(summaries) > 1 else ''}", file=sys.stderr)


@dataclasses.dataclass(kw_only=True)
class ListTasks(JsonOptions):
    """List the tasks of the package."""

    def run(self) -> int:
        """Print them."""
        if self.as_json:
            print(to_json({name: dataclasses.asdict(task) for name, task in TASKS.items()}))
            return 0
        print_table(("task", "metric", "what"), [(name, task.metric, task.description) for name, task in TASKS.items()])
        return 0


COMMANDS: dict[str, Callable[..., Command]] = {"run": RunTasks, "compare": Compare, "tasks": ListTasks}

DESCRIPTION = (
    "Score a GLM-4.1V checkpoint on data sets as they are published, without a judge model. Without a subcommand: run."
)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m eval") -> int:
    """Run one subcommand; `arguments` are those of this process by default, `prog` is the program's name in help.

    Returns the exit status: 0; 1 after an error, which is one line on standard error; 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["run", *given]
    return run_program(COMMANDS, given, name="eval", prog=prog, description=DESCRIPTION)


def _answer_fields(completion: "Completion", processor: "Glm4vProcessor") -> dict[str, Any]:
    return {**completion_fields(completion, processor.tokenizer), "seconds": round(completion.seconds, 3)}


def _print_summaries(summaries: Mapping[str, Mapping[str, Any]]) -> None:
    columns = ("task", "score", "95% interval", "n", "no answer", "not parsed", "truncated", "errors")
    rows = []
    for name, summary in summaries.items():
        rates, (low, high) = summary["rates"], summary["interval"]
        fractions = (rates["no_answer"], rates["parse_failure"], summary["truncated_share"], rates["error"])
        figures = f"{summary['score']:.3f}", f"{low:.3f} to {high:.3f}", f"{summary['count']:,}"
        rows.append((name, *figures, *(f"{fraction:.1%}" for fraction in fractions)))
        for group, of in summary["groups"].items():
            rows.append((f"  {group}", f"{of['mean']:.3f}", "", f"{of['count']:,}", *[""] * 4))
        rows += [(f"  {part}", f"{value:.3f}", *[""] * 6) for part, value in summary["parts"].items()]
    print_table(columns, rows)
