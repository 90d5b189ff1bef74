"""Calls of tools in what the model writes.

Checkpoints whose chat template has tools write a call as

    <tool_call>NAME
    <arg_key>KEY</arg_key>
    <arg_value>VALUE</arg_value>
    </tool_call>

with a string as it is and any other value as JSON.
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from glm4v_jax.generate.text.stream import TOOL_TAGS
from glm4v_jax.generate.text.thinking import start_of_unfinished_tag

CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE = TOOL_TAGS
_SPLIT = re.compile("(" + "|".join(map(re.escape, TOOL_TAGS)) + ")")
_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "null": (type(None),), "boolean": (bool,), "integer": (int,), "number": (int, float), "array": (list,),
    "object": (dict,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a function.

    >>> ToolCall("weather", {"city": "Zürich"}, id="call_1").body()
    {'id': 'call_1', 'type': 'function', 'function': {'name': 'weather', 'arguments': '{"city": "Zürich"}'}}

    Attributes:
      name: of the function.
      arguments: by name.
      id: by which the client names it in its answer.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str = dataclasses.field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}", compare=False)

    def body(self) -> dict[str, Any]:
        """The call as a message has it."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}

    def deltas(self, index: int) -> list[dict[str, Any]]:
        """The call, the one of number `index`, as the deltas of a stream have it: its name, and then its arguments."""
        body = self.body()
        function = body["function"]
        first = {**body, "function": {"name": function["name"], "arguments": ""}}
        return [{"index": index, **first}, {"index": index, "function": {"arguments": function["arguments"]}}]


def has_name(tool: Mapping[str, Any]) -> bool:
    """Whether a tool is a function with a name, without which no call of it is found.

    >>> has_name({"type": "function", "function": {"name": "add"}}), has_name({"type": "function", "name": "add"})
    (True, False)
    """
    function = tool.get("function")
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def split_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
    """Split an answer into its text and the calls in it; see `ToolCallParser`.

    >>> said = "I add. <tool_call>add <arg_key>a</arg_key> <arg_value>1</arg_value> </tool_call>"
    >>> text, calls = split_calls(said, [{"type": "function", "function": {"name": "add"}}])
    >>> text, calls[0].name, calls[0].arguments
    ('I add.', 'add', {'a': 1})

    Args:
      text: an answer, without its thought (`Completion.answer`).
      tools: the functions that the prompt has named, objects with `function`.
    """
    parser = ToolCallParser(tools)
    pieces = parser.push(text) + parser.finish()
    texts = "".join(piece for piece in pieces if isinstance(piece, str))
    return texts.strip(), [piece for piece in pieces if isinstance(piece, ToolCall)]


