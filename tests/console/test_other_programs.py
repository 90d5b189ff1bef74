"""The programs beside this package: errors where they are not installed, or hidden by another package."""

import os
import pathlib
import subprocess
import sys

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import ROOT

from glm4v_jax.console.extras import missing
from glm4v_jax.console.program import USAGE

JOB = """
model = "{model}"
out = "out"
steps = 1
[data]
files = ["data.jsonl"]
[batch]
rows = 1
length = 32
[optimizer]
learning_rate = 1e-4
"""

# An installation without any extra, in a process of its own.
BARE = """
import runpy, sys

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("grain", "pyarrow", "rapidfuzz", "sklearn", "tensorboardX"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Bare())
_, module, *sys.argv[1:] = sys.argv
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def ended(*command):
    """Exit status, standard output, lines of standard error of a process here, to which the checkout is known."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("command", "prefix", "extra"),
    [
        (["glm4v_jax", "eval", "--limit", "1"], "eval", "eval"),
        (["glm4v_jax", "train", "job.toml"], "train", "train"),
    ],
)
def test_the_extra_that_has_a_missing_package_is_named(command, prefix, extra):
    pathlib.Path("job.toml").write_text(JOB.format(model=RANDOM_CHECKPOINT))
    pathlib.Path("data.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    status, out, (line,) = ended("-c", BARE, *command)
    assert status != 0 and out == "" and line.startswith(f"{prefix}: error: found no package ")
    assert line.endswith(f"; expected that of the {extra} extra: pip install 'glm4v_jax[{extra}]'")


def test_help_needs_no_extra():
    """In one process, for time's sake."""
    code = BARE.partition("_, module")[0] + (
        "import importlib\n"
        "from glm4v_jax.cli.main import main\n"
        "for program in ('convert', 'train', 'eval'):\n"
        "    for command in [[], *([name] for name in importlib.import_module(f'{program}.commands').COMMANDS)]:\n"
        "        try:\n            main([program, *command, '--help'])\n"
        "        except SystemExit as end:\n            assert end.code == 0\n"
        "assert main(['eval', 'tasks']) == 0\n"
    )
    status, out, lines = ended("-c", code)
    assert (status, lines) == (0, []) and "digits-vqa" in out


def test_a_missing_module_of_our_own_stays_a_traceback():
    for name, program in (("train.nowhere", "train"), ("glm4v_jax.nowhere", "eval"), ("nowhere", "eval")):
        assert missing(ModuleNotFoundError(name=name), program) is None
    assert missing(ModuleNotFoundError("no name"), "train") is None


@pytest.mark.parametrize(("name", "command"), [("train", ["train"]), ("eval", ["--tyro-print-completion", "bash"])])
def test_a_script_of_the_same_name_is_named_and_not_run(name, command):
    """`python -m` puts the directory that it is called in before all others."""
    script = pathlib.Path(f"{name}.py").absolute()
    script.write_text("print('run')\n")
    status, out, lines = ended("-m", "glm4v_jax", *command)
    assert (status, out, len(lines)) == (USAGE, "", 1)
    assert lines[0].startswith(f"glm4v: error: {script}: found another package {name}; expected that of glm4v_jax")


def test_another_package_of_the_same_name_is_named():
    pathlib.Path("eval").mkdir()
    pathlib.Path("eval/__init__.py").touch()
    status, _, (line,) = ended("-m", "glm4v_jax", "eval")
    assert status == USAGE and f"{pathlib.Path('eval/__init__.py').absolute()}: found another package eval" in line
