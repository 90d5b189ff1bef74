"""Commands on several processes: their options, how they join, and how they end together."""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Annotated, NoReturn

import tyro

from glm4v_jax.config.checks import Natural, Positive
from glm4v_jax.devices.launchers import launcher
from glm4v_jax.errors import ConfigError, Glm4vError, one_line

INTERRUPTED = 130
"""Exit status of a shell command that Ctrl-C ended."""
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
"""Of JAX's native code; 3 is for fatal errors only. Set it to 0 to see how processes lose each other."""
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
    """Check that a command for one terminal runs in one process; ConfigError if a launcher has started several."""
    name = launcher()
    if name is not None and name != "Cloud TPU":  # there it may be the only host
        raise ConfigError(
            f"{command}: found one of several processes, of {name}; expected the only one; `glm4v generate` runs "
            "on several"
        )


@contextlib.contextmanager
def joined(options: DistributedOptions | None, prog: str, status: int = 1, *, debug: bool = False) -> Iterator[None]:
    """Run the body, a command, together with the other processes that run it.

    An error in one of them ends all, with its message; only the first prints. `status` is that of this process after an
    error. ConfigError if the options are contradictory, or the others cannot be reached.
    """
    if options is None or not options.is_one_of_several:
        yield
        return
    errors = sys.stderr

    def report(message: str) -> None:
        print(f"{prog}: error: {message}", file=errors, flush=True)

    with contextlib.ExitStack() as streams:
        if not debug:
            streams.enter_context(_without_native_output())
        from glm4v_jax.devices import distributed
        from glm4v_jax.devices.failure import fail

        given = (options.coordinator, options.num_processes, options.process_id)
        try:
            if distributed.init_distributed(*given, tell=report) and not distributed.is_first():
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
        fail(str(error) or "interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        fail("nobody reads the output any more", READER_GONE)
    if isinstance(error, Glm4vError | OSError):
        fail(one_line(error), status)
    # Computations fail where a process is gone that they wait for.
    lost = "a computation failed, perhaps because another process is gone: " if is_lost else ""
    fail(f"{lost}{type(error).__name__}: {' '.join(str(error).split())}", status)


@contextlib.contextmanager
def _without_native_output() -> Iterator[None]:
    """Drop what native code writes to standard output, which is for answers: Gloo prints its connections there."""
    old = sys.stdout
    old.flush()
    kept = os.dup(1)
    with (
        open(os.dup(kept), "w", encoding=old.encoding, errors=old.errors, buffering=1) as stdout,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(stdout),
    ):
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
