"""Commands on several processes: their options, how they join, and how they end together."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, NoReturn

import tyro

from glm4v_jax.config.checks import Natural, Positive
from glm4v_jax.devices.launchers import launcher
from glm4v_jax.errors import ConfigError, Glm4vError, one_line

INTERRUPTED = 130
"""Exit status of a shell command that Ctrl-C ended."""
READER_GONE = 141
"""Exit status of a shell command whose reader went away."""


@dataclasses.dataclass(kw_only=True)
class DistributedOptions:
    """For several processes on several hosts: start the same command in each. Process 0 prints."""

    coordinator: Annotated[
        str | None, tyro.conf.arg(metavar="HOST:PORT", help_behavior_hint="(default: found on TPU pods, Slurm, GKE)")
    ] = None
    """Host of process 0, and a free port on it."""

    num_processes: Annotated[
        Positive | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: found in the same way, or 1)")
    ] = None
    """Number of processes."""

    process_id: Annotated[
        Natural | None, tyro.conf.arg(metavar="I", help_behavior_hint="(default: found in the same way)")
    ] = None
    """Index of this process, from 0."""

    @property
    def is_one_of_several(self) -> bool:
        """Whether there may be other processes to join."""
        given = (self.coordinator, self.num_processes, self.process_id)
        return any(value is not None for value in given) or launcher() is not None


def check_alone(command: str) -> None:
    """Check that a command for one terminal runs in one process.

    Raises:
      ConfigError: a launcher has started several.
    """
    name = launcher()
    if name is not None and name != "Cloud TPU":  # there it may be the only host
        raise ConfigError(
            f"{command}: found one of several processes, of {name}; expected the only one; `glm4v generate` runs "
            "on several"
        )


@contextlib.contextmanager
def joined(options: DistributedOptions | None, prog: str, status: int = 1, *, debug: bool = False) -> Iterator[None]:
    """Run the body, a command, together with the other processes that run it.

    An error in one of them ends all, with its message; only the first prints.

    Args:
      options: of the command; None for one that runs in one process.
      prog: the program's name in messages.
      status: of this process after an error.
      debug: print tracebacks, and the native log as it is.

    Raises:
      ConfigError: the options are contradictory, or the others cannot be reached.
    """
    if options is None or not options.is_one_of_several:
        yield
        return
    with contextlib.ExitStack() as streams:
        errors = sys.stderr if debug else streams.enter_context(_own_streams(prog))

        def tell(message: str) -> None:
            print(f"{prog}: error: {message}", file=errors, flush=True)

        from glm4v_jax.devices import distributed
        from glm4v_jax.devices.failure import fail

        given = (options.coordinator, options.num_processes, options.process_id)
        try:
            if distributed.init_distributed(*given, tell=tell) and not distributed.is_first():
                silent = streams.enter_context(open(os.devnull, "w"))
                streams.enter_context(contextlib.redirect_stdout(silent))
                streams.enter_context(contextlib.redirect_stderr(silent))
            yield
            sys.stdout.flush()
            if distributed.has_joined():
                distributed.leave()
        except BaseException as error:
            if not distributed.has_joined():
                raise
            _end(error, fail, status, errors, debug=debug)


def _end(error: BaseException, fail: Callable[..., NoReturn], status: int, log: IO[str], *, debug: bool) -> NoReturn:
    """End all processes for an exception in this one."""
    is_lost = type(error).__name__ == "JaxRuntimeError"
    is_expected = is_lost or isinstance(error, KeyboardInterrupt | Glm4vError | OSError)
    if debug or not is_expected:
        traceback.print_exception(error, file=log)
    if isinstance(error, KeyboardInterrupt):
        fail("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        fail("nobody reads the output any more", READER_GONE)
    if isinstance(error, Glm4vError | OSError):
        fail(one_line(error), status)
    # Computations fail where a process is gone that they wait for.
    lost = "a computation failed, perhaps because another process is gone: " if is_lost else ""
    fail(f"{lost}{type(error).__name__}: {' '.join(str(error).split())}", status)


@contextlib.contextmanager
def _own_streams(prog: str) -> Iterator[IO[str]]:
    """Keep Python's standard output and error apart from native code's, which goes through `native_log`."""
    program = Path(__file__).with_name("native_log.py")
    kept = os.dup(1), os.dup(2)
    with contextlib.ExitStack() as stack:
        ours = [
            stack.enter_context(open(os.dup(number), "w", encoding=old.encoding, errors=old.errors, buffering=1))
            for number, old in zip(kept, (sys.stdout, sys.stderr), strict=True)
        ]
        for old in (sys.stdout, sys.stderr):
            old.flush()
        log = subprocess.Popen(
            [sys.executable, "-I", "-S", str(program), f"{prog}: error: "], stdin=subprocess.PIPE, stdout=kept[1]
        )
        assert log.stdin is not None
        for number in (1, 2):
            os.dup2(log.stdin.fileno(), number)
        log.stdin.close()
        try:
            with contextlib.redirect_stdout(ours[0]), contextlib.redirect_stderr(ours[1]):
                yield ours[1]
        finally:
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            log.wait()
