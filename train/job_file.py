"""A job file to begin with, made of the dataclasses of a job: all fields, their explanations and their defaults."""

import dataclasses
import inspect
import json
import math
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from glm4v_jax.config.checks import dataclasses_in, entry_in, expectation, hints
from train import JobKind
from train.config import TrainConfig

_WIDTH = 118
_FIELDS = re.compile(r"^  (\w+(?:, \w+)*): ((?:.+\n?)(?:^    .+\n?)*)", re.M)
"""Of a section of attributes: their names, and what is said of them."""
_EITHER = {"steps": "epochs", "epochs": "steps", "data.files": "data.sets"}
"""Field that a job needs although it has a default -> the field that may be set instead."""


class _Job(NamedTuple):
    """A kind of job: what it is, the fields that are set, path -> value, and those that it does not have."""

    title: str
    values: Mapping[str, Any]
    without: Sequence[str]


_SET: Mapping[str, Any] = {"model": "path/to/GLM-4.1V-9B-Thinking", "out": "out", "data.files": ["data.jsonl"]}
_JOBS: Mapping[JobKind, _Job] = {
    "sft": _Job(
        "Full fine-tuning",
        {"epochs": 3, "freeze": ["vision"], "optimizer.learning_rate": 1e-5},
        ("lora", "quantize", "preference", "rl", "data.levels"),
    ),
    "lora": _Job(
        "Fine-tuning of an adapter (LoRA)",
        {"epochs": 3, "lora.rank": 16, "lora.alpha": 32.0, "optimizer.learning_rate": 1e-4},
        ("freeze", "preference", "rl", "data.levels"),
    ),
    "preference": _Job(
        "Learning which of two answers is preferred (DPO and its relatives)",
        {"epochs": 1, "preference.loss": "dpo", "preference.beta": 0.1, "optimizer.learning_rate": 1e-6},
        ("rl", "data.levels"),
    ),
    "rl": _Job(
        "Learning by reward",
        {
            "steps": 500, "data.files": ["problems.jsonl"], "batch.length": 16384, "optimizer.learning_rate": 1e-6,
            "rl.verifiers.DOMAIN.kind": "math",
        },
        ("epochs", "eval", "preference", "neftune", "data.sets", "lora.dropout"),
    ),
}  # fmt: skip


def job_file(kind: JobKind) -> str:
    """Return the TOML of a job, with every field that such a job has: what it needs is set, the rest is commented out.

    >>> print(job_file("lora").partition(":")[0])
    # Fine-tuning of an adapter (LoRA)
    """
    job = _JOBS[kind]
    about = (
        f"{job.title}: change what is set, and run `glm4v train FILE`. The lines that begin with # and a name have the "
        "defaults. Paths are relative to this file."
    )
    lines = _table(TrainConfig, "", {**_SET, **job.values}, job.without)
    return "\n".join([*_comment(about), *lines, ""])


def _table(cls: type, path: str, values: Mapping[str, Any], without: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a dataclass, first its fields and then the tables in it."""
    texts = explanations(cls)
    tables = []
    said = None
    for field in dataclasses.fields(cls):
        name, hint = f"{path}{field.name}", hints(cls)[field.name]
        if name in without:
            continue
        entry = entry_in(hint)
        if inner := (entry,) if entry else dataclasses_in(hint):
            tables.append((name, inner[0], entry is not None, field))
            continue
        if texts[field.name] != said:
            yield from ("", *_comment(texts[field.name]))
        said = texts[field.name]
        yield _setting(name, field, hint, values, without)
    for name, inner_class, is_entry, field in tables:
        below = [key.removeprefix(f"{name}.") for key in values if key.startswith(f"{name}.")]
        is_set = bool(below) or (field.default is dataclasses.MISSING and not is_entry)
        name += f".{below[0].partition('.')[0] if below else 'NAME'}" if is_entry else ""
        text = texts[field.name]
        yield from (
            "",
            *_comment(f"{field.name}: {_first_line(inner_class)}" if text.endswith(": see there.") else text),
        )
        yield f"{'' if is_set else '#'}[{name}]"
        yield from _table(inner_class, f"{name}.", values, without)


def _setting(path: str, field: Any, hint: Any, values: Mapping[str, Any], without: Sequence[str]) -> str:
    """Return the line of a field."""
    other = _EITHER.get(path)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    is_required = default is dataclasses.MISSING
    instead = f", or {other}" if other and other not in without else ""
    notes = [f"required{instead}"] if other or is_required else []
    if path in values:
        return f"{field.name} = {toml(values[path])}{_note(notes)}"
    if is_required or default is None or other:
        return f"#{field.name} ={_note([expectation(hint), *(notes or ['not set'])])}"
    if typing.get_origin(hint) is Literal:
        notes.append(expectation(hint))
    return f"#{field.name} = {toml(default)}{_note(notes)}"


def explanations(cls: type) -> dict[str, str]:
    """Return field -> what the docstrings of a dataclass, and of those that it inherits from, say of it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, attributes = (inspect.getdoc(base) or "").partition("\nAttributes:\n")
        for names, text in _FIELDS.findall(attributes):
            found |= dict.fromkeys(names.split(", "), f"{names}: {' '.join(text.split())}")
    return found


def toml(value: Any) -> str:
    """Return a value as TOML writes it.

    >>> toml([1e-5, "a"]), toml(float("inf")), toml(True), toml({"llm": 1.0})
    ('[1e-05, "a"]', 'inf', 'true', '{ "llm" = 1.0 }')
    """
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{toml(key)} = {toml(item)}' for key, item in value.items())} }}" if value else "{}"
    return repr(value) if isinstance(value, float) and not math.isnan(value) else json.dumps(value)


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0].removesuffix(".")


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )


def _note(notes: Sequence[str]) -> str:
    return f"  # {'; '.join(notes)}" if notes else ""
