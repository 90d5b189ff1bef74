"""How large the cache of compiled programs may grow; the least recently used are deleted first."""

import contextlib
import functools
import os
import pathlib
import time
from typing import Any

MAX_SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"
"""JAX's own environment variable: bytes; -1 for no bound."""
MAX_BYTES = 4 * 2**30
"""Size limit of the cache in the user's cache directory, and of `EXECUTABLES`, unless `MAX_SIZE` sets another."""
EXECUTABLES = "glm4v_jax"
"""Directory of stored executables below that of a cache without a bound; see `stored_programs`."""
PROGRAM, LAST_USE = "-cache", "-atime"
"""Ends of the names of JAX's files: a program, and when it was last used, if there is a bound."""


def with_bound(cache: Any) -> Any:
    """Return this cache of JAX's, or one with a bound below its directory where neither it nor `MAX_SIZE` has one."""
    path = str(getattr(cache, "path", ""))
    if MAX_SIZE in os.environ or getattr(cache, "eviction_enabled", True) or not os.path.isdir(path):
        return cache
    return _own(pathlib.Path(path, EXECUTABLES))


@functools.cache
def _own(directory: pathlib.Path) -> Any:
    from jax._src.lru_cache import LRUCache

    if not os.access(directory.parent, os.W_OK):  # as in an image of a container: nothing grows, no use can be noted
        return LRUCache(str(directory), max_size=-1)
    cache = LRUCache(str(directory), max_size=MAX_BYTES)
    note_last_uses(directory)
    return cache


def note_last_uses(directory: pathlib.Path) -> None:
    """Write a time for programs that lack one: without it JAX 0.10 cannot make room, and keeps no more programs.

    They lack one if they were written without a bound, or if the process ended between writing the two.
    """
    with contextlib.suppress(OSError):
        for program in directory.glob(f"*{PROGRAM}"):
            noted = program.with_name(program.name.removesuffix(PROGRAM) + LAST_USE)
            if not noted.exists():
                seconds = min(program.stat().st_mtime, time.time())
                noted.write_bytes(int(seconds * 1e9).to_bytes(8, "little"))
