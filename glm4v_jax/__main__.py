"""`glm4v`, also `python -m glm4v_jax`: the command line, which Ctrl-C ends in one line while it is still importing."""

import os
import signal
from typing import NoReturn


def program() -> NoReturn:
    """Import the program, and run it as one of its own; see `cli.main.program`."""
    # An exception in the middle of an import may be reported as another, or be lost.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, _end)
    from glm4v_jax.cli.main import program

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    program()


def _end(*_: object) -> NoReturn:
    os.write(2, b"glm4v: interrupted\n")
    os._exit(130)  # as `INTERRUPTED` of console.distributed, which may not be imported yet


if __name__ == "__main__":
    program()
