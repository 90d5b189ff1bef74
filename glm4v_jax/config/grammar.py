"""Grammars of structured output: a JSON schema, a regular expression or choices, in llguidance's notation."""

import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

from glm4v_jax.config.checks import fault
from glm4v_jax.errors import GenerationError

Kind = Literal["json_schema", "regex", "choices"]
KINDS: tuple[Kind, ...] = ("json_schema", "regex", "choices")
"""Options that restrict an answer; at most one of them is given."""

# Between the parts of a JSON text: nothing, a space, or one line break with an indentation. Without a limit a model may
# write whitespace for ever.
_WHITESPACE = r" |\n[ ]{0,20}"

_SHOWN = 200  # characters of a schema in an error


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
        return json.dumps(dict(schema), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationError(f"json_schema: found {error}; expected what JSON can hold") from error


@functools.lru_cache(maxsize=256)
def grammar_of(kind: Kind, value: str | tuple[str, ...]) -> str:
    r"""The grammar of an option, in llguidance's notation, after a check.

    >>> print(grammar_of("choices", ("yes", "no")))
    start: "yes" | "no"
    >>> grammar_of("regex", "(a")
    Traceback (most recent call last):
      ...
    glm4v_jax.errors.GenerationError: regex: found '(a', which cannot be used (unclosed group); expected a regular expression without look-around and back-references

    Raises:
      GenerationError: the value is invalid, or uses what llguidance does not support; the message names it.
    """  # noqa: E501
    from llguidance import LLMatcher

    if kind == "choices":
        made, expected = _of_choices(value), "a list of strings"
    elif kind == "regex":
        made, expected = LLMatcher.grammar_from_regex(str(value)), _REGEX
    else:
        made = LLMatcher.grammar_from_json_schema(
            _checked_schema(str(value)), overrides={"whitespace_pattern": _WHITESPACE, "lenient": False}
        )
        expected = "a JSON schema of keywords that llguidance supports"
    if problem := LLMatcher.validate_grammar(made):
        # Of a regular expression's several lines the last says what is wrong.
        reason = problem.rpartition("error: ")[2] if kind == "regex" else problem
        reason = " ".join(reason.split("\n   1 |")[0].split())
        raise GenerationError(f"{kind}: found {_short(value)}, which cannot be used ({reason}); expected {expected}")
    return made


_REGEX = "a regular expression without look-around and back-references"


def _of_choices(choices: str | tuple[str, ...]) -> str:
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _checked_schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GenerationError(
            f"json_schema: found {_short(text)}, no JSON ({error}); expected a JSON schema"
        ) from error
    if not isinstance(schema, dict):
        raise GenerationError(fault("json_schema", schema, "an object; {} allows any JSON object"))
    return schema or {"type": "object"}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.startswith("{") else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
