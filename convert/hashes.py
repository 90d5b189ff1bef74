"""Compute the SHA-256 of a checkpoint's files while they are converted."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

_CHUNK_BYTES = 4 << 20
_WIDTH = hashlib.sha256().digest_size


class Hashes:
    """Hashes of files, computed in a thread. Several processes divide the files among them."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._digests = np.zeros((len(paths), _WIDTH), np.uint8)
        self._stopped = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="hashes", daemon=True)

    def _run(self) -> None:
        try:
            for i in range(jax.process_index(), len(self._paths), jax.process_count()):
                self._digests[i] = np.frombuffer(self._digest(self._paths[i]), np.uint8)
        except OSError as error:
            self._error = error

    def _digest(self, path: Path) -> bytes:
        digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
        with path.open("rb", buffering=0) as file:
            while not self._stopped.is_set() and (count := file.readinto(buffer)):
                digest.update(memoryview(buffer)[:count])
        return digest.digest()

    def result(self) -> dict[str, str]:
        """Wait for all files, and return file name -> hash in hexadecimal.

        Raises:
          OSError: a file cannot be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        digests = self._digests
        if jax.process_count() > 1 and len(self._paths):
            # Every hash is zero except in the process that computed it.
            digests = np.asarray(multihost_utils.process_allgather(digests)).sum(axis=0, dtype=np.uint8)
        return {path.name: digest.tobytes().hex() for path, digest in zip(self._paths, digests, strict=True)}


@contextlib.contextmanager
def hashing(paths: Sequence[Path]) -> Iterator[Hashes]:
    """Hash files while the body runs, and stop when it ends."""
    hashes = Hashes(paths)
    hashes._thread.start()
    try:
        yield hashes
    finally:
        hashes._stopped.set()
        hashes._thread.join()
