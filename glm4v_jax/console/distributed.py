"""Subcommands on several processes: their options, how they join, and how they end together."""

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn, Self

import tyro

from glm4v_jax.devices.launchers import launcher
from glm4v_jax.errors import ConfigError, Glm4vError, one_line
from glm4v_jax.generate.offline.answer_file import AnswerFile

INTERRUPTED = 130
"""Exit status of a shell command that Ctrl-C ended."""
READER_GONE = 141
"""Exit status of a shell command whose reader went away."""


@dataclasses.dataclass(kw_only=True)
class DistributedOptions:
    """Which of several processes this is, where nothing else says it."""

    coordinator: Annotated[
        str | None, tyro.conf.arg(metavar="HOST:PORT", help_behavior_hint="(default: found on TPU pods, Slurm, GKE)")
    ] = None
    """One of several processes on several hosts: where process 0 is, and a port that is free there. All of them are
    started with the same options, and process 0 prints."""

    num_processes: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: found in the same way, or 1)")
    ] = None
    """How many there are."""

    process_id: Annotated[
        int | None, tyro.conf.arg(metavar="I", help_behavior_hint="(default: found in the same way)")
    ] = None
    """Which this is, from 0."""

    @property
    def is_one_of_several(self) -> bool:
        """Whether there may be other processes to join."""
        given = (self.coordinator, self.num_processes, self.process_id)
        return any(value is not None for value in given) or launcher() is not None


def check_alone(command: str) -> None:
    """Refuse a subcommand that talks to one person.

    Raises:
      ConfigError: a launcher has started several processes of it.
    """
    name = launcher()
    if name is not None and name != "Cloud TPU":  # there it may be the only host
        raise ConfigError(
            f"{command}: found one of several processes, of {name}; expected the only one: it reads from one "
            "terminal. `glm4v generate` runs on several"
        )


@contextlib.contextmanager
def joined(command: object, prog: str, status: int = 1) -> Iterator[None]:
    """Runs the body, a subcommand, together with the other processes that run it.

    Where there are others, what is wrong in one is told and ends all of them from here; only the first writes text.

    Args:
      command: the subcommand; others than `DistributedOptions` are alone.
      prog: the program's name in messages.
      status: of this process after an error.

    Raises:
      ConfigError: the options are contradictory, or the others cannot be reached.
    """
    if not (isinstance(command, DistributedOptions) and command.is_one_of_several):
        yield
        return
    debug = bool(getattr(command, "debug", False))
    with contextlib.ExitStack() as streams:
        errors = sys.stderr if debug else streams.enter_context(_own_streams(prog))

        def tell(message: str) -> None:
            print(f"{prog}: error: {message}", file=errors, flush=True)

        from glm4v_jax.devices import distributed
        from glm4v_jax.devices.failure import fail

        options = (command.coordinator, command.num_processes, command.process_id)
        try:
            if distributed.init_distributed(*options, tell=tell) and not distributed.is_first():
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


def answers_of_all(
    options: object, open_file: Callable[[], AnswerFile], keys: Mapping[int | str, str]
) -> "AnswerFile | OthersAnswers":
    """The file of answers, which the first process opens and writes; the others hear from it what is done.

    Args:
      options: of the subcommand.
      open_file: opens it.
      keys: name -> what says what is asked, for all that is to be answered.

    Raises:
      OSError, GenerationError: what `open_file` raises.
      MessageError: another process has others.
    """
    if not (isinstance(options, DistributedOptions) and options.is_one_of_several):
        return open_file()
    import numpy as np

    from glm4v_jax.devices.distributed import agree, is_first, shared

    names, told = list(keys), json.dumps(list(keys.items())).encode()
    agree("prompts, model and options", hashlib.blake2b(told, digest_size=16).digest())
    file = open_file() if is_first() else OthersAnswers()
    is_done = shared(np.array([name in file.done for name in names], np.bool_))
    file.done = {name for name, done in zip(names, is_done.tolist(), strict=True) if done}
    return file


class OthersAnswers:
    """In place of `AnswerFile`, where another process writes it."""

    def __init__(self) -> None:
        self.done: set[int | str] = set()
        """what has been answered"""

    def append(self, name: int | str, line: Mapping[str, Any]) -> None:
        """Leaves it to the first process."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """There is nothing to close."""


def _end(error: BaseException, fail: Callable[..., NoReturn], status: int, log: IO[str], *, debug: bool) -> NoReturn:
    """Ends all processes for an exception in this one."""
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
    """Keeps Python's standard output and error apart from native code's, which goes through `native_log`."""
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
