"""Read a file as a map of it, and parts of it into buffers that are used again.

Pages of a map come from the disk while the one thread that touches them waits, and stay in the page cache. That is
right for what is small. Where memory has no room for the file, each page costs the system time to find, 0.4 to 0.8 s a
GB on a virtual machine, and takes the place of one that somebody may still want: `bypass_cache` is for that.
"""

import collections
import contextlib
import mmap
import os
import random
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PART_BYTES = 4 << 20
"""The longest part of a file that is read into a buffer: it stays in the cache of the processor until it is used."""

# Direct reads begin and end at multiples of a device's blocks, in the file and in memory.
_BLOCK = 4096

_SAMPLE = 32

Buffers = collections.deque[mmap.mmap]
"""Buffers that nothing is read into at the moment; the files of a checkpoint share them."""


class MappedFile:
    """A file that is not empty.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     size = file.write(b"0123456789" * 1000)
    ...     file.flush()
    ...     mapped = MappedFile(Path(file.name))
    ...     with mapped.fetched(np.frombuffer(mapped.memory, np.uint8)[5000:5003], Buffers()) as part:
    ...         part.tobytes()
    b'012'

    Attributes:
      memory: its bytes, read-only.

    Raises:
      OSError: it cannot be opened.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # The first from which `os.preadv` reads a part is used for it.
            self._descriptors = [self._kept(os.dup(file.fileno()))] if hasattr(os, "preadv") else []

    def bypass_cache(self) -> None:
        """Read parts past the page cache from now on, if the file is not there and the system and its device can."""
        if len(self._descriptors) == 1 and hasattr(os, "O_DIRECT"):
            same = f"/proc/self/fd/{self._descriptors[0]}"  # though another file may have its name by now
            with contextlib.suppress(OSError):
                if not _is_cached(same, len(self.memory)):
                    self._descriptors.insert(0, self._kept(os.open(same, os.O_RDONLY | os.O_DIRECT)))

    def holds(self, view: np.ndarray) -> bool:
        """Whether an array is a view of `memory`."""
        return 0 <= self._start(view) < len(self.memory)

    @contextlib.contextmanager
    def fetched(self, view: np.ndarray, buffers: Buffers) -> Iterator[np.ndarray]:
        """Give an array equal to a view of `memory`, valid inside the context: a copy, or the view if it is large.

        Threads may call it at the same time; each of them has a buffer.
        """
        start, nbytes = self._start(view), _extent(view)
        skipped = start % _BLOCK
        # Of a sparse view most bytes would be read for nothing.
        if view.size == 0 or nbytes > min(PART_BYTES, 2 * view.nbytes):
            yield view
            return
        try:
            buffer = buffers.pop()
        except IndexError:
            buffer = mmap.mmap(-1, PART_BYTES + 2 * _BLOCK)  # where pages begin
        try:
            if self._read(buffer, start - skipped, skipped + nbytes):
                yield np.ndarray(view.shape, view.dtype, buffer, skipped, view.strides)
            else:
                yield view
        finally:
            buffers.append(buffer)

    def _read(self, buffer: mmap.mmap, start: int, nbytes: int) -> bool:
        """Whether that many bytes, from a multiple of blocks on, are in the buffer now."""
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError), memoryview(buffer)[: nbytes + -nbytes % _BLOCK] as part:
                if os.preadv(descriptor, [part], start) >= nbytes:
                    return True
        return False

    def _start(self, view: np.ndarray) -> int:
        return view.ctypes.data - np.frombuffer(self.memory, np.uint8).ctypes.data

    def _kept(self, descriptor: int) -> int:
        weakref.finalize(self, os.close, descriptor)
        return descriptor


def _extent(view: np.ndarray) -> int:
    """The bytes from the first element of an array to its last, in an order of axes that may be any."""
    low, high = np.lib.array_utils.byte_bounds(view)
    return int(high - low)


def _is_cached(path: str, size: int) -> bool:
    """Whether most of a sample of a file's bytes are in the page cache."""
    descriptor, found = os.open(path, os.O_RDONLY), 0
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # or asking for a byte would read 8 MB
        for _ in range(_SAMPLE):
            with contextlib.suppress(BlockingIOError):
                found += os.preadv(descriptor, [bytearray(1)], random.randrange(size), os.RWF_NOWAIT)
    finally:
        os.close(descriptor)
    return found > _SAMPLE // 2
