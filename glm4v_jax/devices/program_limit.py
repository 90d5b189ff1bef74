"""Keep the compiled programs of a process below the number of memory maps that Linux allows it.

A program that XLA compiles for a CPU holds about nine maps, a large one hundreds, and Linux allows a process 65,530
(`vm.max_map_count`). One more, and the process dies of a segmentation fault: while it compiles, or while it writes the
program to the persistent cache (https://github.com/jax-ml/jax/issues/27201).
"""

import functools
import logging
import pathlib
from typing import Any

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event of a program that is compiled: a scalar at the start, a duration at the end."""
FRACTION = 0.75
"""Fraction of the maps in use at which programs are dropped."""
CHECK_EVERY = 64
"""Programs compiled between two counts: a count takes up to 50 ms."""

OTHER_PROGRAMS: list[dict[Any, Any]] = []
"""Programs besides those that `jax.jit` keeps; see `stored_programs`."""

_MAPS = pathlib.Path("/proc/self/maps")
_MAX_MAPS = pathlib.Path("/proc/sys/vm/max_map_count")
_logger = logging.getLogger(__name__)


@functools.cache
def limit_programs() -> None:
    """From now on, drop JAX's compiled programs whenever the process nears its limit of memory maps.

    What is needed again is compiled again, or read from the persistent cache. Nothing happens where there is no such
    limit, or where few programs are compiled: the tiny model's training and evaluation together use a tenth of it.
    """
    import jax

    compiled = 0

    def listen(event: str, duration: float, **details: Any) -> None:
        nonlocal compiled
        if event == COMPILED:
            compiled += 1
            if compiled % CHECK_EVERY == 0:
                drop_programs(FRACTION)

    jax.monitoring.register_event_duration_secs_listener(listen)


def drop_programs(fraction: float) -> bool:
    """Drop JAX's compiled programs if more than this fraction of the memory maps is in use; whether it did."""
    try:
        limit = int(_MAX_MAPS.read_text())
        with _MAPS.open("rb") as lines:
            used = sum(1 for _ in lines)
    except OSError:  # not Linux
        return False
    if used <= fraction * limit:
        return False
    import jax

    jax.clear_caches()
    for programs in OTHER_PROGRAMS:
        programs.clear()
    _logger.warning(
        "compiled programs used %d of this process's %d memory maps and were dropped; a larger vm.max_map_count "
        "keeps more of them (sysctl -w vm.max_map_count=262144)",
        used, limit,
    )  # fmt: skip
    return True
