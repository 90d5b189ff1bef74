"""`glm4v cache`: what it shows, and what it deletes."""

import json

import pytest

from glm4v_jax.cli import main

VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "XDG_CACHE_HOME")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The default directory of the cache, in a home of its own."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "glm4v_jax" / "xla"


@pytest.fixture
def cache(capfd):
    """Runs `glm4v cache`; returns what it prints."""

    def run(*arguments, status=0):
        assert main.main(["cache", *arguments]) == status
        captured = capfd.readouterr()
        return captured.out or captured.err

    return run


def fill(directory):
    """Writes two programs as JAX does, one with the time of its last use, and files of somebody else."""
    directory.mkdir(parents=True)
    for name, size in (("jit_f-00-cache", 300), ("jit_g-11-cache", 40), ("jit_g-11-atime", 8)):
        (directory / name).write_bytes(b"x" * size)
    (directory / "notes.txt").write_text("of somebody else")
    (directory / ".lockfile").write_text("")


def test_the_directory_number_of_files_size_and_bound_are_shown(cache, home):
    fill(home)
    assert cache() == f"{home}: 3 files, 348 B; at most 4.0 GiB\n"
    shown = {"directory": str(home), "files": 3, "bytes": 348, "max_bytes": 4 * 2**30, "cleared": False}
    assert json.loads(cache("--json")) == shown


@pytest.mark.parametrize("exists", [False, True])
def test_an_empty_cache_is_not_an_error(cache, home, exists):
    if exists:
        home.mkdir(parents=True)
    assert cache() == f"{home}: 0 files, 0 B; at most 4.0 GiB\n"
    assert cache("--clear").startswith(f"{home}: deleted 0 files")
    assert home.exists() == exists


def test_clear_deletes_the_files_of_jax_only(cache, home):
    fill(home)
    assert cache("--clear") == f"{home}: deleted 3 files, 348 B; at most 4.0 GiB\n"
    assert sorted(path.name for path in home.iterdir()) == [".lockfile", "notes.txt"]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_directory_of_the_environment_has_no_bound(cache, tmp_path, monkeypatch, prefix):
    fill(tmp_path / "elsewhere")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", f"{prefix}{tmp_path / 'elsewhere'}")
    assert cache() == f"{tmp_path / 'elsewhere'}: 3 files, 348 B; no bound; at most 4.0 GiB of executables\n"


def test_the_cache_directory_of_the_user_counts(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache().startswith(f"{tmp_path / 'glm4v_jax' / 'xla'}: ")


@pytest.mark.parametrize(("value", "bound"), [("123", 123), ("-1", None)])
def test_the_bound_of_the_environment_is_shown(cache, monkeypatch, value, bound):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", value)
    assert json.loads(cache("--json"))["max_bytes"] == bound


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DIR", "", "found an empty value"),
        ("DIR", "gs://bucket/xla", "expected a directory of this machine"),
        ("DIR", __file__, "a file; expected a directory"),
        ("MAX_SIZE", "4G", "found '4G'"),
    ],
)
def test_an_invalid_variable_is_refused(cache, monkeypatch, variable, value, words):
    name = f"JAX_COMPILATION_CACHE_{variable}"
    monkeypatch.setenv(name, value)
    line = cache("--clear", status=1)
    assert line.startswith(f"glm4v: error: ${name}: ") and words in line


def test_the_command_does_not_wait_for_jax(tmp_path, run_python):
    run_python("import sys\nfrom glm4v_jax.cli import main\nmain.main(['cache'])\nassert 'jax' not in sys.modules\n")
