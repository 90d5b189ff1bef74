"""How a command of any program is found, and how it ends."""

import dataclasses
import importlib.metadata
import io
import itertools
import json
import os
import sys
import tomllib
import warnings
from typing import Annotated, Any, Literal

import pytest
import tyro
from helpers_paths import ROOT
from msgspec import Meta

from glm4v_jax.config.checks import Positive
from glm4v_jax.console import extras, program, streams
from glm4v_jax.console.table import print_table
from glm4v_jax.errors import ConfigError, Glm4vError


@dataclasses.dataclass(kw_only=True)
class Limits:
    """What is allowed."""

    highest: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """At most 1."""


class Unsaid(KeyboardInterrupt):
    """The command has nothing to add to this one."""


@dataclasses.dataclass(kw_only=True)
class Work(program.JsonOptions):
    """Do something.

    In detail.
    """

    num_things: Annotated[Positive | None, tyro.conf.arg(metavar="N")] = None
    """How many."""

    mode: Literal["fast", "slow"] | None = None
    """How to do it,
    in one of two ways."""

    is_dry: bool = False
    """Do nothing."""

    limits: Limits = dataclasses.field(default_factory=Limits)

    raises = None
    trouble = 2

    def run(self) -> int:
        print(f"log level {os.environ.get('TF_CPP_MIN_LOG_LEVEL')}", file=sys.stderr)  # noqa: T201
        if self.raises is not None:
            raise self.raises
        print(json.dumps({"json": self.as_json}))  # noqa: T201
        return 1

    def interrupted(self) -> str | None:
        return None if isinstance(self.raises, Unsaid) else "work: half done"


@pytest.fixture(autouse=True)
def without_a_log_level(monkeypatch):
    """JAX sets one where it is imported."""
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)


def ran(*arguments: str, raises: Any = None) -> int:
    Work.raises = raises
    return run("work", *arguments)


def run(*arguments: str) -> int:
    others = {"other": "Do it elsewhere."}
    return program.run_program({"work": Work}, arguments, name="it", prog="python -m it", description="", others=others)


def test_the_status_is_what_run_returns(capfd):
    assert ran("--json") == 1
    assert capfd.readouterr().out == '{"json": true}\n'


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (Glm4vError("file:\n found none"), 2, "it: error: file: found none\n"),
        (FileNotFoundError(2, "No such file", "a.toml"), 2, "it: error: a.toml: found no such file; expected one\n"),
        (
            NotADirectoryError(20, "", f"{ROOT}/LICENSE/a"),
            2,
            f"it: error: {ROOT}/LICENSE: found a file; expected a directory\n",
        ),
        (KeyboardInterrupt(), program.INTERRUPTED, "work: half done\n"),
        (Unsaid(), program.INTERRUPTED, "it: interrupted\n"),
        (Unsaid("3 of 4"), program.INTERRUPTED, "3 of 4\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(capfd, error, status, said):
    assert ran(raises=error) == status
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", f"log level 3\n{said}")


def test_warnings_are_notes_of_one_line(capfd, monkeypatch):
    def warn(times):
        def run(work):
            for index in range(times):
                warnings.warn(f"scan {index}:\n 16 bits", stacklevel=1)
            return 0

        monkeypatch.setattr(Work, "run", run)

    warn(2)
    assert ran() == 0
    assert capfd.readouterr().err == "it: note: scan 0: 16 bits\nit: note: scan 1: 16 bits\n"
    warn(100)
    assert ran() == 0
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-2:] == [
        "it: note: scan 19: 16 bits",
        "it: note: more of this kind are not shown",
    ]
    assert ran("-q") == 0
    assert capfd.readouterr().err == ""
    warn(1)
    with pytest.warns(UserWarning, match="scan 0:"):
        ran("-v")


def test_a_compilation_cache_that_fails_is_one_note(capfd, monkeypatch):
    def run(work):
        for name in ("jit_prefill", "jit_decode"):
            warnings.warn(f"Error reading persistent compilation cache entry for {name!r}: OSError: full", stacklevel=1)
        return 0

    monkeypatch.setattr(Work, "run", run)
    assert ran() == 0
    (note,) = capfd.readouterr().err.splitlines()
    assert note.startswith("it: note: the cache of compiled programs fails") and note.endswith("(OSError: full)")


