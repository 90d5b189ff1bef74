"""The program `glm4v`: a table of commands, each a typed dataclass that runs itself.

A command turns options into calls of the public Python interface and prints what comes back. JAX is imported only once
the inputs are known to be good, so that help and errors are immediate.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from glm4v_jax import __version__
from glm4v_jax.cli.cache import Cache
from glm4v_jax.cli.chat.chat import Chat
from glm4v_jax.cli.describe import Describe
from glm4v_jax.cli.doctor import Doctor
from glm4v_jax.cli.generate import Generate
from glm4v_jax.cli.inspect import Inspect
from glm4v_jax.cli.mesh import Mesh
from glm4v_jax.cli.serve import Serve
from glm4v_jax.console.distributed import INTERRUPTED
from glm4v_jax.console.program import (
    PROGRAMS,
    USAGE,
    Command,
    find_program,
    print_completion,
    run_program,
    start_process,
)
from glm4v_jax.console.streams import output_failed
from glm4v_jax.devices.compilation_cache import keep_executables
from glm4v_jax.errors import ConfigError

COMMANDS: dict[str, Callable[..., Command]] = {
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "describe": Describe,
    "inspect": Inspect,
    "mesh": Mesh,
    "cache": Cache,
    "doctor": Doctor,
}

DESCRIPTION = (
    "GLM-4.1V in JAX: images, videos and text in, text out. `glm4v --version` prints the version, "
    "`glm4v --tyro-print-completion bash` (or zsh) what makes a shell complete commands and options."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` are those of this process by default.

    Returns the exit status, see `run_program`; 2 after one line that says why `convert`, `train` or `eval` is missing.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # The others stand on this package and not the other way round.
    try:
        if list(arguments) == ["--version"]:
            print(f"glm4v {__version__}", flush=True)
            return 0
        if arguments and arguments[0].startswith("--tyro-"):
            others = {name: find_program(name).COMMANDS for name in PROGRAMS}
            print_completion(COMMANDS | others, arguments, "glm4v")
        other = find_program(arguments[0]) if arguments and arguments[0] in PROGRAMS else None
    except ConfigError as error:
        print(f"glm4v: error: {error}", file=sys.stderr)
        return USAGE
    except OSError as error:  # of writing the version, or a shell's completion
        return output_failed("glm4v", error)
    if other is not None:
        status: int = other.main(arguments[1:], prog=f"glm4v {arguments[0]}")
        return status
    return run_program(COMMANDS, arguments, name="glm4v", prog="glm4v", description=DESCRIPTION, others=PROGRAMS)


def program() -> NoReturn:
    """Run `main` as a program of its own: exit with its status.

    After Ctrl-C, exit at once, with what has been written flushed: a computation may still be running on XLA's threads,
    which do not survive the end of the interpreter that they call back into.
    """
    start_process()
    keep_executables()
    try:
        status = main()
    except KeyboardInterrupt:
        print("glm4v: interrupted", file=sys.stderr)
        status = INTERRUPTED
    if status == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)
