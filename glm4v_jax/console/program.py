"""How a program that is a table of commands finds one, runs it, and ends.

`glm4v` is such a program, and so are `convert`, `train` and `eval`, which `glm4v` finds by name: they are packages
beside this one, with an extra of their name in pyproject.toml where they need packages that this one does not. Help
and errors of options need none of these.
"""

import ast
import collections
import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, Protocol, TextIO

import tyro

from glm4v_jax.config.checks import convert, expectation, fault, hints, raise_faults
from glm4v_jax.console.distributed import INTERRUPTED, LOG_LEVEL, READER_GONE, joined
from glm4v_jax.devices.hardware import missing_device
from glm4v_jax.errors import ConfigError, Glm4vError, one_line

PROGRAMS = {
    "convert": "Convert checkpoints between Hugging Face and Orbax formats.",
    "train": "Fine-tune a model on your own data.",
    "eval": "Score a checkpoint on benchmarks; compare two runs.",
}
"""The programs beside this package: name -> description."""
_PAUSE = 0.05
"""Seconds until an interrupt in the middle of an import is tried again."""
USAGE = 2
"""Exit status for unknown commands and options, and for a program that is not installed: 1 may be a result."""

_HINTS = {"False": "", "None": "(default: none)"}
"""What help says of defaults, other than themselves."""


class Command(Protocol):
    """A command with its options; `Options` has all but `run`."""

    verbose: bool
    quiet: bool
    trouble: int
    """Exit status where it could not do its work."""

    def silence(self) -> contextlib.AbstractContextManager[Any]:
        """What `run` is called in: drops everything but answers and errors where that was asked for."""

    def run(self) -> int | None:
        """Do the work.

        Returns:
          The exit status; None for 0.

        Raises:
          Glm4vError, OSError: what the user can mend.
        """

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
    escape_unencodable()
    try:
        command = parse(commands, sys.argv[1:] if arguments is None else arguments, prog, description, others)
    except BrokenPipeError:
        discard_output()
        return READER_GONE
    try:
        check_ranges(command)
        if command.quiet and command.verbose:
            raise ConfigError("--quiet: found with --verbose; expected one of the two")
        with (
            contextlib.nullcontext() if command.verbose else _notes(name, quiet=command.quiet),
            _native_logs(command.verbose),
            joined(getattr(command, "distributed", None), name, command.trouble, debug=command.verbose),
            command.silence(),
        ):
            status = command.run()
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        return READER_GONE
    except (Glm4vError, OSError) as error:
        if command.verbose:
            raise
        is_refused = not _is_flushed()
        place = "standard output: " if is_refused and isinstance(error, OSError) and error.filename is None else ""
        print(f"{name}: error: {place}{one_line(error)}", file=sys.stderr)
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


_SHOWN_NOTES = 20
"""Of one kind; ten thousand files may have the same flaw."""


@contextlib.contextmanager
def _notes(name: str, *, quiet: bool) -> Iterator[None]:
    """Print what libraries and this package warn of as lines of their own, without the place in Python's code."""
    counts: collections.Counter[tuple[str, int]] = collections.Counter()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if quiet:
            return
        counts[filename, lineno] += 1
        if counts[filename, lineno] <= _SHOWN_NOTES:
            print(f"{name}: note: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
        if counts[filename, lineno] == _SHOWN_NOTES:
            print(f"{name}: note: more of this kind are not shown", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def parse(
    commands: Mapping[str, Callable[..., Command]],
    arguments: Sequence[str],
    prog: str,
    description: str,
    others: Mapping[str, str] | None = None,
) -> Command:
    """Find the command that the arguments ask for, with its options.

    Args:
      commands: name -> dataclass.
      arguments: what follows the program's name.
      prog: the program's name in help and errors.
      description: of the program, in help.
      others: name -> description of commands that are listed in help, and handled elsewhere.

    Raises:
      SystemExit: with status 0 for help, and 2 for unknown commands and options.
    """
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    descriptions = {name: _first_line(command) for name, command in commands.items()} | dict(others or {})
    if arguments and not arguments[0].startswith("-"):
        # Not as a subcommand, so that errors name the help of this command and not that of the program.
        name, *options = arguments
        if name not in commands:
            close = difflib.get_close_matches(name, descriptions, 1)
            expected = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(descriptions)}"
            print(f"{prog}: error: found command {name!r}; {expected}", file=sys.stderr)
            raise SystemExit(USAGE)
        _tidy_help(commands[name])
        about = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(commands[name]) or "").split("\n\n"))
        with _folded_help():
            return tyro.cli(commands[name], prog=f"{prog} {name}", args=options, config=config, description=about)
    listed: dict[str, Callable[..., Any]] = {
        name: dataclasses.make_dataclass(name, [], namespace={"__doc__": text}) for name, text in descriptions.items()
    }
    with _folded_help():
        tyro.extras.subcommand_cli_from_dict(listed, prog=prog, description=description, args=arguments, config=config)
    raise AssertionError("the arguments name no command, which tyro exits for")


