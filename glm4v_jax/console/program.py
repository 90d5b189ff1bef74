"""What the programs share that are tables of subcommands: how one is found, runs, and ends."""

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Protocol

import tyro

from glm4v_jax.console.console import parse
from glm4v_jax.console.distributed import INTERRUPTED, READER_GONE, joined
from glm4v_jax.console.standing import missing
from glm4v_jax.errors import Glm4vError, one_line


class Runnable(Protocol):
    """A subcommand with its options."""

    debug: bool

    def run(self) -> int | None:
        """Does the work and returns the exit status, None for 0.

        Raises:
          Glm4vError, OSError: what the user can mend.
        """


class Command(Runnable, Protocol):
    """What a table of subcommands holds; `Options` has all but `run`."""

    trouble: int
    """Exit status where it could not do its work."""

    def interrupted(self) -> str | None:
        """What to say after Ctrl-C, if anything."""


@dataclasses.dataclass(kw_only=True)
class Options:
    """What every subcommand of a table has."""

    debug: bool = False
    """Show the whole traceback of an error."""

    trouble = 1

    def interrupted(self) -> str | None:
        """Nothing to say."""
        return None


@dataclasses.dataclass(kw_only=True)
class JsonOptions(Options):
    """Of a subcommand whose result is a table, or an object for other programs."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object."""


def run_program(
    commands: Mapping[str, Callable[..., Command]],
    arguments: Sequence[str] | None,
    *,
    name: str,
    prog: str,
    description: str,
) -> int:
    """Run one subcommand of a table.

    Args:
      commands: name -> dataclass.
      arguments: what follows the program's name; that of this process if None.
      name: begins messages of errors.
      prog: the program's name in help.
      description: of the program, in help.

    Returns:
      The exit status, as of `run_command`. An unknown option exits with status 2 by `SystemExit`.
    """
    command = parse(commands, sys.argv[1:] if arguments is None else arguments, prog, description)
    return run_command(command, name, trouble=command.trouble, interrupted=command.interrupted)


def run_command(
    command: Runnable, name: str, *, trouble: int = 1, interrupted: Callable[[], str | None] | None = None
) -> int:
    """Run a subcommand, with the other processes that run it if there are any, and end as shell commands do.

    Args:
      command: the subcommand.
      name: begins messages of errors.
      trouble: exit status after an error.
      interrupted: for what to say after Ctrl-C.

    Returns:
      The exit status: what `run` returns; `trouble` after one line on standard error that says what is wrong, or a
      whole traceback with `debug` and for what nobody expected; 130 after Ctrl-C; 141 where nobody reads the output.
    """
    try:
        with joined(command, name, trouble):
            status = command.run()
        sys.stdout.flush()
    except BrokenPipeError:
        leave_output()
        return READER_GONE
    except (Glm4vError, OSError) as error:
        if command.debug:
            raise
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return trouble
    except KeyboardInterrupt:
        said = None if interrupted is None else interrupted()
        if said is not None:
            print(said, file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not command.debug and isinstance(error, ModuleNotFoundError) and (line := missing(error, name)):
            print(f"{name}: error: {line}", file=sys.stderr)
            return trouble
        if command.debug or trouble == 1:
            raise
        # Python's own status would be 1, which of some subcommands is an answer.
        traceback.print_exc()
        return trouble
    return status or 0


def leave_output() -> None:
    """Write standard output to nowhere, once nobody reads it.

    Python flushes once more at its end, which must not fail; see the documentation of SIGPIPE in `signal`.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
