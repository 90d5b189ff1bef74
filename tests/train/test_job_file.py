"""Job files to begin with: they load as they are, and have every field with its explanation and its default."""

import dataclasses
import re
import tomllib
import typing

import pytest

from glm4v_jax.config.checks import dataclasses_in, entry_in, hints
from train import JobKind
from train.commands import main
from train.config import TrainConfig, load_config
from train.job_file import explanations, job_file

KINDS = typing.get_args(JobKind)
ABSENT = {
    "sft": {"lora", "quantize", "preference", "rl", "data.levels"},
    "lora": {"freeze", "preference", "rl", "data.levels"},
    "preference": {"rl", "data.levels"},
    "rl": {"epochs", "eval", "preference", "neftune", "data.sets", "lora.dropout"},
}
"""What a job of a kind cannot have, or has no use for."""


def fields_of(cls, path=""):
    """(path, dataclass, field, of a table in it or not) of all fields below a dataclass."""
    for field in dataclasses.fields(cls):
        hint = hints(cls)[field.name]
        inner = (entry,) if (entry := entry_in(hint)) else dataclasses_in(hint)
        yield f"{path}{field.name}", cls, field, bool(inner)
        for one in inner:
            yield from fields_of(one, f"{path}{field.name}.")


def settings_of(text):
    """Path of a field -> whether it is commented out, and its value; names of entries of tables are left out."""
    found, table = {}, ""
    for line in text.splitlines():
        if header := re.fullmatch(r"#?\[([\w.]+)\]", line):
            table = re.sub(r"\.(NAME|DOMAIN)$", "", header[1]) + "."
        elif setting := re.fullmatch(r"(#?)(\w+) =(.*)", line):
            found[table + setting[2]] = bool(setting[1]), setting[3].strip()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_loads_as_it_is(kind, tmp_path, capsys):
    assert main(["init", kind]) == 0
    (tmp_path / "job.toml").write_text(capsys.readouterr().out)
    config = load_config(tmp_path / "job.toml")
    assert [config.lora is not None, config.preference is not None, config.rl is not None] == [
        kind == other for other in ("lora", "preference", "rl")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_there_with_what_it_means_and_its_default(kind):
    text = job_file(kind)
    settings, comments = settings_of(text), " ".join(text.replace("# ", "").split())
    expected = {
        path: (cls, field)
        for path, cls, field, is_table in fields_of(TrainConfig)
        if not is_table and not any(path == one or path.startswith(f"{one}.") for one in ABSENT[kind])
    }
    assert settings.keys() == expected.keys()
    for path, (cls, field) in expected.items():
        assert explanations(cls)[field.name] in comments, path
        is_comment, value = settings[path]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING or path in ("data.files", "steps", "epochs"):
            assert "required" in value, path
        elif default is None:
            assert not is_comment or value.endswith("not set"), path
        elif is_comment:
            found = tomllib.loads(f"x = {value}")["x"]
            assert (tuple(found) if isinstance(found, list) else found) == default, path


def test_explanations_are_of_all_fields_of_all_tables():
    for path, cls, field, _ in fields_of(TrainConfig):
        assert len(explanations(cls).get(field.name, "")) > len(field.name) + 5, path


def test_another_kind_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["init", "dpo"])
    assert "preference" in capsys.readouterr().err


def test_epochs_are_offered_in_place_of_steps_where_a_job_may_have_them():
    lines = job_file("rl").splitlines()
    assert "steps = 500  # required" in lines and 'files = ["problems.jsonl"]  # required' in lines
    assert "epochs = 3  # required, or steps" in job_file("lora").splitlines()
