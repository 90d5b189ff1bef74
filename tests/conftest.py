"""What every test shares: the platform, one cache of compiled programs, and the tiny models, each built once.

Environment variables, and not `jax.config`, because tests that start other processes want the same, and because the
tests of the host side must not import JAX.
"""

import contextlib
import os
import signal
from pathlib import Path

import hypothesis
import pytest

CACHE = Path(__file__).parent.parent / ".cache"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell starts what runs in the background with Ctrl-C ignored; the processes that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run; `pytest --hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("seeded", derandomize=True)
hypothesis.settings.load_profile("seeded")


@pytest.fixture(scope="session")
def mesh():
    """The mesh of one device, set for the rest of the session."""
    from glm4v_jax.mesh import use_mesh

    with use_mesh() as mesh:
        yield mesh


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """name -> directory of a tiny checkpoint in Hugging Face layout; see `reference.CONFIGS`."""
    import reference

    directories = {}

    def get(name):
        if name not in directories:
            directories[name] = tmp_path_factory.mktemp(name)
            reference.write_checkpoint(name, directories[name])
        return directories[name]

    return get


@pytest.fixture(scope="session")
def ours(checkpoints, mesh):
    """name -> our model with the weights of `checkpoints(name)`, layers kept one by one as on every CPU."""
    from glm4v_jax import Glm4vForConditionalGeneration

    models = {}

    def get(name):
        if name not in models:
            models[name] = Glm4vForConditionalGeneration.from_pretrained(checkpoints(name))
        return models[name]

    return get


@pytest.fixture(scope="session")
def theirs(checkpoints):
    """name -> the reference with the weights of `checkpoints(name)`: float32, eager attention. Skips without it."""
    import reference
    from helpers_transformers import import_transformers

    import_transformers()
    models = {}

    def get(name):
        if name not in models:
            models[name] = reference.load_theirs(checkpoints(name))
        return models[name]

    return get


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
