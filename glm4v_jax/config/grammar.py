"""Grammars of structured output: a JSON schema, a regular expression or choices, in llguidance's notation."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from glm4v_jax.config.checks import fault
from glm4v_jax.errors import GenerationError

Kind = Literal["json_schema", "regex", "choices"]
KINDS: tuple[Kind, ...] = ("json_schema", "regex", "choices")
"""Options that restrict an answer; at most one of them is given."""

# Between the parts of a JSON text: nothing, a space, or one line break with an indentation. Without a limit a model may
# write whitespace for ever.
_WHITESPACE = r" |\n[ ]{0,20}"

_SHOWN = 200  # characters of a schema in an error
_LARGEST = 2**20  # characters of a schema: llguidance takes seconds to find that ten times as many are too many


class Grammar(NamedTuple):
    """A grammar in llguidance's notation, and the option that it is made of."""

    kind: Kind
    text: str


def schema_text(schema: Any) -> Any:
    """A JSON schema as text, in the order of its properties; what is not a mapping stays as it is.

    >>> schema_text({"type": "integer"})
    '{"type": "integer"}'

    Raises:
      GenerationError: it holds something that JSON does not have.
    """
    if not isinstance(schema, Mapping):
        return schema
    try:
        return json.dumps(dict(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationError(f"json_schema: found {error}; expected what JSON can hold") from error


@functools.lru_cache(maxsize=256)
def grammar_of(kind: Kind, value: str | tuple[str, ...]) -> Grammar:
    """The grammar of an option, after a check.

    >>> grammar_of("choices", ("yes", "no")).text
    'start: "yes" | "no"'
    >>> grammar_of("regex", "(a")
    Traceback (most recent call last):
      ...
    glm4v_jax.errors.GenerationError: regex: found '(a', which cannot be used (unclosed group); expected a regular expression without look-around and back-references

    Raises:
      GenerationError: the value is invalid, or uses what llguidance does not support; the message names it.
    """  # noqa: E501
    from llguidance import LLMatcher

    if (size := sum(map(len, value))) > _LARGEST:
        raise GenerationError(f"{kind}: found {size:,} characters; expected at most {_LARGEST:,}")
    try:
        made = _MAKERS[kind](LLMatcher, value)
        problem = LLMatcher.validate_grammar(made)
    except ValueError as error:  # text that is not Unicode
        if isinstance(error, GenerationError):
            raise
        made, problem = "", str(error)
    if problem:
        # Of a regular expression's several lines the last says what is wrong.
        reason = problem.rpartition("error: ")[2] if kind == "regex" else problem
        reason = " ".join(reason.split("\n   1 |")[0].split())
        expected = _EXPECTED[kind]
        raise GenerationError(f"{kind}: found {_short(value)}, which cannot be used ({reason}); expected {expected}")
    return Grammar(kind, made)


_EXPECTED = {
    "json_schema": "a JSON schema of keywords that llguidance supports",
    "regex": "a regular expression without look-around and back-references",
    "choices": "a list of strings",
}


def _of_choices(matcher: Any, choices: tuple[str, ...]) -> str:
    del matcher
    # Escaped as in JSON, which leaves one control character as it is.
    return "start: " + " | ".join(json.dumps(choice).replace("\x7f", "\\u007f") for choice in choices)


def _of_regex(matcher: Any, regex: str) -> str:
    return matcher.grammar_from_regex(regex)


def _of_schema(matcher: Any, text: str) -> str:
    overrides = {"whitespace_pattern": _WHITESPACE, "lenient": False}
    return matcher.grammar_from_json_schema(_checked_schema(text), overrides=overrides)


_MAKERS: dict[Kind, Callable[[Any, Any], str]] = {
    "json_schema": _of_schema, "regex": _of_regex, "choices": _of_choices,
}  # fmt: skip


def _checked_schema(text: str) -> str:
    """The schema, for {} that of any object; GenerationError if the text is not JSON, or not an object."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GenerationError(
            f"json_schema: found {_short(text)}, no JSON ({error}); expected a JSON schema"
        ) from error
    if not isinstance(schema, dict):
        raise GenerationError(fault("json_schema", schema, "an object; {} allows any JSON object"))
    return text if schema else '{"type": "object"}'


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.startswith("{") else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
