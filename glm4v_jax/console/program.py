"""How a program that is a table of commands finds one, runs it, and ends.

`glm4v` is such a program, and so are `convert`, `train` and `eval`, which `glm4v` finds by name: they are packages
beside this one, with an extra of their name in pyproject.toml where they need packages that this one does not. Help
and errors of options need none of these.
"""

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn, Protocol

import tyro

from glm4v_jax.config.checks import convert, expectation, fault, hints, one_of, raise_faults
from glm4v_jax.console.distributed import INTERRUPTED, READER_GONE, joined
from glm4v_jax.console.extras import missing
from glm4v_jax.console.interrupts import interrupt_between_imports
from glm4v_jax.console.option_help import folded_help, tidy_help
from glm4v_jax.console.streams import (
    discard_output,
    escape_unencodable,
    is_flushed,
    native_logs,
    notes,
    open_closed_output,
    output_failed,
    say_line,
    silent_errors,
)
from glm4v_jax.devices.hardware import missing_device
from glm4v_jax.errors import ConfigError, GenerationError, Glm4vError, one_line

PROGRAMS = {
    "convert": "Convert checkpoints between Hugging Face and Orbax formats.",
    "train": "Fine-tune a model on your own data.",
    "eval": "Score a checkpoint on benchmarks; compare two runs.",
}
"""The programs beside this package: name -> description."""
_ITEMS = {"choices": "choice", "stop_strings": "stop"}
"""Fields of `GenerationConfig` -> the options that give one item each."""
_POSITIONAL = tyro.conf.Positional[Any].__metadata__[0]  # type: ignore[misc]  # typed as a class, but an Annotated
USAGE = 2
"""Exit status for unknown commands and options, and for a program that is not installed: 1 may be a result."""


class Command(Protocol):
    """A command with its options; `Options` has all but `run`."""

    verbose: bool
    quiet: bool
    trouble: int
    """Exit status where it could not do its work."""

    def silence(self) -> contextlib.AbstractContextManager[Any]:
        """What `run` is called in: drops everything but answers and errors where that was asked for."""

    def run(self) -> int | None:
        """Do the work; return the exit status, None for 0. Glm4vError and OSError are what the user can mend."""

    def interrupted(self) -> str | None:
        """What to print after Ctrl-C, if there is more to say than that."""


@dataclasses.dataclass(kw_only=True)
class Options:
    """What every command has."""

    verbose: Annotated[bool, tyro.conf.arg(aliases=("-v", "--debug"))] = False
    """Show tracebacks of errors, messages of libraries, and what JAX compiles."""

    quiet: Annotated[bool, tyro.conf.arg(aliases=("-q",))] = False
    """Print answers and errors only."""

    trouble = 1

    def silence(self) -> contextlib.AbstractContextManager[Any]:
        """Write standard error to nowhere with --quiet; errors are printed after `run`."""
        return silent_errors() if self.quiet else contextlib.nullcontext()

    def interrupted(self) -> str | None:
        """Nothing more to say."""
        return None


@dataclasses.dataclass(kw_only=True)
class JsonOptions(Options):
    """What a command has that prints a table, or an object for other programs."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object."""


def run_program(
    commands: Mapping[str, Callable[..., Command]],
    arguments: Sequence[str] | None,
    *,
    name: str,
    prog: str,
    description: str,
    others: Mapping[str, str] | None = None,
) -> int:
    """Run one command of a table, with the other processes that run it if there are any.

    Args:
      commands: name -> dataclass.
      arguments: what follows the program's name; those of this process if None.
      name: starts messages of errors.
      prog: the program's name in help.
      description: of the program, in help.
      others: name -> description of commands that are listed in help, and handled elsewhere.

    Returns:
      The exit status: what `run` returns; `trouble` after one line on standard error that says what is wrong, or a
      traceback with `verbose` and for unexpected errors; 130 after Ctrl-C; 141 where nobody reads the output. Help and
      unknown options exit by `SystemExit`.
    """
    open_closed_output()
    escape_unencodable()
    try:
        command = parse(commands, sys.argv[1:] if arguments is None else arguments, prog, description, others)
    except OSError as error:  # of printing help
        return output_failed(name, error)
    try:
        check_ranges(command)
        if command.quiet and command.verbose:
            raise ConfigError("--quiet: found with --verbose; expected one of the two")
        with (
            contextlib.nullcontext() if command.verbose else notes(name, quiet=command.quiet),
            native_logs(command.verbose),
            joined(getattr(command, "distributed", None), name, command.trouble, debug=command.verbose),
            command.silence(),
        ):
            status = command.run()
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        return READER_GONE
    except (Glm4vError, OSError) as error:
        # With --quiet too, the error is that the two are given.
        if command.verbose and not command.quiet:
            raise
        is_refused = not is_flushed()
        place = "standard output: " if is_refused and isinstance(error, OSError) and error.filename is None else ""
        told = one_line(error)
        if isinstance(error, ConfigError | GenerationError):
            told = _as_given(told, command)
        say_line(f"{name}: error: {place}{told}")
        return command.trouble
    except KeyboardInterrupt as error:
        print(command.interrupted() or str(error) or f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not command.verbose and isinstance(error, ModuleNotFoundError) and (line := missing(error, name)):
            print(f"{name}: error: {line}", file=sys.stderr)
            return command.trouble
        # What fails for want of a device says little, and each command has its own first use of JAX.
        if not command.verbose and "jax" in sys.modules and (line := missing_device()):
            print(f"{name}: error: {line}; `glm4v doctor` shows more", file=sys.stderr)
            return command.trouble
        if command.verbose or command.trouble == 1:
            raise
        # Python's own status would be 1, which may be a result of the command.
        traceback.print_exc()
        return command.trouble
    return status or 0


def parse(
    commands: Mapping[str, Callable[..., Command]],
    arguments: Sequence[str],
    prog: str,
    description: str,
    others: Mapping[str, str] | None = None,
) -> Command:
    """Find the command that the arguments ask for, with its options; see `run_program`.

    SystemExit with status 0 for help, and 2 for unknown commands and options.
    """
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    descriptions = {name: _first_line(command) for name, command in commands.items()} | dict(others or {})
    if arguments and not arguments[0].startswith("-"):
        # Not as a subcommand, so that errors name the help of this command and not that of the program.
        name, *options = arguments
        if name not in commands:
            print(f"{prog}: error: found command {name!r}; expected {one_of(descriptions, name)}", file=sys.stderr)
            raise SystemExit(USAGE)
        tidy_help(commands[name])
        about = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(commands[name]) or "").split("\n\n"))
        with folded_help():
            return tyro.cli(commands[name], prog=f"{prog} {name}", args=options, config=config, description=about)
    listed: dict[str, Callable[..., Any]] = {
        name: dataclasses.make_dataclass(name, [], namespace={"__doc__": text}) for name, text in descriptions.items()
    }
    with folded_help():
        tyro.extras.subcommand_cli_from_dict(listed, prog=prog, description=description, args=arguments, config=config)
    raise AssertionError("the arguments name no command, which tyro exits for")


