"""Comparing checkpoints, and models on simulated devices and in several processes."""

import gc
import os
import socket
import subprocess
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
    # On a busy machine a device may wait for a core longer than the 40 seconds after which the others end the process.
    flags = (
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
    return os.environ | {
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]),
        "JAX_PLATFORMS": "cpu",
        "JAX_SHARE_BINARY_BETWEEN_HOSTS": str(int(shares)),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_together(file, *arguments, processes=2):
    """Run a test file as a program in several processes of one `jax.distributed`; returns what each prints."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(file), str(port), str(processes), str(i), *map(str, arguments)],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [output for output, _ in outputs]


def start_distributed(port, processes, index):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(index))
