import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm4v_jax.devices import stored_programs
from glm4v_jax.devices.compilation_cache import compile_times
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.devices.program_limit import drop_programs
from glm4v_jax.devices.stored_programs import StoredProgram


class Files(dict):
    """A cache in memory."""

    def put(self, name, data):
        self[name] = data


@pytest.fixture
def files(monkeypatch):
    files = Files()
    monkeypatch.setattr(stored_programs, "_cache", lambda: files)
    monkeypatch.setattr(stored_programs, "is_used", lambda: True)
    return files


def program(traced, value=2.0):
    """A new process' view of one function: with a tree, a donated argument, a static one and one of NumPy."""

    @functools.partial(jax.jit, static_argnames="power", donate_argnames="state")
    def step(state, x, *, power):
        traced.append(power)
        return {"x": state["x"] + value * x**power, "n": state["n"] + 1}, jnp.max(x)

    return StoredProgram(step, ("power",))


def run(step, power=2, dtype=np.float32):
    with use_mesh():
        state = {"x": jnp.ones((2, 3), dtype), "n": jnp.zeros((), jnp.int32)}
        state, most = step(state, np.arange(3, dtype=dtype), power=power)
        return jax.tree.map(np.asarray, step(state, np.arange(3, dtype=dtype), power=power)[0]), float(most)


def test_second_process_runs_without_tracing(files):
    traced = []
    first, reader = run(program(traced)), program(traced)
    second = run(reader)
    assert traced == [2]
    assert len(reader._programs) == 1, "read again for a state that it has returned"
    assert [name.split("-")[0] for name in files] == ["glm4v_step"]
    np.testing.assert_array_equal(first[0]["x"], second[0]["x"])
    np.testing.assert_array_equal(second[0]["x"], 1 + 2 * 2.0 * np.arange(3) ** 2 * np.ones((2, 1)))
    assert second[0]["n"] == 2 and first[1] == second[1] == 2


def test_static_arguments_dtypes_and_settings_have_keys_of_their_own(files):
    traced = []
    step = program(traced)
    run(step)
    run(step, power=3)
    run(step, dtype=np.float16)
    with jax.default_matmul_precision("highest"):
        run(step)
    assert len(files) == 4 == len(traced)