def print_completion(tables: Mapping[str, Any], arguments: Sequence[str], prog: str) -> NoReturn:
    """Print or write what makes a shell complete commands and options, by tyro's options for that.

    Args:
      tables: command -> dataclass, or a table of subcommands.
      arguments: "--tyro-print-completion SHELL", or "--tyro-write-completion SHELL FILE".
      prog: the program's name.

    Raises:
      SystemExit: always; with status 2 where the arguments are others than these.
    """
    if not any(map(len, arguments[1:])):
        print(f"{prog}: error: {arguments[0]}: found no shell; expected bash or zsh", file=sys.stderr)
        raise SystemExit(USAGE)
    tyro.cli(
        _choice(tables), prog=prog, args=arguments, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    )
    raise AssertionError("the arguments ask for no completion, for which tyro exits")


def _choice(tables: Mapping[str, Any]) -> Any:
    """The type of which tyro makes subcommands."""
    choices = []
    for name, table in tables.items():
        if isinstance(table, Mapping):
            table = dataclasses.make_dataclass(name, [("command", _choice(table))])
        else:
            _tidy_help(table)
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


def main_of(name: str) -> Callable[..., int]:
    """Find `main` of a program beside this package.

    Args:
      name: one of `PROGRAMS`.

    Raises:
      ConfigError: packages of its extra are missing, or something else has its name.
    """
    found = importlib.util.find_spec(name)
    # Not imported to find out: somebody's script would run.
    if found is not None and found.submodule_search_locations is None:
        raise ConfigError(_hidden(name, found.origin))
    try:
        return importlib.import_module(f"{name}.commands").main
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == name:
            raise ConfigError(_hidden(name, None if found is None else found.origin)) from error
        if (line := missing(error, name)) is None:
            raise
        raise ConfigError(line) from error


def run_module(name: str) -> NoReturn:
    """`python -m NAME`: exit with the status of the program, or `USAGE` after a line that says why it is missing."""
    interrupt_between_imports()
    try:
        main = main_of(name)
    except ConfigError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(main())


def missing(error: ModuleNotFoundError, program: str) -> str | None:
    """What to do about a package that a program did not find; None if no extra brings it."""
    root = (error.name or "").partition(".")[0]
    bringing = [extra for extra, packages in extras().items() if root in map(module_of, packages)]
    if not bringing:
        return None
    extra = program if program in bringing else bringing[0]
    return f"found no package {root}; expected that of the {extra} extra: pip install 'glm4v_jax[{extra}]'"


_MODULES = {
    "scikit-image": "skimage", "scikit-learn": "sklearn", "scikit-video": "skvideo", "tensorboardx": "tensorboardX",
}  # fmt: skip
"""Packages that are imported by another name."""


def module_of(package: str) -> str:
    """The name that a package is imported by."""
    return _MODULES.get(package.lower(), package.replace("-", "_"))


def extras() -> dict[str, list[str]]:
    """Extra -> the packages that it brings, without those of other extras that it includes."""
    every = _required()
    own = {extra: [package for package in packages if package not in every[""]] for extra, packages in every.items()}
    return {extra: packages for extra, packages in own.items() if extra and packages}


def requirements() -> list[str]:
    """The packages that this one needs without any extra, decoders apart."""
    return [package for package in _required()[""] if package not in ("decord", "av")]


def _required() -> dict[str, list[str]]:
    """Extra -> packages, with "" for no extra, from the metadata of this package; nothing where there is none."""
    found: dict[str, list[str]] = {"": []}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("glm4v_jax") or ():
            package, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)", line)
            if package is not None and module_of(package[0]) != "glm4v_jax":
                found.setdefault("" if extra is None else extra[1], []).append(package[0])
    return found