class ToolCallParser:
    """Splits a content that is being written into text and calls.

    >>> parser = ToolCallParser([{"type": "function", "function": {"name": "add"}}])
    >>> parser.push("I add.<tool_call>add<arg_key>a</arg_key><arg_val")
    ['I add.']
    >>> parser.push("ue>1</arg_value></tool_call>")
    [ToolCall(name='add', arguments={'a': 1}, id='call_...')]

    What comes out does not depend on where the content was cut into pushes. A call comes out once it is whole: what
    turns out to be none, is of no function that was given, or is cut off at the end, stays text. Whitespace around
    calls belongs to them.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], *, is_single: bool = False) -> None:
        """Start an empty content.

        Args:
          tools: those of the request, objects with `function`.
          is_single: drop calls after the first.
        """
        self._is_single = is_single
        self._schemas = {
            tool["function"]["name"]: tool["function"].get("parameters") for tool in tools if tool.get("function")
        }
        self._held = ""
        # Text that may belong to a call, from the whitespace before it on; and the parts of the call so far.
        self._raw: list[str] = []
        self._call: list[str] | None = None
        self._expected: tuple[str, ...] = ()
        self._new: list[str | ToolCall] = []
        self._has_called = self._is_after_call = False

    def push(self, text: str) -> list[str | ToolCall]:
        """Take the next piece, and return the texts and calls that have become certain."""
        text = self._held + text
        cut = start_of_unfinished_tag(text, TOOL_TAGS)
        self._held = text[cut:]
        for index, piece in enumerate(_SPLIT.split(text[:cut])):
            if piece:
                self._read(piece, is_tag=bool(index % 2))
        return self._take_new()

    def finish(self) -> list[str | ToolCall]:
        """Return what was held back; the content ends here."""
        if self._held:
            self._read(self._held, is_tag=False)
            self._held = ""
        self._show("".join(self._raw))
        self._raw, self._call = [], None
        return self._take_new()

    def _read(self, piece: str, *, is_tag: bool) -> None:
        if self._call is None:
            if piece == CALL:
                self._begin()
            else:
                self._read_text(piece)
            return
        is_value = self._expected == (END_VALUE,)
        if not is_tag or (is_value and piece != END_VALUE):
            # A value may hold anything but its own end.
            self._raw.append(piece)
            self._call[-1] += piece
        elif piece in self._expected:
            self._advance(piece)
        else:
            self._give_up()
            self._read(piece, is_tag=True)

    def _begin(self) -> None:
        self._raw.append(CALL)
        self._call, self._expected = [""], (KEY, END_CALL)

    def _advance(self, tag: str) -> None:
        """Take a tag that may stand here; it ends a part: name, key, between, value, between, key, ..., between."""
        assert self._call is not None
        self._raw.append(tag)
        if tag == END_CALL:
            call = self._finished(self._call)
            if call is None:
                self._give_up()
            else:
                if not (self._is_single and self._has_called):
                    self._new.append(call)
                self._raw, self._call = [], None
                self._has_called = self._is_after_call = True
            return
        self._call.append("")
        following = {KEY: (END_KEY,), END_KEY: (VALUE,), VALUE: (END_VALUE,), END_VALUE: (KEY, END_CALL)}
        self._expected = following[tag]

    def _finished(self, parts: Sequence[str]) -> ToolCall | None:
        """The call of these parts; None if they are none."""
        name, values, between = parts[0].strip(), parts[3::4], [*parts[2::4], *parts[4::4]]
        keys = [key.strip() for key in parts[1::4]]
        if name not in self._schemas or "".join(between).strip() or len(set(keys)) < len(keys):
            return None
        schema = self._schemas[name]
        return ToolCall(name, {key: _typed(value, schema, key) for key, value in zip(keys, values, strict=True)})

    def _give_up(self) -> None:
        """What was held for a call is text."""
        self._call = None
        self._read_text("")

    def _read_text(self, text: str) -> None:
        text = "".join(self._raw) + text
        shown = text.rstrip()
        self._raw = [text[len(shown) :]]
        self._show(shown)

    def _show(self, text: str) -> None:
        text = text.lstrip() if self._is_after_call else text
        if not text:
            return
        self._is_after_call = False
        if self._new and isinstance(last := self._new[-1], str):
            self._new[-1] = last + text
        else:
            self._new.append(text)

    def _take_new(self) -> list[str | ToolCall]:
        new, self._new = self._new, []
        return new


def _typed(text: str, parameters: Any, name: str) -> Any:
    """The value of an argument, as the schema of the function's parameters has it; text where that does not say."""
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    types = _types(properties.get(name) if isinstance(properties, Mapping) else None, parameters)
    if types == {"string"}:
        return text
    try:
        # The names that Python has for them are what a model writes by mistake.
        value = msgspec.json.decode({"True": "true", "False": "false", "None": "null"}.get(text.strip(), text))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return text
    if types is None:
        return value
    if "integer" in types and isinstance(value, float) and value.is_integer():
        return int(value)
    fits = any(
        isinstance(value, _JSON_TYPES.get(kind, ())) and (kind == "boolean" or not isinstance(value, bool))
        for kind in types
    )
    return value if fits else text


def _types(schema: Any, root: Any, depth: int = 8) -> set[str] | None:
    """The types that a schema allows; None where it does not say."""
    if not isinstance(schema, Mapping) or not depth:
        return None
    if isinstance(reference := schema.get("$ref"), str):
        found = root
        for part in reference.removeprefix("#/").split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return _types(found, root, depth - 1)
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {kind for kind in declared if isinstance(kind, str)}
    known = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(known, list):
        return {_type_of(value) for value in known}
    inner = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if not isinstance(inner, list):
        return None
    found_types = [_types(one, root, depth - 1) for one in inner]
    return None if any(types is None for types in found_types) else set().union(*filter(None, found_types))


def _type_of(value: Any) -> str:
    kinds = [kind for kind, types in _JSON_TYPES.items() if isinstance(value, types)]
    return kinds[0] if kinds else "string"
