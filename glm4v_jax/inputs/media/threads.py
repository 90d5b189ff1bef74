"""Work on all cores, for functions that leave Python's lock while they work (Pillow, numpy)."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def num_workers() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Apply `function` to every item on all cores.

    Returns:
        The results in the order of the items. The first exception is raised, and work that has not begun is dropped.
    """
    work = list(items)
    workers = min(num_workers(), len(work))
    if workers <= 1:
        return [function(item) for item in work]
    with ThreadPoolExecutor(workers, thread_name_prefix="glm4v-media") as pool:
        futures = [pool.submit(function, item) for item in work]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
