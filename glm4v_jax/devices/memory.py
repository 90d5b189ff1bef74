"""Memory that is free, on this host and on devices, and the check that what is to be loaded fits.

>>> check_memory(42_000_000_000, "weights in float32", [Memory("host memory", 22_100_000_000)])  # doctest: +ELLIPSIS
Traceback (most recent call last):
  ...
glm4v_jax.errors.MemoryShortageError: needs 42.0 GB for weights in float32, found 22.1 GB free of host memory; ...
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from glm4v_jax.devices.hardware import device_memory
from glm4v_jax.errors import MemoryShortageError
from glm4v_jax.files import decimal_size

if TYPE_CHECKING:
    import jax

SWITCH = "GLM4V_MEMORY_CHECK"
"""Environment variable that skips the check where it is 0: swap and the cache of ZFS do not count as free."""

Read = Callable[[str], str]
"""The text in a file; raises OSError where there is none."""

_UNLIMITED = 1 << 60
"""Version 1 of control groups writes a number near 2 ** 63 where there is no limit."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory that belongs to a place, in words: bytes that can still be allocated, and in all, if known."""

    place: str
    free: int
    total: int | None = None


def read_file(path: str) -> str:
    """Read a file of the kernel's."""
    return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")


def host_memory(read: Read = read_file) -> Memory | None:
    r"""Return the memory of this host, without swap; None where the kernel does not say, as outside Linux.

    >>> host_memory(lambda path: "MemTotal: 64 kB\nMemFree: 1 kB\nMemAvailable: 48 kB\n")
    Memory(place='host memory', free=49152, total=65536)
    """
    found = _fields(read, "/proc/meminfo", scale=1024)
    if "MemAvailable" not in found:
        return None
    return Memory("host memory", found["MemAvailable"], found.get("MemTotal"))


def cgroup_memory(read: Read = read_file) -> Memory | None:
    """Return what the control groups of this process, version 1 or 2, leave it; None where none of them has a limit.

    Pages of files count as free: the kernel drops them for allocations.
    """
    found = [memory for memory in _limits(read) if memory is not None]
    return min(found, key=lambda memory: memory.free, default=None)


def device_free(device: "jax.Device") -> Memory | None:
    """Return the memory of a device that is not this host's; None if it is not known."""
    total = device_memory(device)
    if total is None:
        return None
    used = int((device.memory_stats() or {}).get("bytes_in_use", 0))
    return Memory(f"the memory of {device.device_kind}", total - used, total)


def memory_of(devices: Sequence["jax.Device"], read: Read = read_file) -> list[Memory]:
    """Return the memory that devices of one kind share, or that the fullest of them has, as far as it is known."""
    found: list[Memory | None]
    if not devices:
        found = []
    elif devices[0].platform == "cpu":
        found = [host_memory(read), cgroup_memory(read)]
    else:
        found = [min(filter(None, map(device_free, devices)), key=lambda memory: memory.free, default=None)]
    return [memory for memory in found if memory is not None]


def check_memory(
    needed: int, what: str, memories: Iterable[Memory], advice: Callable[[Memory], str] | None = None
) -> None:
    """Check that each of some memories has room for the bytes needed for `what`, before anything is allocated.

    Not where $GLM4V_MEMORY_CHECK is 0. MemoryShortageError if one has not, with both numbers, and by `advice` what
    would fit that memory, in words, or nothing.
    """
    if os.environ.get(SWITCH) == "0":
        return
    for memory in memories:
        if needed > memory.free:
            found = f"needs {decimal_size(needed, 1)} for {what}, found {decimal_size(memory.free, 1)} free"
            found = f"{found} of {memory.place}"
            hint = "" if advice is None else advice(memory)
            way = f"{SWITCH}=0 loads all the same"
            raise MemoryShortageError("; ".join(filter(None, (found, hint, way))))


def _limits(read: Read) -> Iterator[Memory | None]:
    try:
        lines = read("/proc/self/cgroup").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _VERSION_1 if controllers else _VERSION_2
        # A limit of a group holds for those in it. In a container, the path may be that of the host: its root is here.
        for group in (pathlib.PurePosixPath(path), *pathlib.PurePosixPath(path).parents):
            yield _limit(read, f"{names.root}{str(group).rstrip('/')}", names)


@dataclasses.dataclass(frozen=True)
class _Names:
    """Files of a control group, and the fields of memory.stat that count pages of files."""

    root: str
    limit: str
    used: str
    files: tuple[str, ...]


_VERSION_1 = _Names(
    "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)  # fmt: skip
_VERSION_2 = _Names("/sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))


def _limit(read: Read, group: str, names: _Names) -> Memory | None:
    try:
        limit, used = int(read(f"{group}/{names.limit}")), int(read(f"{group}/{names.used}"))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return None
    if limit >= _UNLIMITED:
        return None
    stat = _fields(read, f"{group}/memory.stat")
    held = used - sum(stat.get(name, 0) for name in names.files)
    return Memory("the memory limit of this process's control group", max(limit - held, 0), limit)


def _fields(read: Read, path: str, scale: int = 1) -> dict[str, int]:
    """The numbers in a file of lines "name value" or "name: value kB"."""
    try:
        lines = [line.split() for line in read(path).splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): scale * int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