def print_completion(tables: Mapping[str, Any], arguments: Sequence[str], prog: str) -> NoReturn:
    """Print or write what makes a shell complete commands and options, by tyro's options for that.

    `tables`: command -> dataclass, or a table of subcommands. SystemExit always; with status 2 where the arguments are
    others than "--tyro-print-completion SHELL", or "--tyro-write-completion SHELL FILE".
    """
    if not any(map(len, arguments[1:])):
        print(f"{prog}: error: {arguments[0]}: found no shell; expected bash or zsh", file=sys.stderr)
        raise SystemExit(USAGE)
    try:
        tyro.cli(
            _choice(tables), prog=prog, args=arguments, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
        )
    finally:
        sys.stdout.flush()
    raise AssertionError("the arguments ask for no completion, for which tyro exits")


def _choice(tables: Mapping[str, Any]) -> Any:
    """The type of which tyro makes subcommands."""
    choices = []
    for name, table in tables.items():
        if isinstance(table, Mapping):
            table = dataclasses.make_dataclass(name, [("command", _choice(table))])
        else:
            tidy_help(table)
        choices.append(Annotated[(table, tyro.conf.subcommand(name, prefix_name=False))])
    return typing.Union[tuple(choices)]  # noqa: UP007  # made of a list


def check_ranges(options: Any) -> None:
    """Check the numbers of a command, and of its groups of options, against their annotations.

    Raises:
      ConfigError: all options that are out of range.
    """
    raise_faults(list(_faults(options)))


def _faults(options: Any) -> Iterator[str]:
    for name, hint in hints(type(options)).items():
        value = getattr(options, name)
        if dataclasses.is_dataclass(value):
            yield from _faults(value)
        elif isinstance(value, int | float):
            try:
                convert(value, hint)
            except ValueError:
                yield fault(f"--{name.replace('_', '-')}", value, expectation(hint))


def _as_given(line: str, command: Command) -> str:
    """Name fields as the options that the user gave: `top_k: found -1` becomes `--top-k: found -1`."""
    options = set(_options(command))

    def option(match: re.Match[str]) -> str:
        name = _ITEMS.get(match[2], match[2])
        return f"{match[1]}--{name.replace('_', '-')}" if name in options else match[0]

    return re.sub(r"(^|; )(\w+)(?=: found )", option, line)


def _options(options: Any) -> Iterator[str]:
    for name, hint in hints(type(options)).items():
        if dataclasses.is_dataclass(value := getattr(options, name)):
            yield from _options(value)
        elif _POSITIONAL not in getattr(hint, "__metadata__", ()):
            yield name


def find_program(name: str) -> Any:
    """Find a program beside this package, one of `PROGRAMS`: its module, with `main` and `COMMANDS`.

    ConfigError if packages of its extra are missing, or something else has its name.
    """
    found = importlib.util.find_spec(name)
    # Not imported to find out: somebody's script would run.
    if found is not None and found.submodule_search_locations is None:
        raise ConfigError(_hidden(name, found.origin))
    try:
        return importlib.import_module(f"{name}.commands")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == name:
            raise ConfigError(_hidden(name, None if found is None else found.origin)) from error
        if (line := missing(error, name)) is None:
            raise
        raise ConfigError(line) from error


def start_process() -> None:
    """Prepare a process of its own before it imports JAX: Ctrl-C, and the garbage collector."""
    interrupt_between_imports()
    # Imports and traced programs stay; looking through them after every 700 new objects took 11% of the CPU time of
    # `glm4v generate` with a tiny model (2.29 s; 2.04 s after every 50,000).
    gc.set_threshold(50_000)


def run_module(name: str) -> NoReturn:
    """`python -m NAME`: exit with the status of the program, or `USAGE` after a line that says why it is missing."""
    start_process()
    try:
        main = find_program(name).main
    except ConfigError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(main())


def _first_line(command: Callable[..., Any]) -> str:
    return (command.__doc__ or "").partition("\n")[0]


def _hidden(name: str, place: str | None) -> str:
    found = f"{place}: found another" if place else f"{name}: found no"
    return f"{found} package {name}; expected that of glm4v_jax: rename it, or run from another directory"
