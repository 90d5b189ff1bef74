"""How tyro shows a command's options in help, and reads numbers."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TextIO

import tyro

from glm4v_jax.config.checks import expectation

_HINTS = {"False": "", "None": "(default: none)"}
"""What help says of defaults, other than themselves."""


def tidy_help(options: Any) -> None:
    """Set how tyro shows the options of a dataclass, and of the groups in it, where they do not say it themselves.

    By itself it keeps the line breaks of docstrings, lists None among choices, and shows False and None as defaults.
    """
    classes: list[Any] = [cls for cls in options.__mro__ if dataclasses.is_dataclass(cls)]
    for cls in classes:
        _tidy_fields(cls)


@functools.cache
def _tidy_fields(cls: Any) -> None:
    """Do so for the fields of one class, once: commands share classes, and each reading of a source takes 10 ms."""
    (definition,) = typing.cast(Any, ast.parse(textwrap.dedent(inspect.getsource(cls)))).body
    docstrings = {
        ast.unparse(field.target): " ".join(str(ast.literal_eval(text.value)).split())
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    for name, hint in cls.__annotations__.items():
        base, *given = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if dataclasses.is_dataclass(base):
            tidy_help(base)
            continue
        literals = [choice for choice in typing.get_args(base) if typing.get_origin(choice) is Literal]
        choices = [str(value) for value in typing.get_args(literals[0])] if literals else None
        shown = tyro.conf.arg(
            help=docstrings.get(name),
            metavar=f"{{{','.join(choices)}}}" if choices else None,
            help_behavior_hint=_HINTS.get(str(getattr(cls, name, ""))),
        )
        read = [_number(hint)] if _kinds(hint) in ({int}, {float}) else [_choice(choices)] if choices else []
        cls.__annotations__[name] = Annotated[(base, shown, *read, *given)]


def _kinds(hint: Any) -> set[Any]:
    """The types that an annotation is made of, without None."""
    if typing.get_origin(hint) is Annotated:
        return _kinds(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(hint)))
    return {hint} - {type(None)}


def _choice(choices: list[str]) -> tyro.constructors.PrimitiveConstructorSpec[str]:
    """How tyro reads one of several words, or none: its own reader takes None for one of them."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(choices)}}}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or value in choices,
        str_from_instance=lambda value: [str(value)],
        choices=tuple(choices),
    )


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
def folded_help() -> Iterator[None]:
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
        sys.stdout.flush()  # here, where an error has a handler, and not at Python's end