def test_quiet_leaves_answers_and_errors(capfd):
    assert ran("-q", "--json") == 1
    assert capfd.readouterr() == ('{"json": true}\n', "")
    assert ran("--quiet", raises=Glm4vError("file")) == 2
    assert capfd.readouterr() == ("", "it: error: file\n")


def test_verbose_leaves_the_logs_of_native_code_alone(capfd):
    assert ran("-v") == 1
    assert capfd.readouterr().err == "log level None\n"
    assert not {"TF_CPP_MIN_LOG_LEVEL", "JAX_LOG_COMPILES"} & os.environ.keys()


def test_quiet_and_verbose_exclude_each_other(capfd):
    assert ran("-q", "-v") == 2
    assert capfd.readouterr() == ("", "it: error: --quiet: found with --verbose; expected one of the two\n")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_takes_what_is_written_to_it(capfd, monkeypatch, name):
    """Python has None for a stream that the shell closed."""
    monkeypatch.setattr(sys, name, None)
    assert ran("--json") == 1
    getattr(sys, name).close()
    assert getattr(capfd.readouterr(), name.removeprefix("std")) == ""


def test_an_unknown_choice_lists_the_choices_alone(capfd):
    assert ran("--mode", "slow") == 1
    with pytest.raises(SystemExit) as caught:
        ran("--mode", "nope")
    message = capfd.readouterr().err
    assert caught.value.code == program.USAGE and "None" not in message
    assert "'fast'" in message and "'slow'" in message


@pytest.mark.parametrize(("option", "status"), [("-q", 2), ("--help", 1)])
def test_a_full_disk_behind_standard_output_is_one_line(capfd, monkeypatch, option, status):
    """As in `glm4v eval tasks > file`; Python flushes once more at its end, which must not fail.

    Help is printed before there is a command.
    """
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert ran(option) == status
    assert capfd.readouterr().err == "it: error: standard output: [Errno 28] No space left on device\n"


def test_a_note_is_written_in_one_call(monkeypatch):
    """Decoding threads note things while the main thread reports an error: neither line may be split."""
    written = []
    stream = io.StringIO()
    monkeypatch.setattr(stream, "write", written.append)
    monkeypatch.setattr(sys, "stderr", stream)
    with streams.notes("it", quiet=False):
        warnings.warn("a.png: is large", stacklevel=1)
    assert written == ["it: note: a.png: is large\n"]


def test_errors_name_options_as_they_are_given(capfd):
    assert ran(raises=ConfigError("num_things: found 0; expected 1; highest: found 2; raises: found 3")) == 2
    line = "it: error: --num-things: found 0; expected 1; --highest: found 2; raises: found 3"
    assert capfd.readouterr().err.splitlines()[-1] == line


