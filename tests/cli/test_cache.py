"""`glm4v cache`, and the persistent compilation cache under it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tyro
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.cli.cache import Cache
from glm4v_jax.devices import compilation_cache
from glm4v_jax.errors import ConfigError

VARIABLES = (
    "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "XDG_CACHE_HOME",
)  # fmt: skip


def cache(*arguments):
    tyro.cli(Cache, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)).run()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user's directory of their own, and no variable that says otherwise; where the cache is by default."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "glm4v_jax" / "xla"


def keep(directory, name, size, used, *, noted=True):
    """A compiled program as JAX writes it, last used so many seconds after 1970; its key."""
    directory.mkdir(parents=True, exist_ok=True)
    key = f"{name}-{len(list(directory.iterdir())):064x}"
    (directory / f"{key}-cache").write_bytes(b"x" * size)
    os.utime(directory / f"{key}-cache", (used, used))
    if noted:
        os.utime(directory / f"{key}-cache", (1, 1))
        (directory / f"{key}-atime").write_bytes((used * 10**9).to_bytes(8, "little"))
    return key


# What is shown.


def test_programs_are_listed_by_their_last_use(home):
    newer = keep(home, "jit_decode", 300, 2000)
    oldest = keep(home, "jit_prefill", 20, 1000, noted=False)
    (home / "notes-cache").write_text("of somebody else")
    (home / f"jit_decode-{'0' * 64}-cache.bak").write_text("of somebody else")
    (home / ("jit_f-" + "a" * 64 + "-cache")).mkdir()
    programs = compilation_cache.cached_programs(home)
    assert [(item.path.name, item.name, item.size, item.used) for item in programs] == [
        (f"{oldest}-cache", "jit_prefill", 20, 1000.0),
        (f"{newer}-cache", "jit_decode", 300, 2000.0),
    ]


def test_a_note_that_was_not_finished_is_no_obstacle(home):
    key = keep(home, "jit_decode", 3, 1000)
    (home / f"{key}-atime").write_bytes(b"")
    assert [item.used for item in compilation_cache.cached_programs(home)] == [1.0]


def test_json_has_directory_number_bytes_and_times(capfd, home):
    keep(home, "jit_decode", 300, 2000)
    keep(home, "jit_decode", 40, 3000)
    cache("--json")
    assert json.loads(capfd.readouterr().out) == {
        "directory": str(home), "programs": 2, "bytes": 340, "max_bytes": 4 * 2**30, "least_recently_used": 2000.0,
        "most_recently_used": 3000.0, "cleared": False,
    }  # fmt: skip
    assert len(list(home.iterdir())) == 4


def test_text_says_the_same(capfd, home):
    for number in range(15):
        keep(home, f"jit_f{number}", (100 - number) * 2**10, 2000)
    keep(home, "jit_decode", 3 * 2**20, 1_000_000_000)
    keep(home, "jit_decode", 2**20, 2000)
    cache()
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == str(home)
    assert lines[1] == "17 programs, 5.4 MiB; at most 4.0 GiB"
    assert lines[2].endswith("(the newest)")
    assert "2001-09-0" in lines[2]
    assert lines[4].split() == ["2", "jit_decode", "4.0", "MiB"]
    assert lines[-1].split() == ["4", "of", "4", "other", "names", "350.0", "KiB"]


@pytest.mark.parametrize("made", [False, True])
def test_nothing_there_is_no_error(capfd, home, made):
    if made:
        home.mkdir(parents=True)
    cache()
    assert capfd.readouterr().out == f"{home}\n0 programs, 0 B; at most 4.0 GiB\n"
    cache("--clear", "--json")
    told = json.loads(capfd.readouterr().out)
    assert (told["programs"], told["bytes"], told["least_recently_used"], told["left"]) == (0, 0, None, [])
    assert home.exists() == made


# What is deleted.


def test_only_what_jax_wrote_is_deleted(capfd, home):
    keep(home, "jit_decode", 300, 2000)
    keep(home, "jit_prefill", 2**11, 2000, noted=False)
    (home / f"jit_gone-{'b' * 64}-atime").write_bytes(b"12345678")
    (home / ".lockfile").write_text("")
    (home / "my-cache").write_text("of somebody else")
    (home / "folder").mkdir()
    cache("--clear")
    assert capfd.readouterr().out == (
        f"{home}: deleted 2 programs, 2.3 KiB\nleft alone, not written by JAX: folder, my-cache\n"
    )
    assert sorted(path.name for path in home.iterdir()) == [".lockfile", "folder", "my-cache"]
    cache("--clear", "--json")
    told = json.loads(capfd.readouterr().out)
    assert (told["programs"], told["cleared"], told["left"]) == (0, True, ["folder", "my-cache"])


def test_of_many_strangers_some_are_named(capfd, home):
    home.mkdir(parents=True)
    for number in range(9):
        (home / f"{number}.txt").write_text("")
    cache("--clear")
    assert capfd.readouterr().out.endswith("JAX: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt and 3 more\n")


# Where it is.


def test_the_directory_of_the_environment_is_shown(capfd, home, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    keep(elsewhere, "jit_decode", 300, 2000)
    for named in (str(elsewhere), f"file://{elsewhere}"):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
        cache("--json")
        told = json.loads(capfd.readouterr().out)
        assert (told["directory"], told["programs"], told["max_bytes"]) == (str(elsewhere), 1, None)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache("--json")
    assert json.loads(capfd.readouterr().out)["directory"] == str(tmp_path / "glm4v_jax" / "xla")


@pytest.mark.parametrize(
    ("named", "problem"), [("", "empty"), ("gs://bucket/xla", "this machine"), (__file__, "a file")]
)
def test_what_is_no_directory_is_refused(monkeypatch, named, problem):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
    with pytest.raises(ConfigError, match=problem):
        cache("--clear")


@pytest.mark.parametrize(("named", "bound"), [("123", 123), ("-1", None)])
def test_the_bound_of_the_environment_is_shown(capfd, monkeypatch, named, bound):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", named)
    cache("--json")
    assert json.loads(capfd.readouterr().out)["max_bytes"] == bound


def test_a_bound_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "4G")
    with pytest.raises(ConfigError, match="'4G'"):
        cache()


def test_looking_does_not_wait_for_jax(tmp_path):
    program = (
        "import sys, tyro\n"
        "from glm4v_jax.cli.cache import Cache\n"
        "tyro.cli(Cache, args=['--clear']).run()\n"
        "assert not {'jax', 'flax'} & sys.modules.keys()\n"
    )
    python(tmp_path, program)


# What JAX makes of it: each in a process of its own, because JAX decides once.


def python(directory, program, **variables):
    """Runs a program that must not complain; returns what it prints."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(RANDOM_CHECKPOINT.parents[2]), "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


