"""Comparing checkpoints, and models on simulated devices and in several processes."""

import gc
import os
import socket
import sys
from pathlib import Path

from glm4v_jax.checkpoints.orbax_read import open_weights

TESTS = Path(__file__).parent

if str(getattr(sys.modules["__main__"], "__file__", "")).startswith(str(TESTS)):
    gc.disable()  # a program that a test has started ends before there is much garbage


def assert_same_weights(one, other, *, ordered=True):
    """Two checkpoints of either format: names, shapes, dtypes and bits."""
    one, other = open_weights(one), open_weights(other)
    assert list(one) == list(other) if ordered else one.keys() == other.keys()
    for name in one:
        assert one[name][:2] == other[name][:2], name
        found, expected = one.read(name), other.read(name)
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        assert found.tobytes() == expected.tobytes(), name


def contents(directory):
    """Relative path -> bytes of every file."""
    directory = Path(directory)
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def environment(devices=1, *, shares=True):
    """Of a process that sees this many devices; what else XLA is told, as in `conftest.py`, holds for it too.

    Where it `shares`, several processes run what the first of them has compiled; those of users compile by themselves.
    """
    return os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_SHARE_BINARY_BETWEEN_HOSTS": str(int(shares)),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_distributed(port, processes, index):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(index))
