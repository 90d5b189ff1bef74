"""JAX's persistent cache of compiled programs: where it is, how large it may grow, and how long compiling took.

Nothing here happens on import: the command line and `Engine.from_pretrained` enable it.
"""

import contextlib
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import platformdirs

from glm4v_jax.devices.cache_bound import EXECUTABLES, LAST_USE, MAX_BYTES, MAX_SIZE, PROGRAM, note_last_uses
from glm4v_jax.devices.program_limit import COMPILED, limit_programs
from glm4v_jax.errors import ConfigError

DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
"""JAX's own environment variable: a directory or an address; empty for no cache."""
MIN_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
"""JAX's own environment variable: programs that compile faster are not kept."""

_keeps_executables = False


def use_compilation_cache() -> None:
    """Enable JAX's persistent compilation cache; call it before the first compilation.

    A directory that the program has set in `jax.config` stays, with everything else that is set there. Otherwise the
    directory is $JAX_COMPILATION_CACHE_DIR, else `user_directory`, which grows to `MAX_BYTES` at most: the least
    recently used programs are deleted. A directory that cannot be created or written means no cache, without a message.
    JAX's other variables hold. Programs in memory are limited as well, see `limit_programs`.
    """
    import jax

    limit_programs()
    if DIRECTORY not in os.environ:
        if jax.config.jax_compilation_cache_dir is not None:
            return
        directory = user_directory()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(directory, os.W_OK | os.X_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
        if MAX_SIZE not in os.environ and (bound := size_bound()) is not None:
            note_last_uses(directory)
            jax.config.update("jax_compilation_cache_max_size", bound)
    if MIN_SECONDS not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if _keeps_executables:
        from glm4v_jax.devices.stored_programs import use_stored_programs

        use_stored_programs()


def keep_executables() -> None:
    """Have `use_compilation_cache` enable `stored_programs` as well: for a process of this package alone."""
    global _keeps_executables
    _keeps_executables = True


def user_directory() -> pathlib.Path:
    """The directory where the environment names none: glm4v_jax/xla in the user's cache directory."""
    return platformdirs.user_cache_path("glm4v_jax") / "xla"


def size_bound() -> int | None:
    """Bytes that the directory may grow to; None for no limit.

    Raises:
      ConfigError: $JAX_COMPILATION_CACHE_MAX_SIZE is not a number.
    """
    named = os.environ.get(MAX_SIZE)
    if named is not None:
        try:
            return None if int(named) == -1 else int(named)
        except ValueError as error:
            raise ConfigError(
                f"${MAX_SIZE}: found {named!r}; expected a number of bytes, or -1 for no bound"
            ) from error
    # In a directory that the user has chosen, a limit would delete what others have put there.
    return None if DIRECTORY in os.environ else MAX_BYTES


def cache_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files in a directory that JAX wrote for compiled programs, and below it; none if it does not exist.

    Raises:
      OSError: the directory cannot be read.
    """
    found = [path for place in (directory, directory / EXECUTABLES) if place.exists() for path in place.iterdir()]
    # Programs first: JAX 0.10 stops keeping programs where it finds one without its time.
    return sorted((path for path in found if path.name.endswith((PROGRAM, LAST_USE))), key=_is_last_use)


def _is_last_use(path: pathlib.Path) -> bool:
    return path.name.endswith(LAST_USE)


@contextlib.contextmanager
def compiling(note: Callable[[str | None], None]) -> Iterator[None]:
    """Follow what XLA compiles, or JAX reads from the cache, inside the `with` block.

    Args:
      note: called with the name of a jitted function where that begins, and with None where it has ended.
    """
    import jax

    def begin(event: str, value: float, **details: Any) -> None:
        named = re.fullmatch(r"jit[_(](\w+)\)?", str(details.get("fun_name")))
        if event == COMPILED and named is not None:
            note(named[1])

    def end(event: str, duration: float, **details: Any) -> None:
        if event == COMPILED:
            note(None)

    jax.monitoring.register_scalar_listener(begin)
    jax.monitoring.register_event_duration_secs_listener(end)
    try:
        yield
    finally:
        jax.monitoring.unregister_scalar_listener(begin)
        jax.monitoring.unregister_event_duration_listener(end)


@contextlib.contextmanager
def compile_times() -> Iterator[list[float]]:
    """Collect seconds per program that XLA compiles, or that is read from the cache, inside the `with` block.

    Of programs that are compiled at the same time each counts from the end of the one before: the sum is a time span.
    """
    import jax

    times: list[float] = []
    last = time.perf_counter()

    def listen(event: str, duration: float, **details: Any) -> None:
        nonlocal last
        if event == COMPILED:
            now = time.perf_counter()
            times.append(max(0.0, min(duration, now - last)))
            last = now

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield times
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
