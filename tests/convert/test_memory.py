"""Memory that is free, given back to the system."""

import ctypes
import subprocess
import sys
import types
import weakref

import pytest
from helpers_paths import ROOT

from convert.to_orbax import release_memory

# Freed blocks with one in use behind each hundred: the allocator keeps what lies between until it is told to let go.
PROGRAM = """
import sys
from convert.to_orbax import release_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

before = resident()
blocks = [bytearray(b"x" * 65_536) for _ in range(2_000)]
kept = blocks[::100] + blocks[-1:]
filled = resident()
del blocks
freed = resident()
release_memory()
print(before, filled, freed, resident())
"""


def test_free_blocks_go_back_to_the_system():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("another allocator than GNU's")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PYTHONMALLOC": "malloc", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    before, filled, freed, after = map(int, done.stdout.split())
    taken = filled - before
    assert taken > 100 << 20
    assert freed - before > 0.5 * taken  # or there was nothing to give back
    assert after - before < 0.1 * taken


def test_reference_cycles_are_collected():
    class Node:
        pass

    node = Node()
    node.itself = node
    seen = weakref.ref(node)
    del node
    release_memory()
    assert seen() is None


def test_another_allocator_is_left_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name) or types.SimpleNamespace())
    release_memory()
    assert asked == [None]
