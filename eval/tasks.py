"""Tasks of evaluation: what is asked in which words, of which data, and how answers are scored.

A task is data. Those of `TASKS` ask as the public harnesses do, in their words (lmms-eval and VLMEvalKit of August
2026), but for grounding, which is asked for in the form that GLM-4.1V was trained for (arXiv 2507.01006). What a
harness does in its own way is a variant: "textvqa@lmms-eval". A user's own task is a TOML file with the fields of
`Task`.

>>> find_task("textvqa@lmms-eval").metric
'vqa_accuracy-lmms'
"""

import dataclasses
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from eval.catalogue import ENTRIES
from eval.data.adapters import READERS
from eval.data.digits import BUILT_IN
from eval.data.questions import template
from eval.metrics import METRICS
from glm4v_jax.config.checks import did_you_mean, fault, from_mapping, one_of, raise_faults, validate
from glm4v_jax.config.presets import PRESETS
from glm4v_jax.errors import ConfigError


def _one_of(names: Iterable[str]) -> Meta:
    names = list(names)
    pattern = rf"^({'|'.join(map(re.escape, names))})\Z"
    return Meta(pattern=pattern, description=one_of(names), extra={"choices": names})


_Directory = Annotated[str, Meta(pattern=r"^(?!\.)[^/]*[^/\s][^/]*\Z", description="the name of a directory")]
_VARIED = ("metric", "prompt", "system", "preset", "options")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked, and how answers are scored.

    Attributes:
      name: in `TASKS`, and of a directory of results.
      metric: name in `eval.metrics.METRICS`.
      description: what it measures, in a line.
      reader: of the rows: name in `eval.data.adapters.READERS`, or in `eval.data.digits.BUILT_IN` for packaged data.
      prompt: jinja2 template of the question's text, over the fields that the reader returns. Images stand before it.
      system: the system message.
      preset: name in `glm4v_jax.config.presets.PRESETS`; None for the checkpoint's options.
      options: of `GenerationConfig`, over the preset's: max_new_tokens, think_budget, answer_budget, do_sample, ...;
        the engine checks them.
      variants: name -> fields that differ in it: "prompt", "metric", "system", "preset", "options".
      data: which files to give.
      source: where task and prompt are from.

    Raises:
      ConfigError: all fields that do not fit.
    """

    name: _Directory
    metric: Annotated[str, _one_of(METRICS)]
    description: str = ""
    reader: Annotated[str, _one_of([*READERS, *BUILT_IN])] = "rows"
    prompt: str = "{{ question }}"
    system: str | None = None
    preset: Annotated[str, _one_of(PRESETS)] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    data: str = "files of rows as eval/data/rows.py describes them: .json, .jsonl, .parquet, .arrow, .csv, .tsv"
    source: str = ""

    def __post_init__(self) -> None:
        validate(self)
        template(self.prompt)
        for name in self.variants:
            self.variant(name)

    @property
    def is_built_in(self) -> bool:
        """Whether its data comes with the package."""
        return self.reader in BUILT_IN

    def variant(self, name: str) -> "Task":
        """Return the task in another way, called "TASK@NAME".

        Raises:
          ConfigError: there is no such variant, or its fields do not fit.
        """
        if name not in self.variants:
            expected = one_of(self.variants, name) if self.variants else "no variant"
            raise ConfigError(fault(f"--task {self.name}@", name, expected))
        fields, where = self.variants[name], f"variants.{name}."
        expected = f"some of {', '.join(_VARIED)}"
        raise_faults(
            [
                f"{where}{key}: found an unknown field; expected {expected}{did_you_mean(key, _VARIED)}"
                for key in fields
                if key not in _VARIED
            ]
        )
        try:
            return dataclasses.replace(self, **fields, name=f"{self.name}@{name}", variants={})
        except ConfigError as error:
            raise_faults([f"{where}{line}" for line in error.faults])
            raise


TASKS: Mapping[str, Task] = types.MappingProxyType({name: Task(name, **entry) for name, entry in ENTRIES.items()})
"""The tasks by name, of `eval.catalogue`."""


def find_task(name: str) -> Task:
    """Return a task by name, "NAME" or "NAME@VARIANT", or of a TOML file.

    Raises:
      OSError: the file cannot be read.
      ConfigError: there is no such task or variant, or the file is not a task.
    """
    if name.endswith(".toml"):
        return read_task(Path(name))
    base, separator, variant = name.partition("@")
    if base not in TASKS:
        raise ConfigError(fault("--task", base, f"a .toml file, or {one_of(TASKS, base)}"))
    return TASKS[base].variant(variant) if separator else TASKS[base]


def read_task(path: Path) -> Task:
    """Read the task in a TOML file: the fields of `Task`; its name is the file's unless it has one.

    Raises:
      OSError: the file cannot be read.
      ConfigError: it is not a task; names file and field, what was found and expected.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path}: found invalid TOML ({error}); expected a task") from error
    return from_mapping(Task, {"name": path.stem, **content}, where=f"{path}: ")