COMPILING = """
from glm4v_jax.devices import compilation_cache
{before}
compilation_cache.use_compilation_cache()
import jax
for n in range({count}):
    jax.jit(lambda x, n=n: jax.numpy.sin(x) * n)(1.0)
config = jax.config
print(config.jax_compilation_cache_dir, config.jax_compilation_cache_max_size)
"""


def test_the_cache_makes_room_for_new_programs(tmp_path, home):
    old = keep(home, "jit_old", 30_000, 1000, noted=False)
    bound = 60_000
    before = f"compilation_cache.MAX_BYTES = {bound}"
    assert python(tmp_path, COMPILING.format(before=before, count=30)) == f"{home} {bound}\n"
    programs = compilation_cache.cached_programs(home)
    assert len(programs) > 5
    assert sum(item.size for item in programs) <= bound
    assert f"{old}-cache" not in {item.path.name for item in programs}
    # Every program has its time, or JAX 0.10 would stop here.
    assert all(item.path.with_name(item.path.name[: -len("cache")] + "atime").exists() for item in programs)
    assert all(item.used > 1_600_000_000 for item in programs)


def test_a_program_that_was_used_stays_longer(tmp_path, home):
    kept = [keep(home, "jit_old", 1000, used) for used in (3000, 1000, 2000)]
    assert [item.path.name for item in compilation_cache.cached_programs(home)] == [
        f"{kept[1]}-cache", f"{kept[2]}-cache", f"{kept[0]}-cache",
    ]  # fmt: skip
    program = COMPILING.format(before="", count=0) + (
        "from jax._src import lru_cache\n"
        "jax_cache = lru_cache.LRUCache(config.jax_compilation_cache_dir, max_size=2500)\n"
        "jax_cache.put('jit_new-' + 'c' * 64, b'x' * 500)\n"
    )
    assert python(tmp_path, program) == f"{home} {4 * 2**30}\n"
    left = {item.path.name for item in compilation_cache.cached_programs(home)}
    assert left == {f"{kept[2]}-cache", f"{kept[0]}-cache", f"jit_new-{'c' * 64}-cache"}


@pytest.mark.parametrize(("named", "found"), [("-1", -1), ("70000", 70000)])
def test_the_bound_of_the_environment_counts(tmp_path, home, named, found):
    printed = python(tmp_path, COMPILING.format(before="", count=1), JAX_COMPILATION_CACHE_MAX_SIZE=named)
    assert printed == f"{home} {found}\n"


def test_a_directory_of_somebodys_choice_has_no_bound(tmp_path, home):
    elsewhere = tmp_path / "elsewhere"
    keep(elsewhere, "jit_of_another_project", 100, 1000, noted=False)
    printed = python(tmp_path, COMPILING.format(before="", count=1), JAX_COMPILATION_CACHE_DIR=str(elsewhere))
    assert printed == f"{elsewhere} -1\n"
    assert len(compilation_cache.cached_programs(elsewhere)) > 1
    assert not list(elsewhere.glob("*-atime"))
    assert not home.exists()


def test_what_the_program_has_configured_stays(tmp_path, home):
    before = (
        "import jax\n"
        "jax.config.update('jax_compilation_cache_dir', 'own')\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 7.0)\n"
    )
    program = COMPILING.format(before=before, count=1) + "print(config.jax_persistent_cache_min_compile_time_secs)\n"
    assert python(tmp_path, program) == "own -1\n7.0\n"
    assert not home.exists()
    assert list(pathlib.Path(tmp_path, "own").glob("*-cache")) == []


def test_asking_twice_changes_nothing(tmp_path, home):
    program = COMPILING.format(before="compilation_cache.use_compilation_cache()", count=1)
    assert python(tmp_path, program) == f"{home} {4 * 2**30}\n"
    assert compilation_cache.cached_programs(home)
