"""Tasks of evaluation: what is asked in which words, of which data, and how answers are scored.

A task is data. Those of `TASKS` ask as the public harnesses do, in their words (lmms-eval and VLMEvalKit of August
2026), but for grounding, which is asked for in the form that GLM-4.1V was trained for (arXiv 2507.01006). What a
harness does in its own way is a variant: "textvqa@lmms-eval". A user's own task is a TOML file with the fields of
`Task`.
"""

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.catalogue import ENTRIES
from eval.data.adapters import READERS
from eval.data.digits import BUILT_IN
from eval.data.questions import template
from eval.metrics import METRICS
from eval.read_items import read_items
from glm4v_jax.config.presets import PRESETS
from glm4v_jax.data.media import kind_of
from glm4v_jax.errors import ConfigError

__all__ = ["TASKS", "Task", "find_task", "read_items"]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked, and how answers are scored.

    Attributes:
      name: in `TASKS`, and of a directory of results.
      metric: name in `eval.metrics.METRICS`.
      description: what it measures, in a line.
      reader: of the rows: name in `eval.data.adapters.READERS`, or in `eval.data.digits.BUILT_IN` for packaged data.
      prompt: jinja2 template of the question's text; what it can name, the reader says. Pictures stand before it.
      system: what the system says first.
      preset: name in `glm4v_jax.config.presets.PRESETS`; None for what the checkpoint says.
      options: of `GenerationConfig`, over the preset's: max_new_tokens, think_budget, answer_budget, do_sample, ...
      variants: name -> fields that are different in it: "prompt", "metric", "system", "preset", "options".
      data: which files to give.
      source: where task and prompt are from.
    """

    name: str
    metric: str
    description: str = ""
    reader: str = "rows"
    prompt: str = "{{ question }}"
    system: str | None = None
    preset: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    data: str = "files of rows as eval/data/rows.py describes them: .json, .jsonl, .parquet, .tsv"
    source: str = ""

    @property
    def is_built_in(self) -> bool:
        """Whether its data comes with the package."""
        return self.reader in BUILT_IN

    def variant(self, name: str) -> "Task":
        """The task in another way, called "TASK@NAME".

        Raises:
          ConfigError: there is no such variant.
        """
        if name not in self.variants:
            raise ConfigError(f"--task {self.name}: found variant {name!r}, expected {_one_of(self.variants)}")
        return dataclasses.replace(self, **self.variants[name], name=f"{self.name}@{name}", variants={})

    def check(self, where: str) -> None:
        """Look whether what it names is there; not the generation options, which the engine checks.

        Args:
          where: put before errors.

        Raises:
          ConfigError: it is not; names the field, what was found and expected.
        """
        known: Mapping[str, tuple[str | None, Mapping[str, Any]]] = {
            "metric": (self.metric, METRICS),
            "reader": (self.reader, {**READERS, **BUILT_IN}),
            "preset": (self.preset, PRESETS),
        }
        for field, (found, there) in known.items():
            if found is not None and found not in there:
                raise ConfigError(f"{where}: field {field!r}: found {found!r}, expected {_one_of(there)}")
        if "/" in self.name or not self.name.strip() or self.name.startswith("."):
            raise ConfigError(f"{where}: field 'name': found {self.name!r}, expected the name of a directory")
        try:
            template(self.prompt)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        for name in self.variants:
            self.variant(name).check(f"{where}@{name}")


TASKS: Mapping[str, Task] = types.MappingProxyType({name: Task(name, **entry) for name, entry in ENTRIES.items()})
"""The tasks there are, by name; `eval.catalogue` writes them down."""

_TEXTS = ("name", "metric", "description", "reader", "prompt", "system", "preset", "data", "source")
_TABLES = ("options", "variants")
_VARIED = ("metric", "prompt", "system", "preset", "options")


def find_task(name: str) -> Task:
    """A task by name, "NAME" or "NAME@VARIANT", or of a TOML file.

    Raises:
      OSError: the file cannot be read.
      ConfigError: there is no such task or variant, or the file is none; names the field, what was found and expected.
    """
    if name.endswith(".toml"):
        return read_task(name)
    base, separator, variant = name.partition("@")
    if base not in TASKS:
        close = difflib.get_close_matches(base, TASKS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"--task: found {base!r}, expected {_one_of(TASKS)}, or a .toml file{hint}")
    return TASKS[base].variant(variant) if separator else TASKS[base]


def read_task(path: str | Path) -> Task:
    """The task in a TOML file: the fields of `Task`; the file's name is the task's where it says none.

    Raises:
      OSError: the file cannot be read.
      ConfigError: it is no task; names file and field, what was found and expected.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except ValueError as error:
        raise ConfigError(f"{path}: found what is not TOML ({error}), expected a task") from error
    content = {"name": path.stem, **content}
    _check_fields(content, (*_TEXTS, *_TABLES), str(path))
    if "metric" not in content:
        raise ConfigError(f"{path}: field 'metric': missing, expected {_one_of(METRICS)}")
    for name, fields in content.get("variants", {}).items():
        where = f"{path}: variants.{name}"
        if not isinstance(fields, dict):
            raise ConfigError(f"{where}: found {kind_of(fields)}, expected a table")
        _check_fields(fields, _VARIED, where)
    task = Task(**content)
    task.check(str(path))
    return task


def _check_fields(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for field, value in content.items():
        if field not in known:
            raise ConfigError(f"{where}: field {field!r}: is not known, expected some of {', '.join(known)}")
        expected, name = (dict, "a table") if field in _TABLES else (str, "a text")
        if not isinstance(value, expected):
            raise ConfigError(f"{where}: field {field!r}: found {kind_of(value)}, expected {name}")


def _one_of(names: Mapping[str, Any]) -> str:
    return f"one of {', '.join(names)}" if names else "none"
