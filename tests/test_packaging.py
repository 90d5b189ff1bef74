"""What pyproject.toml promises of the packages, and what the whole check does where something cannot be had."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from helpers_cli import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
NAMES = {
    "PIL": "pillow",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "prometheus_client": "prometheus-client",
    "math_verify": "math-verify",
    "tpu_inference": "tpu-inference",
}
"""Of packages that are imported by another name."""
EXTRAS = ("train", "wandb", "trackio", "eval", "grammar", "serve", "vllm-tpu", "rl")
"""Of packages that modules import."""
OPTIONAL = {"lmms_eval"}
"""Looked for, and done without."""


def declared():
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *(one for name in EXTRAS for one in extras[name])]
    return {"".join(c if c.isalnum() or c in "-_" else " " for c in one).split()[0] for one in asked}


def imported():
    """Root of each package of somebody else's that a module imports -> one such module."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                found |= {name.partition(".")[0]: path for name in names}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, *PACKAGES}}


def test_what_is_imported_is_declared():
    missing = {name: path for name, path in imported().items() if NAMES.get(name, name) not in declared() | OPTIONAL}
    assert not missing


def test_packages_say_that_they_are_typed():
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_what_jax_keeps_for_itself_is_asked_for_only_where_it_is_needed():
    """So that a release that moves it breaks a program of several processes, and not every import."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax._src")), path


@pytest.mark.parametrize("in_ci", [True, False])
@pytest.mark.parametrize("lacking", ["", "libtpu", "Chromium"])
def test_ci_names_what_cannot_be_installed_and_runs_the_tests(tmp_path, in_ci, lacking):
    """With commands that do nothing in place of the real ones. What is skipped then fails: see `conftest`."""
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    lines = {
        "make": 'echo "$@" >> "$DONE"; [ "$1" != .venv-aot/aot.stamp ] || exit ' + str(int(lacking == "libtpu")),
        "apt-get": f"exit {int(lacking == 'Chromium')}",
    }
    for name, line in lines.items():
        (tmp_path / name).write_text(f"#!{tmp_path}/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "done"
    environment = {"PATH": str(tmp_path), "DONE": str(log), "CI": "true" if in_ci else ""}
    done = subprocess.run(
        [tmp_path / "bash", ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False
    )
    is_named = bool(lacking) and (in_ci or lacking == "libtpu")
    assert done.returncode == 0
    assert ("CANNOT BE INSTALLED" in done.stderr) == (f"{lacking} CANNOT" in done.stderr) == is_named
    assert log.read_text().splitlines() == ["lint types", ".venv-aot/aot.stamp", "test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
