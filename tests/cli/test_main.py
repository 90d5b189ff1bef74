"""The program `glm4v`: help, exit statuses, and how a process ends."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from helpers_cli import ROOT

import glm4v_jax
from glm4v_jax.cli import main
from glm4v_jax.console.distributed import READER_GONE
from glm4v_jax.console.program import PROGRAMS

TABLES = {(): main.COMMANDS} | {(name,): importlib.import_module(f"{name}.commands").COMMANDS for name in PROGRAMS}
COMMANDS = [(*program, name) for program, table in TABLES.items() for name in table]


def process(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "glm4v_jax", *arguments], env=environment, text=True, check=False, **options
    )


# Help.


@pytest.mark.parametrize("arguments", [*TABLES, *COMMANDS], ids=" ".join)
def test_help_is_complete(capfd, arguments):
    with pytest.raises(SystemExit) as caught:
        main.main([*arguments, "--help"])
    out = capfd.readouterr().out
    assert caught.value.code == 0
    assert out.startswith(" ".join(["usage: glm4v", *arguments]))
    assert "None" not in out


def test_help_lists_all_programs(capfd):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    out = capfd.readouterr().out
    assert all(f"• {name}" in out for name in (*main.COMMANDS, *PROGRAMS))


def test_help_does_not_wait_for_jax(run_python):
    run_python(
        "import sys\n"
        "from glm4v_jax.cli import main as cli\n"
        "for arguments in ([], *([name] for name in cli.COMMANDS)):\n"
        "    try:\n        cli.main([*arguments, '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0\n"
        "slow = {'jax', 'flax', 'orbax', 'torch', 'numpy', 'PIL', 'tokenizers', 'decord', 'av'}\n"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()\n"
    )


def test_the_version_is_printed(capfd):
    assert main.main(["--version"]) == 0
    assert capfd.readouterr().out == f"glm4v {glm4v_jax.__version__}\n"


# How it ends.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "doctor, convert, train, eval; did you mean 'train'?\n"),
        (["generate", "Hello", "--picture", "x.png"], "--picture"),
        (["generate", "--max-new-tokens", "abc", "Hello"], "glm4v generate --help"),
    ],
)
def test_unknown_commands_and_options_exit_with_status_2(capfd, arguments, words):
    with pytest.raises(SystemExit) as caught:
        main.main(arguments)
    assert caught.value.code == 2
    assert words in capfd.readouterr().err


def test_an_error_is_one_line_and_status_1(tmp_path):
    done = process("generate", "--image", "nowhere.png", "Hello", capture_output=True)
    assert (done.returncode, done.stdout) == (1, "")
    words = "--image: found nowhere.png, no such file; expected an image or a video"
    assert done.stderr == f"glm4v: error: {words}\n"


def test_a_reader_that_is_gone_is_not_an_error():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = process("generate", "--max-new-tokens", "2", "Hello", stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


@pytest.mark.parametrize("imported", ["glm4v_jax.cli.main", "jax"])
def test_ctrl_c_during_imports_ends_in_a_line_and_status_130(imported):
    code = (
        "import os, signal, sys\n"
        "class Impatient:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {imported!r}:\n            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "from glm4v_jax.__main__ import program\nprogram()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, "mesh", "latency"], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "glm4v: interrupted\n")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_subcommands_and_options(capfd, shell):
    with pytest.raises(SystemExit) as caught:
        main.main(["--tyro-print-completion", shell])
    out = capfd.readouterr().out
    assert caught.value.code in (0, None)
    for word in ("generate", "doctor", "train", "export", "verify", "--max-new-tokens", "--adapter", "--histogram"):
        assert word in out
    with pytest.raises(SystemExit) as caught:
        main.main(["--tyro-print-completion"])
    assert caught.value.code == 2 and "expected bash or zsh" in capfd.readouterr().err


def test_a_second_process_compiles_less(tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cache, found = tmp_path / ".cache" / "glm4v_jax" / "xla", []
    for _ in range(2):
        done = process("generate", "--json", "--greedy", "--max-new-tokens", "2", "Hello", capture_output=True)
        assert done.stderr == ""
        found.append((json.loads(done.stdout), sorted(path.name for path in cache.glob("*-cache"))))
    (first, programs), (again, programs_again) = found
    assert programs and programs_again == programs
    assert again["text"] == first["text"]
    assert again["compile_seconds"] < first["compile_seconds"] < first["seconds"]
