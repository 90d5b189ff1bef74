"""Compiled programs of a process stay below its limit of memory maps."""

import logging

import jax
import pytest

from glm4v_jax.devices import program_limit
from glm4v_jax.devices.compilation_cache import compile_times


@pytest.fixture
def maps(tmp_path, monkeypatch):
    """Set the number of maps in use, of 100."""
    used, limit = tmp_path / "maps", tmp_path / "max_map_count"
    limit.write_text("100\n")
    monkeypatch.setattr(program_limit, "_MAPS", used)
    monkeypatch.setattr(program_limit, "_MAX_MAPS", limit)
    # What other tests have compiled stays.
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))
    cleared: list[bool] = []
    return lambda count: (used.write_text("map\n" * count), cleared)[1]


def test_programs_are_dropped_above_the_fraction_alone(maps, caplog):
    cleared = maps(75)
    assert not program_limit.drop_programs(0.75)
    assert cleared == []
    maps(76)
    with caplog.at_level(logging.WARNING):
        assert program_limit.drop_programs(0.75)
    assert cleared == [True]
    assert "76 of this process's 100 memory maps" in caplog.text


def test_nothing_is_dropped_where_there_is_no_such_limit(maps):
    cleared = maps(100)
    program_limit._MAX_MAPS.unlink()
    assert not program_limit.drop_programs(0.75)
    assert cleared == []


def test_compiling_programs_checks_the_limit(maps, monkeypatch):
    cleared = maps(99)
    monkeypatch.setattr(program_limit, "CHECK_EVERY", 2)
    program_limit.limit_programs()
    with compile_times() as times:
        for factor in range(4):
            jax.jit(lambda x, factor=factor: x * factor)(1.0)
    assert len(times) == 4
    assert len(cleared) == 2


COMPILING = """
import logging

import jax
from glm4v_jax.devices import program_limit

def maps():
    return len(program_limit._MAPS.read_text().splitlines())

jax.numpy.ones(3) * 2
before, most = maps(), 0
program_limit.FRACTION = (before + 100) / int(program_limit._MAX_MAPS.read_text())
program_limit.CHECK_EVERY = 8
logging.disable()
program_limit.limit_programs()
programs = [jax.jit(lambda x, n=n: jax.numpy.sin(x) * n) for n in range(60)]
for program in 2 * programs:
    program(1.0)
    most = max(most, maps())
print(most - before, program(1.0) == jax.numpy.sin(1.0) * 59)
"""


@pytest.mark.skipif(not program_limit._MAPS.exists(), reason="not Linux")
def test_a_process_that_compiles_many_programs_stays_near_the_limit(run_python):
    most, equal = run_python(COMPILING).split()
    assert int(most) < 300
    assert equal == "True"