@contextlib.contextmanager
def silent_errors() -> Iterator[None]:
    """Write what goes to standard error to nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def _native_logs(verbose: bool) -> Iterator[None]:
    """Have JAX, if it is imported in the body, log what it compiles; or hide what its native code logs.

    That code calls a compilation of more than two minutes a probable bug of XLA, which is what a large model takes.
    """
    wanted = {"JAX_LOG_COMPILES": "1"} if verbose else {LOG_LEVEL: "3"}
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def escape_unencodable() -> None:
    """Write what the encoding of standard output lacks as escapes, as standard error does, in place of failing.

    That is most characters where it is ASCII (a C locale, PYTHONIOENCODING=ascii), and names of files that are not
    valid Unicode everywhere.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def interrupt_between_imports() -> None:
    """Have Ctrl-C raise `KeyboardInterrupt` once no import is under way.

    In the middle of an import it may come out as another error, such as that a package is missing, or end the process
    with a segmentation fault (JAX's native code); in JAX's callback of the garbage collector it is lost.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    within = frame
    while within is not None:
        code = within.f_code
        if code.co_filename == "<frozen importlib._bootstrap>" or code.co_name == "_xla_gc_callback":
            again = threading.Timer(_PAUSE, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        within = within.f_back
    signal.default_int_handler(number, frame)


def discard_output() -> None:
    """Write standard output to nowhere, once nobody reads it.

    Python flushes once more at its end, which must not fail; see the documentation of SIGPIPE in `signal`.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_flushed() -> bool:
    """Flush standard output; discard it where that fails, as on a full disk: Python would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()
        return False
    return True


def _tidy_help(options: Any) -> None:
    """Set how tyro shows the options of a dataclass, and of the groups in it, where they do not say it themselves.

    By itself it keeps the line breaks of docstrings, lists None among choices, and shows False and None as defaults.
    """
    classes: list[Any] = [cls for cls in options.__mro__ if dataclasses.is_dataclass(cls)]
    for cls in classes:
        (definition,) = typing.cast(Any, ast.parse(textwrap.dedent(inspect.getsource(cls)))).body
        docstrings = {
            ast.unparse(field.target): " ".join(str(ast.literal_eval(text.value)).split())
            for field, text in itertools.pairwise(definition.body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
        for name, hint in cls.__annotations__.items():
            base, *given = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
            if dataclasses.is_dataclass(base):
                _tidy_help(base)
                continue
            literals = [choice for choice in typing.get_args(base) if typing.get_origin(choice) is Literal]
            choices = [str(value) for value in typing.get_args(literals[0])] if literals else None
            shown = tyro.conf.arg(
                help=docstrings.get(name),
                metavar=f"{{{','.join(choices)}}}" if choices else None,
                help_behavior_hint=_HINTS.get(str(getattr(cls, name, ""))),
            )
            read = [_number(hint)] if _kinds(hint) in ({int}, {float}) else []
            cls.__annotations__[name] = Annotated[(base, shown, *read, *given)]


def _kinds(hint: Any) -> set[Any]:
    """The types that an annotation is made of, without None."""
    if typing.get_origin(hint) is Annotated:
        return _kinds(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(hint)))
    return {hint} - {type(None)}


def _number(hint: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """How tyro reads a number: its own errors show annotations as Python writes them."""
    (kind,) = _kinds(hint)

    def read(words: list[str]) -> Any:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"found {words[0]!r}; expected {expectation(hint)}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


class _Held(io.StringIO):
    """Holds what will be printed on a stream; tyro sees to what that stream can show."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether that is a terminal."""
        return self._stream.isatty()


@contextlib.contextmanager
def _folded_help() -> Iterator[None]:
    """Fold descriptions to the width of the terminal; tyro folds the text in its boxes alone."""
    held = _Held(sys.stdout)
    try:
        with contextlib.redirect_stdout(held):
            yield
    finally:
        fold = textwrap.TextWrapper(shutil.get_terminal_size().columns, break_on_hyphens=False, break_long_words=False)
        for line in held.getvalue().splitlines():
            fold.subsequent_indent = " " * len("usage: ") * line.startswith("usage: ")
            print(fold.fill(line) if line[:1].isalpha() else line)


def _first_line(command: Callable[..., Any]) -> str:
    return (command.__doc__ or "").partition("\n")[0]


def _hidden(name: str, place: str | None) -> str:
    found = f"{place}: found another" if place else f"{name}: found no"
    return f"{found} package {name}; expected that of glm4v_jax: rename it, or run from another directory"
