"""Compiled programs kept from one process to the next, for the command line; and how long compiling took.

A library leaves this choice to its caller, so nothing here happens by import.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
"""JAX's own environment variable: a directory or an address; empty for no cache."""
COMPILED = "/jax/core/compile/backend_compile_duration"


def use_compilation_cache() -> None:
    """Switches on JAX's persistent compilation cache; call it before the first compilation.

    The directory is $JAX_COMPILATION_CACHE_DIR, else glm4v_jax/xla in the user's cache directory ($XDG_CACHE_HOME or
    ~/.cache). One that cannot be made or written means no cache, without a word. Other variables of JAX's are obeyed.
    """
    import jax

    if DIRECTORY not in os.environ:
        # Not pathlib's home(), which raises where there is none; a relative $XDG_CACHE_HOME is to be ignored.
        user_cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not user_cache.is_absolute():
            user_cache = pathlib.Path(os.path.expanduser("~")) / ".cache"
        directory = user_cache / "glm4v_jax" / "xla"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(directory, os.W_OK | os.X_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def compile_times() -> Iterator[list[float]]:
    """Collects seconds per program that XLA compiles, or JAX reads from the cache, inside the `with` block."""
    import jax

    times: list[float] = []

    def hear(event: str, duration: float, **details: Any) -> None:
        if event == COMPILED:
            times.append(duration)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield times
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
