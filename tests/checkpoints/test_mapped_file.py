"""Parts of files are the bytes of the map, whichever way they are read."""

import gc
import os
import threading

import numpy as np
import pytest

from glm4v_jax.checkpoints import mapped_file
from glm4v_jax.checkpoints.mapped_file import Buffers, MappedFile

NUMBERS = np.random.default_rng(0).integers(0, 256, 50_001, np.uint8)


@pytest.fixture(params=["cached", "past the cache", "direct reads refused", "no preadv"])
def mapped(request, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(NUMBERS.tobytes())
    if request.param == "no preadv":
        monkeypatch.delattr(os, "preadv")
    found = MappedFile(tmp_path / "file")
    if request.param not in ("cached", "no preadv"):
        monkeypatch.setattr(mapped_file, "_is_cached", lambda *_: False)
        found.bypass_cache()  # where the file system can
    if request.param == "direct reads refused":
        preadv, refused = os.preadv, found._descriptors[0]

        def refusing(descriptor, *others):
            if descriptor == refused:
                raise OSError(22, "Invalid argument")
            return preadv(descriptor, *others)

        monkeypatch.setattr(os, "preadv", refusing)
    return found


def views(memory):
    flat = np.frombuffer(memory, np.uint8)
    yield flat[:0]
    yield flat[5:6]
    yield flat[4095:8193]
    yield flat[-3:]
    yield flat
    yield np.ndarray((40, 100), np.float32, memory, 8).T
    yield np.ndarray((2, 30, 50), "<u2", memory, 8192).transpose(2, 0, 1)[:, :, 3:20]
    yield np.ndarray((200, 200), np.uint8, memory, 4)[:, 3]  # sparse


def test_a_part_is_the_view_of_the_map(mapped):
    buffers = Buffers()
    for view in views(mapped.memory):
        with mapped.fetched(view, buffers) as part:
            np.testing.assert_array_equal(part, view, strict=True)
    assert len(buffers) <= 1  # again and again


def test_threads_have_buffers_of_their_own(mapped):
    view = np.frombuffer(mapped.memory, np.uint8)
    buffers, all_inside, found = Buffers(), threading.Barrier(4, timeout=30), []

    def read(first):
        with mapped.fetched(view[first : first + 9000], buffers) as part:
            all_inside.wait()
            found.append(np.array_equal(part, NUMBERS[first : first + 9000]))

    threads = [threading.Thread(target=read, args=(first,)) for first in range(0, 40_000, 10_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_other_arrays_are_not_of_the_map(mapped):
    assert mapped.holds(np.frombuffer(mapped.memory, np.uint8)[7:]) and not mapped.holds(NUMBERS)


def test_what_is_in_the_page_cache_is_read_from_there(tmp_path):
    (tmp_path / "file").write_bytes(NUMBERS.tobytes())
    mapped = MappedFile(tmp_path / "file")
    mapped.bypass_cache()
    assert len(mapped._descriptors) == 1


def test_no_descriptor_stays_open(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(NUMBERS.tobytes())
    monkeypatch.setattr(mapped_file, "_is_cached", lambda *_: False)
    mapped = MappedFile(tmp_path / "file")
    mapped.bypass_cache()
    descriptors = mapped._descriptors
    del mapped
    gc.collect()
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
