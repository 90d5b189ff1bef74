"""Programs in processes of their own that are forked from one with their imports, which take two seconds of a CPU each.

`tests/cli/test_main.py` starts programs as users do. JAX has no threads before its backends are made, so that a process
that has only imported it can be forked.
"""

import atexit
import gc
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from typing import Any
from unittest import mock

from helpers_orbax import environment, free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["helpers_processes", "pytest", "optax", "orbax.checkpoint", "glm4v_jax.cli.generate", "glm4v_jax.generate.engine",
     "glm4v_jax.generate.offline.batch", "convert.to_orbax", "eval.commands", "train.loop", "train.rl.loop"]
)  # fmt: skip


class ForkedProgram:
    """A running program, with what tests use of `subprocess.Popen`.

    Args:
      command: arguments of a Python interpreter: a file, or -m and a module, and what follows.
      env: all of its environment variables; by default those of `helpers_orbax.environment()`.
      cwd: its current directory.
      text: whether its outputs are read as text.
    """

    def __init__(
        self, command: Sequence[object], *, env: Mapping[str, str] | None = None, cwd: str | os.PathLike = ".",
        text: bool = False,
    ):  # fmt: skip
        with mock.patch.dict(os.environ, environment()):
            forkserver.ensure_running()
        readers, writers = zip(*(CONTEXT.Pipe(duplex=False) for _ in range(2)), strict=True)
        given = [str(part) for part in command], dict(env or environment()), os.path.abspath(cwd), writers
        self._process = CONTEXT.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid
        for writer in writers:
            writer.close()
        files = [os.fdopen(os.dup(reader.fileno()), "rb") for reader in readers]
        for reader in readers:
            reader.close()
        self.stdout, self.stderr = map(io.TextIOWrapper, files) if text else files

    @property
    def returncode(self) -> int | None:
        """Exit status, or minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked program", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> list[Any]:
        """Read its outputs to their ends, and wait for its own."""
        found: list[Any] = [None, None]

        def read(number: int) -> None:
            found[number] = (self.stdout, self.stderr)[number].read()

        threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(2)]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join(timeout)
        return found

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def run_together(file, *arguments, processes=2):
    """Run a test file as a program in several processes of one `jax.distributed`; returns what each prints."""
    port = free_port()
    started = [ForkedProgram([file, port, processes, i, *arguments], text=True) for i in range(processes)]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [output for output, _ in outputs]


def _run(command: list[str], variables: dict[str, str], directory: str, outputs: Sequence[Any]) -> None:
    """Do in a forked process what an interpreter does with these arguments."""
    import jax

    for number, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), number)
        output.close()
    # Those that are there may be of files, and seek.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(directory)
    # JAX has read its variables already.
    shares = variables.get("JAX_SHARE_BINARY_BETWEEN_HOSTS", "0") == "1"
    jax.config.update("jax_share_binary_between_hosts", shares)
    warnings.simplefilter("ignore")
    gc.disable()  # it ends before there is much garbage
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, os.path.dirname(command[0]))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
