"""How a subcommand of any program ends."""

import dataclasses
import json
from typing import Any

import pytest

from glm4v_jax.console import program
from glm4v_jax.errors import Glm4vError


@dataclasses.dataclass(kw_only=True)
class Work(program.JsonOptions):
    """Do something."""

    raises = None
    trouble = 2

    def run(self) -> int:
        if self.raises is not None:
            raise self.raises
        print(json.dumps({"json": self.as_json}))  # noqa: T201
        return 1

    def interrupted(self) -> str:
        return "work: half done"


def ran(*arguments: str, raises: Any = None) -> int:
    Work.raises = raises
    return program.run_program({"work": Work}, ["work", *arguments], name="it", prog="python -m it", description="")


def test_the_status_is_what_run_returns(capfd):
    assert ran("--json") == 1
    assert capfd.readouterr().out == '{"json": true}\n'


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (Glm4vError("file:\n found none"), 2, "it: error: file: found none\n"),
        (FileNotFoundError(2, "No such file", "a.toml"), 2, "it: error: a.toml: No such file\n"),
        (KeyboardInterrupt(), program.INTERRUPTED, "work: half done\n"),
    ],
)
def test_what_can_be_mended_is_a_line(capfd, error, status, said):
    assert ran(raises=error) == status
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", said)


def test_what_nobody_expected_is_a_traceback(capfd, monkeypatch):
    """With a status of the subcommand's own, where Python's 1 would be an answer; else by Python itself."""
    assert ran(raises=RuntimeError("broken")) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "RuntimeError: broken"
    monkeypatch.setattr(Work, "trouble", 1)
    with pytest.raises(RuntimeError, match="broken"):
        ran(raises=RuntimeError("broken"))


def test_debug_raises():
    with pytest.raises(Glm4vError, match="file"):
        ran("--debug", raises=Glm4vError("file"))
