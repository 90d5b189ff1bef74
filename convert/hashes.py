"""Compute the SHA-256 of a checkpoint's files while they are converted."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

_CHUNK_BYTES = 4 << 20


@contextlib.contextmanager
def hashing(paths: Sequence[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash files in a thread while the body runs, and stop when it ends. Several processes divide the files.

    Yields:
      A function that waits for all files and returns file name -> hash in hexadecimal; it raises an `OSError` if a
      file cannot be read. All processes must call it.
    """
    stopped = threading.Event()

    def digest(path: Path) -> bytes:
        sha256, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
        with path.open("rb", buffering=0) as file:
            while not stopped.is_set() and (count := file.readinto(buffer)):
                sha256.update(memoryview(buffer)[:count])
        return sha256.digest()

    def result() -> dict[str, str]:
        digests = np.zeros((len(paths), hashlib.sha256().digest_size), np.uint8)
        for i, future in own.items():
            digests[i] = np.frombuffer(future.result(), np.uint8)
        if jax.process_count() > 1 and paths:
            # Every hash is zero except in the process that computed it.
            digests = np.asarray(multihost_utils.process_allgather(digests)).sum(axis=0, dtype=np.uint8)
        return {path.name: found.tobytes().hex() for path, found in zip(paths, digests, strict=True)}

    with ThreadPoolExecutor(1, "hashes") as thread:
        own = {i: thread.submit(digest, paths[i]) for i in range(jax.process_index(), len(paths), jax.process_count())}
        try:
            yield result
        finally:
            stopped.set()
