"""The persistent compilation cache: each test in a process of its own, because JAX decides once."""

import os
import pathlib

import pytest

from glm4v_jax.devices.compilation_cache import cache_files, compiling

VARIABLES = (
    "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "XDG_CACHE_HOME",
)  # fmt: skip
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


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The default directory of the cache, in a home of its own."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "glm4v_jax" / "xla"


def keep(directory, name, size, used, *, noted=True):
    """Writes a program as JAX does, last used so many seconds after 1970; returns its key."""
    directory.mkdir(parents=True, exist_ok=True)
    key = f"{name}-{len(list(directory.iterdir())):064x}"
    (directory / f"{key}-cache").write_bytes(b"x" * size)
    os.utime(directory / f"{key}-cache", (used, used))
    if noted:
        (directory / f"{key}-atime").write_bytes((used * 10**9).to_bytes(8, "little"))
    return key


def programs(directory):
    return {path.name.removesuffix("-cache") for path in directory.glob("*-cache")}


def test_programs_come_before_their_times_and_other_files_not_at_all(home):
    key = keep(home, "jit_f", 3, 1000)
    (home / "notes.txt").write_text("")
    assert [path.name for path in cache_files(home)] == [f"{key}-cache", f"{key}-atime"]
    assert cache_files(home / "nowhere") == []


def test_the_cache_makes_room_for_new_programs(run_python, home):
    old = keep(home, "jit_old", 30_000, 1000, noted=False)
    bound = 60_000
    before = f"compilation_cache.MAX_BYTES = {bound}"
    assert run_python(COMPILING.format(before=before, count=30)) == f"{home} {bound}\n"
    kept = programs(home)
    assert len(kept) > 5 and old not in kept
    assert sum((home / f"{key}-cache").stat().st_size for key in kept) <= bound
    # Every program has its time, or JAX 0.10 would stop here.
    assert all((home / f"{key}-atime").exists() for key in kept)


def test_a_program_that_was_used_stays_longer(run_python, home):
    kept = [keep(home, "jit_old", 1000, used) for used in (3000, 1000, 2000)]
    program = COMPILING.format(before="", count=0) + (
        "from jax._src import lru_cache\n"
        "jax_cache = lru_cache.LRUCache(config.jax_compilation_cache_dir, max_size=2500)\n"
        "jax_cache.put('jit_new-' + 'c' * 64, b'x' * 500)\n"
    )
    assert run_python(program) == f"{home} {4 * 2**30}\n"
    assert programs(home) == {kept[0], kept[2], f"jit_new-{'c' * 64}"}


@pytest.mark.parametrize("value", ["-1", "70000"])
def test_the_bound_of_the_environment_counts(run_python, home, value):
    program = COMPILING.format(before="", count=1)
    assert run_python(program, JAX_COMPILATION_CACHE_MAX_SIZE=value) == f"{home} {value}\n"


def test_a_directory_of_the_environment_has_no_bound(run_python, tmp_path, home):
    elsewhere = tmp_path / "elsewhere"
    keep(elsewhere, "jit_of_another_project", 100, 1000, noted=False)
    program = COMPILING.format(before="", count=1)
    assert run_python(program, JAX_COMPILATION_CACHE_DIR=str(elsewhere)) == f"{elsewhere} -1\n"
    assert len(programs(elsewhere)) > 1
    assert not list(elsewhere.glob("*-atime")) and not home.exists()


def test_the_cache_directory_of_the_user_counts(run_python, tmp_path, home):
    program = COMPILING.format(before="", count=1)
    place = tmp_path / "elsewhere" / "glm4v_jax" / "xla"
    assert run_python(program, XDG_CACHE_HOME=str(tmp_path / "elsewhere")) == f"{place} {4 * 2**30}\n"
    assert programs(place) and not home.exists()


def test_a_directory_that_cannot_be_made_means_no_cache(run_python, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    assert run_python(COMPILING.format(before="", count=1), XDG_CACHE_HOME=str(occupied)).startswith("None ")
    assert list(tmp_path.iterdir()) == [occupied]


def test_what_a_program_has_configured_stays(run_python, tmp_path, home):
    before = (
        "import jax\n"
        "jax.config.update('jax_compilation_cache_dir', 'own')\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 7.0)\n"
    )
    program = COMPILING.format(before=before, count=1) + "print(config.jax_persistent_cache_min_compile_time_secs)\n"
    assert run_python(program) == "own -1\n7.0\n"
    assert not home.exists()
    assert list(pathlib.Path(tmp_path, "own").glob("*-cache")) == []


def test_a_second_call_changes_nothing(run_python, home):
    program = COMPILING.format(before="compilation_cache.use_compilation_cache()", count=1)
    assert run_python(program) == f"{home} {4 * 2**30}\n"
    assert programs(home)


def test_compile_times_are_those_inside_the_block(run_python):
    program = """
from glm4v_jax.devices.compilation_cache import compile_times
import jax
with compile_times() as times:
    jax.jit(jax.numpy.sin)(1.0)
before = len(times)
jax.jit(jax.numpy.cos)(1.0)
print(0 < before == len(times))
"""
    assert run_python(program) == "True\n"


def test_programs_are_named_as_they_are_compiled():
    import jax

    noted = []

    @jax.jit
    def programme(x):
        return x + 1

    with compiling(noted.append):
        programme(1)
        programme(2)
    assert noted[noted.index("programme") + 1] is None and noted.count("programme") == 1
    programme(1.0)
    assert noted.count("programme") == 1