def test_a_full_disk_behind_standard_error_does_not_end_a_server(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", open("/dev/full", "w", buffering=1))  # noqa: SIM115  # closing it would fail
        with streams.losing_errors():
            sys.stderr.write("serving\n")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def test_an_unexpected_error_is_a_traceback(capfd, monkeypatch):
    """With the command's own status, where Python's 1 would be a result; else by Python itself."""
    assert ran(raises=RuntimeError("broken")) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "RuntimeError: broken"
    monkeypatch.setattr(Work, "trouble", 1)
    with pytest.raises(RuntimeError, match="broken"):
        ran(raises=RuntimeError("broken"))


@pytest.mark.parametrize(
    ("encoding", "errors"), [("ascii", "strict"), ("ascii", "surrogateescape"), ("utf-8", "strict")]
)
def test_what_the_output_cannot_hold_is_escaped(monkeypatch, encoding, errors):
    """In a C locale, and names of files that are not valid Unicode anywhere."""
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr(Work, "run", lambda self: print_table(["\u732b", "b"], [["\u2026", os.fsdecode(b"\xff.png")]]))
    assert ran() == 0
    output.flush()
    cat, dots = ("\u732b", "\u2026") if encoding == "utf-8" else (r"\u732b", r"\u2026")
    written = output.buffer.getvalue().decode(encoding)
    assert cat in written and dots in written and r"\udcff.png" in written


@pytest.mark.parametrize("option", ["-v", "--verbose"])
def test_verbose_raises_the_error(option):
    with pytest.raises(Glm4vError, match="file"):
        ran(option, raises=Glm4vError("file"))


def test_help_lists_every_command_in_a_line(capfd):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    out = capfd.readouterr().out
    assert caught.value.code == 0
    assert "In detail" not in out
    assert "• work Do something." in " ".join(out.split()) and "• other Do it elsewhere." in " ".join(out.split())


def test_help_of_an_option_has_no_line_breaks_no_none_and_no_default_of_a_flag(capfd):
    with pytest.raises(SystemExit):
        run("work", "--help")
    lines = [" ".join(line.strip("│ ").split()) for line in capfd.readouterr().out.splitlines()]
    assert "--mode {fast,slow} How to do it, in one of two ways. (default: none)" in lines
    assert "--is-dry Do nothing." in lines


def test_a_process_prepares_the_options_of_a_command_once(capfd):
    """Or each command that it runs would make the next one slower to read."""
    ran()
    prepared = [dict(cls.__annotations__) for cls in Work.__mro__ if dataclasses.is_dataclass(cls)]
    ran("--is-dry")
    assert [dict(cls.__annotations__) for cls in Work.__mro__ if dataclasses.is_dataclass(cls)] == prepared


@pytest.mark.parametrize("width", [80, 120])
def test_help_is_as_wide_as_the_terminal(capfd, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(Work, "__doc__", f"Do it.\n\n{'many words ' * 9}\n/and a line that begins with none.")
    with pytest.raises(SystemExit):
        run("work", "--help")
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and any(len(line) > width - 12 and line[0] == "m" for line in lines)
    assert " many words /and a line" in " ".join(lines)


@pytest.mark.parametrize(
    ("name", "expected"), [("wrok", "did you mean 'work'?"), ("othre", "did you mean 'other'?"), ("x", "work, other")]
)
def test_an_unknown_command_is_answered_with_the_closest(capfd, name, expected):
    with pytest.raises(SystemExit) as caught:
        run(name)
    line = capfd.readouterr().err
    assert caught.value.code == 2
    assert line.startswith(f"python -m it: error: found command {name!r}; ") and line.endswith(f"{expected}\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--num-things", "two"), "--num-things: found 'two'; expected an integer of at least 1"),
        (("--num-things", "1.5"), "--num-things: found '1.5'; expected an integer of at least 1"),
        (("--highest", "most"), "--highest: found 'most'; expected a number above 0 and at most 1"),
    ],
)
def test_values_of_another_type_are_answered_in_words(capfd, words, says):
    with pytest.raises(SystemExit) as caught:
        run("work", *words)
    error = " ".join(capfd.readouterr().err.translate({ord("│"): " "}).split())
    assert caught.value.code == 2
    assert says in error and "typing" not in error and "Annotated" not in error


def test_numbers_out_of_range_are_named_together(capfd):
    assert ran("--num-things", "0", "--highest", "1.5") == 2
    assert capfd.readouterr().err == (
        "it: error: --num-things: found 0; expected an integer of at least 1; --highest: found 1.5; expected a number "
        "above 0 and at most 1\n"
    )


def test_every_package_of_every_extra_is_known(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(
        f"{line}; extra == '{extra}'" for extra, every in project["optional-dependencies"].items() for line in every
    )]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    found = extras.extras()
    assert {"train", "eval", "demo", "test", "docs"} <= found.keys() and "rapidfuzz" in found["eval"]
    assert "jax" in extras.requirements() and not {"decord", "jax"} & set(itertools.chain(*found.values()))
    for module, name, extra in (
        ("rapidfuzz.distance", "eval", "eval"), ("rapidfuzz", "train", "train"), ("sklearn", "glm4v", "eval"),
        ("skimage.io", "glm4v", "demo"), ("furo", "glm4v", "docs"),
    ):  # fmt: skip
        line = extras.missing(ModuleNotFoundError(name=module), name)
        root = module.partition(".")[0]
        assert line == f"found no package {root}; expected that of the {extra} extra: pip install 'glm4v_jax[{extra}]'"
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: None)
    assert extras.missing(ModuleNotFoundError(name="rapidfuzz"), "eval") is None
