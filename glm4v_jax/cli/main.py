"""The command line, `glm4v`: a table of subcommands, each a typed dataclass that runs itself.

Thin on purpose: a subcommand turns options into calls of the public Python interface and prints what comes back. JAX is
imported only once the inputs are known to be good, so that help and complaints are immediate.
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
from glm4v_jax.cli.generate import Generate
from glm4v_jax.cli.inspect import Inspect
from glm4v_jax.cli.mesh import Mesh
from glm4v_jax.console.console import parse
from glm4v_jax.console.distributed import INTERRUPTED, READER_GONE
from glm4v_jax.console.program import Runnable, leave_output, run_command
from glm4v_jax.console.standing import STANDING_ON_THIS, TROUBLE, main_of
from glm4v_jax.errors import ConfigError

COMMANDS: dict[str, Callable[..., Runnable]] = {
    "generate": Generate,
    "chat": Chat,
    "describe": Describe,
    "inspect": Inspect,
    "mesh": Mesh,
    "cache": Cache,
}


DESCRIPTION = (
    "GLM-4.1V in JAX: pictures, videos and text in, text out. `glm4v convert` converts checkpoints, `glm4v train` "
    "fine-tunes, `glm4v eval` scores, and `glm4v --version` prints the version."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        arguments: what follows the program's name; that of this process by default.

    Returns:
        The exit status: 0, or 1 after one line on standard error that says what is wrong; 2 after one that says why a
        program beside this package cannot be had. An unknown option exits with status 2 by `SystemExit`.
    """
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        leave_output()
        return READER_GONE
    return status


def program() -> NoReturn:
    """`main` as a program of its own: exits with its status.

    After Ctrl-C at once, with what has been written flushed: a computation may still be running on XLA's threads, which
    do not survive the end of the interpreter that they call back into.
    """
    try:
        status = main()
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in STANDING_ON_THIS:
        # They stand on this package and not the other way round: loaded where they are asked for.
        try:
            other = main_of(arguments[0])
        except ConfigError as error:
            print(f"glm4v: error: {error}", file=sys.stderr)
            return TROUBLE
        return other(arguments[1:], prog=f"glm4v {arguments[0]}")
    if list(arguments) == ["--version"]:
        print(f"glm4v {__version__}")
        return 0
    return run_command(parse(COMMANDS, arguments, "glm4v", DESCRIPTION), "glm4v")