def test_weights_are_described_once(files, monkeypatch):
    """Of a model there are hundreds, in every dispatch."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Weights(stored_programs.WithKinds):
        leaves: list[jax.Array]

    kind, described = stored_programs._kind, []
    monkeypatch.setattr(stored_programs, "_kind", lambda leaf: described.append(leaf.shape) or kind(leaf))
    step = StoredProgram(jax.jit(lambda weights, x: sum(weights.leaves) * x))
    with use_mesh():
        weights, others = (Weights([jnp.full((3,), i, dtype) for i in range(5)]) for dtype in (np.float32, np.float16))
        assert [step(weights, np.float32(x))[0] for x in (1, 2)] == [10, 20]
        assert described == [(3,)] * 5 + [()] * 2
        assert step(others, np.float32(1))[0] == 10 and len(step._programs) == 2
        assert jax.jit(step)(weights, np.float32(3))[0] == 30, "inside another program"
        assert step(weights, np.float32(1))[0] == 10


@pytest.mark.parametrize("changed", ["XLA_FLAGS", "LIBTPU_INIT_ARGS", "cores"])
def test_flags_and_numbers_of_cores_have_keys_of_their_own(files, monkeypatch, changed):
    run(program([]))
    stored_programs._machine.cache_clear()
    if changed == "cores":
        monkeypatch.setattr(stored_programs, "_cores", lambda: 4096)
    else:
        monkeypatch.setenv(changed, "--xla_some_flag")
    traced = []
    run(program(traced))
    stored_programs._machine.cache_clear()
    assert traced == [2]


def test_sources_have_keys_of_their_own_and_code_edited_since_is_not_stored(files, monkeypatch, tmp_path):
    def restarted():
        stored_programs._loaded_sources.cache_clear()
        stored_programs._machine.cache_clear()

    source = tmp_path / "model.py"
    source.write_text("scale = 1")
    monkeypatch.setattr(stored_programs, "_SOURCES", tmp_path)
    monkeypatch.setattr(stored_programs, "_is_used", False)
    restarted()
    stored_programs.use_stored_programs()
    source.write_text("scale = 2")
    run(program([]))
    assert not files  # this process has run the code before the edit
    restarted()
    run(program([]))
    assert len(files) == 1
    source.write_text("scale = 3")
    restarted()
    traced = []
    run(program(traced))
    assert traced == [2] and len(files) == 2
    restarted()


def test_damaged_files_are_one_line_and_replaced(files, caplog, tmp_path, monkeypatch):
    from jax._src.lru_cache import LRUCache

    monkeypatch.setattr(stored_programs, "_useless", set())
    monkeypatch.setattr(stored_programs, "_cache", lambda: LRUCache(str(tmp_path), max_size=-1))
    for power in (2, 3):
        run(program([]), power)
    found = sorted(tmp_path.glob("*-cache"))
    assert len(found) == 2
    for path in found:
        path.write_bytes(path.read_bytes()[:100])
    traced = []
    anew = program(traced)
    assert [run(anew, power)[0]["n"] for power in (2, 3)] == [2, 2]
    assert traced == [2, 3] and caplog.text.count("-cache in the cache of programs: found") == 1
    assert all(path.stat().st_size > 100 for path in found)
    stored_programs._useless.clear()  # as in a new process
    run(program(traced))
    assert traced == [2, 3]


@pytest.mark.parametrize("method", ["put", "get"])
def test_cache_that_cannot_be_written_costs_no_result(files, method):
    """Or read: a bounded cache writes when a file was used."""

    def full(*_):
        raise OSError("No space left on device")

    setattr(files, method, full)
    assert run(program([]))[0]["n"] == 2


def test_disabled_passes_of_the_user_stay_disabled(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_disable_hlo_passes=fusion")
    monkeypatch.setattr(stored_programs, "_cache", dict)
    assert not stored_programs._is_possible.__wrapped__()
    monkeypatch.setenv("XLA_FLAGS", "")
    assert stored_programs._is_possible.__wrapped__()


def test_nothing_is_stored_for_a_package_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(stored_programs, "_cache", dict)
    monkeypatch.setattr(stored_programs, "_SOURCES", tmp_path)
    assert not stored_programs._is_possible.__wrapped__()


def test_static_function_is_compiled_and_not_stored(files):
    traced = []
    step = StoredProgram(jax.jit(lambda x, *, f: traced.append(f) or f(x), static_argnames="f"), ("f",))
    assert step(np.float32(2), f=lambda x: 3 * x) == 6
    assert step(np.float32(2), f=lambda x: 4 * x) == 8
    assert len(traced) == 2 and not files


def test_call_inside_another_program_is_traced_into_it(files):
    step = StoredProgram(jax.jit(lambda x: 2 * x))
    assert jax.jit(lambda x: step(x) + 1)(np.float32(2)) == 5
    assert not files


def test_prepared_program_is_compiled_in_another_thread(files, monkeypatch):
    threads = []
    compiled = stored_programs._compiled_anew
    monkeypatch.setattr(
        stored_programs, "_compiled_anew", lambda *args: threads.append(threading.current_thread()) or compiled(*args)
    )
    traced = []
    step = program(traced)
    with use_mesh(), compile_times() as times:
        state = {"x": jnp.ones((2, 3)), "n": jnp.zeros((), jnp.int32)}
        step.prepare(state, np.arange(3, dtype=np.float32), power=2)
        assert run(step)[0]["n"] == 2
    assert traced == [2] and threads[0] is not threading.main_thread() and len(threads) == 1
    assert times


def test_error_of_tracing_is_raised_at_every_call(files):
    step = StoredProgram(jax.jit(lambda x: x.no_such_attribute))
    for _ in range(2):
        with pytest.raises(AttributeError, match="no_such_attribute"):
            step(np.float32(1))


def test_nothing_is_stored_unless_asked_for(monkeypatch):
    monkeypatch.setattr(stored_programs, "_cache", lambda: pytest.fail("used"))
    assert run(program([]))[0]["n"] == 2
    assert not stored_programs.is_used()


@pytest.mark.slow
def test_programs_are_dropped_with_those_of_jax(files):
    traced = []
    step = program(traced)
    run(step)
    drop_programs(0.0)
    files.clear()
    run(step)
    assert traced == [2, 2]
