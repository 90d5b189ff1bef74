"""What every test shares: the platform, one cache of compiled programs, and the tiny models, each built once.

Environment variables, and not `jax.config`, because tests that start other processes want the same, and because the
tests of the host side must not import JAX.
"""

import contextlib
import functools
import gc
import importlib.metadata
import inspect
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import hypothesis
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

TESTS = Path(__file__).parent
CACHE = TESTS.parent / ".cache"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Compiling is nearly all of the tests' time. These concern machine code alone, not the programs that it is made of: a
# gradient compiles in a fifth of the time, and its numbers stay within the tolerances. `XLA_FLAGS= pytest` compiles as
# users do.
_XLA_FLAGS = ["--xla_backend_optimization_level=0"]
# On a busy machine a device may wait for a core longer than the 40 seconds after which the others end the process. Only
# some processes have several devices, but those with the same flags read the programs that others have compiled.
_XLA_FLAGS += ["--xla_cpu_collective_call_terminate_timeout_seconds=600"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones refuse to start for a flag they do not know
    # One LLVM module for a program, not many for the threads of a large machine: 11% less time again.
    _XLA_FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(_XLA_FLAGS))
# For models this small, threads of torch's wait for each other longer than they compute: with two processes of tests on
# two cores, three times as long as one thread takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes that tests start find what this one compiled of the sources: 0.2 s each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Commands that name no model: what they print is not to change with every training of the packaged one.
os.environ["GLM4V_MODEL"] = str(RANDOM_CHECKPOINT)

# A shell starts what runs in the background with Ctrl-C ignored; the processes that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Imports, collected tests and traced programs stay, so that there is little garbage to look for.
gc.set_threshold(100_000, 20, 20)

# The same examples in every run; `pytest --hypothesis-profile=default` looks for new ones.
# That they are slow on a busy machine is no failure.
hypothesis.settings.register_profile(
    "seeded", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("seeded")


# Marker -> what is named by tests that need it, by their fixtures, or by functions of the tests that these call.
MARKERS = {
    "reference": {"import_transformers", "torch", "transformers", "peft"},
    "multiprocess": {"subprocess", "DeviceProcess", "ForkedProgram"},
    "tpu_compile": {"aot_environment"},
}


def pytest_collection_modifyitems(items):
    for item in items:
        fixtures = [fixture.func for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
        names = frozenset().union(*map(_names_reached, [item.function, *fixtures]))
        for marker, signs in MARKERS.items():
            if names & signs:
                item.add_marker(marker)


@functools.cache
def _names_reached(function):
    """The names that a function of the tests and those it calls use, and their arguments of `importorskip`."""
    if not inspect.getsourcefile(function).startswith(str(TESTS)):
        return frozenset()
    names, pending, seen = set(), [function], set()
    while pending:
        found = inspect.unwrap(pending.pop())
        if isinstance(found, type):
            pending += [value for value in vars(found).values() if inspect.isfunction(value)]
        elif inspect.isfunction(found) and found not in seen and found.__code__.co_filename.startswith(str(TESTS)):
            seen.add(found)
            used = set(_names_in(found.__code__))
            names |= used
            pending += [found.__globals__[name] for name in used & found.__globals__.keys()]
    return frozenset(names)


def _names_in(code):
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
        elif isinstance(constant, str) and "importorskip" in code.co_names:
            yield constant.partition(".")[0]


def pytest_collection_finish():
    """Spare the garbage collector what stays to the end: looking through all of it took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item, nextitem):
    """Between two files, drop programs before a process has too many: all tests together would exceed the limit."""
    if nextitem is not None and nextitem.path != item.path and "jax" in sys.modules:
        from glm4v_jax.devices.program_limit import drop_programs

        drop_programs(0.5)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _failed_if_skipped_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _failed_if_skipped_in_ci((yield))


def _failed_if_skipped_in_ci(report):
    """In CI everything that tests need is installed: what is skipped there would never be run anywhere."""
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        report.outcome, report.longrepr = "failed", f"not to be skipped where CI=true: {report.longrepr[-1]}"
    return report


@pytest.fixture(scope="module")
def browser():
    """A Chromium of the system's, driven by playwright (the `test` extra), which downloads none here.

    Of a module, not of the session: while playwright runs, no other test of the process may have an event loop.
    """
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def mesh():
    """The mesh of one device, set for the rest of the session."""
    from glm4v_jax.devices.mesh import use_mesh

    with use_mesh() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def stacked_layers():
    """Models that are loaded have one layer in each program, around which there is a loop.

    So they have on every platform but a CPU; programs compile in two thirds of the time or less.
    """
    from glm4v_jax.checkpoints import load

    read = load.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load_model", lambda *given, **options: read(*given, **options | {"stacked": True}))
        yield


@pytest.fixture(scope="session")
def run_on_devices():
    """Runs a function of a test file, with arguments, in a process with simulated devices; see `DeviceProcess`."""
    from helpers_mesh import DeviceProcess

    with contextlib.closing(DeviceProcess()) as process:
        yield process.run


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """name -> directory of a tiny checkpoint in Hugging Face layout; see `reference.CONFIGS`."""
    import reference

    @functools.cache
    def get(name):
        directory = tmp_path_factory.mktemp(name)
        reference.write_checkpoint(name, directory)
        return directory

    return get


@pytest.fixture(scope="session")
def ours(checkpoints, mesh):
    """name -> our model with the weights of `checkpoints(name)`, layers kept one by one as on every CPU."""
    from glm4v_jax import Glm4vForConditionalGeneration

    return functools.cache(lambda name: Glm4vForConditionalGeneration.from_pretrained(checkpoints(name)))


@pytest.fixture(scope="session")
def theirs(checkpoints):
    """name -> the reference with the weights of `checkpoints(name)`: float32, eager attention. Skips without it."""
    import reference
    from helpers_transformers import import_transformers

    import_transformers()
    return functools.cache(lambda name: reference.load_theirs(checkpoints(name)))


@pytest.fixture(scope="session")
def lowerings():
    """A context manager: the names of the programs that JAX lowers in its body.

    A persistent cache spares XLA's work, and not this.
    """
    import jax

    @contextlib.contextmanager
    def listen():
        names = []

        def hear(event, duration, **details):
            if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
                names.append(details["fun_name"])

        jax.monitoring.register_event_duration_secs_listener(hear)
        try:
            yield names
        finally:
            jax.monitoring.unregister_event_duration_listener(hear)

    return listen
